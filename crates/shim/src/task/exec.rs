//! Programs that clients run in a container (`kubectl exec`): those of the guest, by its agent, and
//! `edgevmm-ctl`, which controls the machine.
//!
//! Both are `edgevmm` itself as a process of the container's control group, so that a client has
//! something to signal and to wait for, and what a guest answers takes up none of the daemon's memory.
//! A program in the guest gets no signals, and goes on when its client is ended; the agent runs it as
//! its own user with its own variables, so environment, user and folder of the container's are left out.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

use super::Tasks;
use super::container::Container;
use super::create::stream;
use super::spawn::{Spawned, spawn};
use super::state::{Action, Exit, Stage, State};
use crate::cli::check_identifier;
use crate::events::Event;
use crate::holder::{self, Plan, Tool};
use crate::process::Process;
use crate::proto::events::{TaskExecAdded, TaskExecStarted, TaskExit};
use crate::proto::now;
use crate::proto::task::ExecRequest;
use crate::record::machines;
use crate::runc::Runc;
use crate::terminal::{self, Line, Terminal};
use crate::ttrpc::{CallError, Code};
use crate::vmm;
use crate::volumes::write_private;

/// The program that is no program of the guest.
const CONTROL: &str = "edgevmm-ctl";
/// Environment variable by which that one knows that it has a client's input.
const INPUT: &str = "EDGEVMM_INPUT";
/// Most programs of a container at a time.
const MAX_EXECS: usize = 256;
/// How long a client may take to read the last that a terminal has for it.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Exit status of what could not be run.
const FAILED: u32 = 125;

/// Programs of a container, by their IDs.
#[derive(Debug, Default)]
pub struct Execs(Mutex<HashMap<String, Arc<Exec>>>);

impl Execs {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one of that ID.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn get(&self, id: &str) -> Result<Arc<Exec>, CallError> {
        let found = self.lock().get(id).cloned();
        found.ok_or_else(|| CallError::new(Code::NotFound, format!("There is no process {id}")))
    }

    /// Checks that there may be one more, of that ID.
    fn check_new(&self, id: &str) -> Result<(), CallError> {
        let execs = self.lock();
        if execs.contains_key(id) {
            let message = format!("There is a process {id} already");
            return Err(CallError::new(Code::AlreadyExists, message));
        }
        if execs.len() >= MAX_EXECS {
            let message = format!("There are {MAX_EXECS} programs in the container already");
            return Err(CallError::new(Code::ResourceExhausted, message));
        }
        Ok(())
    }

    /// Adds one that [`Self::check_new`] has checked under the container's lock on changes.
    fn add(&self, exec: Exec) {
        let id = exec.request.exec_id.clone();
        self.lock().insert(id, Arc::new(exec));
    }

    /// Ends all, as their container has ended.
    pub fn kill_all(&self) {
        for exec in self.lock().values() {
            if let Some(process) = exec.process.get() {
                process.kill();
            }
        }
    }

    /// Waits for the end of all that were started.
    pub async fn ended(&self) {
        let all: Vec<_> = self.lock().values().cloned().collect();
        for exec in all {
            if exec.process.get().is_some() {
                exec.stage.ended().await;
            }
        }
    }
}

/// A program of a container's.
#[derive(Debug)]
pub struct Exec {
    /// What it was made from.
    pub request: ExecRequest,
    /// Its state.
    pub stage: Stage,
    tool: Tool,
    process: OnceLock<Process>,
    terminal: OnceLock<Terminal>,
    /// Who passes on what its client types.
    input: Mutex<Option<AbortHandle>>,
    /// Files of an ordinary container's.
    files: Option<Files>,
    changes: tokio::sync::Mutex<()>,
}

/// Files by which runc is told of a program, and tells of it; gone with this value.
#[derive(Debug)]
struct Files {
    description: PathBuf,
    pid: PathBuf,
}

impl Files {
    fn new(runc: &Runc, id: &str) -> Self {
        let path = |end| runc.bundle.join(format!("exec-{id}.{end}"));
        Self {
            description: path("json"),
            pid: path("pid"),
        }
    }

    /// The program itself, whose parent is `runc exec`.
    fn program(&self) -> Option<Process> {
        let text = fs::read_to_string(&self.pid).ok()?;
        Process::find(text.trim().parse().ok()?)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in [&self.description, &self.pid] {
            let _ = fs::remove_file(file);
        }
    }
}

/// A process, as OCI's runtime specification has it (1.2, config.json).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Program {
    args: Vec<String>,
}

impl Exec {
    fn new(request: ExecRequest, container: &Container) -> Result<Self, CallError> {
        let invalid = |message: String| CallError::new(Code::InvalidArgument, message);
        check_identifier(&request.exec_id).map_err(|error| invalid(error.to_string()))?;
        let spec = request.spec.clone().unwrap_or_default().value;
        let program: Program = serde_json::from_slice(&spec)
            .map_err(|error| invalid(format!("The program can't be read: {error}")))?;
        let runc = container.record.runc.as_ref();
        let files = runc.map(|runc| Files::new(runc, &request.exec_id));
        let tool = match runc.zip(files.as_ref()) {
            Some((runc, files)) => ordinary(runc, files, &spec)?,
            None => {
                let machine = container.machine(Action::Exec)?.vmm.machine();
                in_machine(program.args, machine)?
            }
        };
        let tool = Tool {
            stdout: stream(&request.stdout)?,
            stderr: stream(&request.stderr)?,
            ..tool
        };
        Ok(Self {
            request,
            stage: Stage::default(),
            tool,
            process: OnceLock::new(),
            terminal: OnceLock::new(),
            input: Mutex::default(),
            files,
            changes: tokio::sync::Mutex::default(),
        })
    }

    /// Its process ID; 0 before it runs.
    pub fn pid(&self) -> u32 {
        self.process.get().map_or(0, |process| process.id())
    }

    fn is_control(&self) -> bool {
        self.tool.name == CONTROL
    }

    /// Starts it in a control group, and connects it with its client.
    async fn start(
        self: &Arc<Self>,
        cgroup: &[PathBuf],
        log: super::Log,
    ) -> Result<Running, CallError> {
        let mut tool = self.tool.clone();
        let input = match stream(&self.request.stdin)? {
            path if path.as_os_str().is_empty() => None,
            path => Some(terminal::input(&path).map_err(|error| failed("its input", &error))?),
        };
        if input.is_some() && self.is_control() {
            tool.environment.push((INPUT.to_owned(), "1".into()));
        }
        let screen = match self.request.terminal {
            true => Some(Screen::open(&mut tool).map_err(|error| failed("a terminal", &error))?),
            false => None,
        };
        let plan = Plan {
            cgroups: cgroup
                .iter()
                .map(|folder| folder.join("cgroup.procs"))
                .collect(),
            // Where the group's memory runs out, clients go before the machine.
            oom_score: Some(1000),
            tool: Some(tool),
            ..Plan::default()
        };
        let spawned = spawn(&plan, log).await?;
        let Spawned {
            mut stdin,
            process,
            exited,
            ..
        } = spawned;
        let _ = self.process.set(process);
        let word = format!("{}\n", holder::START);
        // An error means that the process has ended, which is seen next.
        let _ = stdin.write_all(word.as_bytes()).await;
        let Some(screen) = screen else {
            self.feed(input, (stdin, HangUp(None)));
            return Ok(Running {
                exited,
                line: None,
                drained: None,
            });
        };
        // A client that has left is all that `edgevmm-ctl console` waits for, and its terminal stays.
        let hang_up = HangUp((self.is_control() && input.is_some()).then_some(process));
        self.feed(input, (screen.keyboard, hang_up));
        let _ = self.terminal.set(screen.terminal);
        Ok(Running {
            exited,
            line: Some(screen.line),
            drained: Some(tokio::spawn(drain(screen.output, screen.client))),
        })
    }

    /// Passes on what its client types. The program's input ends with the client's, or at once when
    /// there is none.
    fn feed<W>(&self, from: Option<pipe::Receiver>, to: (W, HangUp))
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let Some(mut from) = from else { return };
        let passing = tokio::spawn(async move {
            let (mut to, _hang_up) = to;
            // An error means that the program reads no more.
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        *input = Some(passing.abort_handle());
    }

    /// It reads no more of what comes from its client.
    fn close_input(&self) {
        let handle = self
            .input
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(handle) = handle {
            handle.abort();
        }
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), CallError> {
        match self.terminal.get() {
            Some(terminal) => terminal
                .resize(columns, rows)
                .map_err(|error| failed("another size", &error)),
            // Before the start, or without a terminal, there is nothing to be told.
            None => Ok(()),
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it does not run, or there is no such signal.
    pub fn kill(&self, signal: u32) -> Result<(), CallError> {
        self.stage.get().allows(Action::Control)?;
        let Some(process) = self.process.get() else {
            let message = "Can't signal a program that was not started";
            return Err(CallError::new(Code::FailedPrecondition, message));
        };
        let number = i32::try_from(signal).ok();
        let number = number.and_then(|number| Signal::try_from(number).ok());
        let number = number.ok_or_else(|| {
            CallError::new(
                Code::InvalidArgument,
                format!("There is no signal {signal}"),
            )
        })?;
        if number == Signal::SIGKILL
            && let Some(program) = self.files.as_ref().and_then(Files::program)
            && process.is_alive()
        {
            // runc can't pass this one on. It ends after its program.
            program.kill();
        } else if process.is_alive() {
            kill(Pid::from_raw(process.pid), number)
                .map_err(|error| CallError::new(Code::Unknown, error.to_string()))?;
        }
        Ok(())
    }
}

/// Tells a program that its client has left, as a terminal does whose line is cut, when it is dropped.
struct HangUp(Option<Process>);

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Some(process) = self.0.filter(|process| process.is_alive()) {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGHUP);
        }
    }
}

/// A terminal between a program and its client.
struct Screen {
    terminal: Terminal,
    line: Line,
    keyboard: pipe::Sender,
    output: pipe::Receiver,
    client: Option<pipe::Sender>,
}

impl Screen {
    /// A new one, which becomes that of `tool`.
    fn open(tool: &mut Tool) -> io::Result<Self> {
        let (terminal, line) = Terminal::open()?;
        let client = match tool.stdout.as_os_str().is_empty() {
            true => None,
            false => Some(terminal::output(&tool.stdout)?),
        };
        tool.terminal = Some(line.path.clone());
        Ok(Self {
            keyboard: terminal.keyboard()?,
            output: terminal.screen()?,
            terminal,
            line,
            client,
        })
    }
}

/// Passes on what a program writes to its terminal, until it has ended. Without a client it is thrown
/// away.
async fn drain(mut from: pipe::Receiver, to: Option<pipe::Sender>) {
    if let Some(mut to) = to {
        let _ = tokio::io::copy(&mut from, &mut to).await;
    }
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
}

/// What has to be kept while a program runs.
struct Running {
    exited: watch::Receiver<Option<u32>>,
    line: Option<Line>,
    drained: Option<JoinHandle<()>>,
}

impl Running {
    /// Waits for the program's end, and until its client has what its terminal had to say. Returns
    /// the exit status.
    async fn ended(mut self) -> u32 {
        let status = match self.exited.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or(FAILED),
            Err(_) => FAILED,
        };
        drop(self.line);
        if let Some(mut drained) = self.drained
            && timeout(LAST_WORDS, &mut drained).await.is_err()
        {
            drained.abort();
        }
        status
    }
}

/// What to run for a program of a guest, but for its streams.
fn in_machine(words: Vec<String>, machine: &str) -> Result<Tool, CallError> {
    let (name, arguments) = command(words, machine)?;
    let folder = machines().path().to_owned();
    Ok(Tool {
        program: vmm::program()?,
        name: name.to_owned(),
        arguments,
        environment: vec![
            ("EDGEVMM_RUNTIME_DIR".to_owned(), folder),
            ("EDGEVMM_MACHINE".to_owned(), machine.into()),
        ],
        ..Tool::default()
    })
}

/// What to run for a program of an ordinary container, but for its streams: runc, which is told of it
/// by a file.
fn ordinary(runc: &Runc, files: &Files, spec: &[u8]) -> Result<Tool, CallError> {
    write_private(&files.description, spec).map_err(|error| failed("a description", &error))?;
    Ok(Tool {
        program: runc.program.clone(),
        name: "runc".to_owned(),
        arguments: runc.exec(&files.description, &files.pid),
        ..Tool::default()
    })
}

/// What to run for a program: `edgevmm` by this name with these arguments.
fn command(words: Vec<String>, machine: &str) -> Result<(&'static str, Vec<String>), CallError> {
    match words.split_first() {
        None => {
            let message = "A program is needed";
            Err(CallError::new(Code::InvalidArgument, message))
        }
        Some((first, rest)) if first == CONTROL => Ok((CONTROL, rest.to_vec())),
        Some(_) => {
            let prefix = ["agent", machine, "exec", "--"].map(ToOwned::to_owned);
            Ok(("edgevmm", prefix.into_iter().chain(words).collect()))
        }
    }
}

fn failed(what: &str, error: &dyn std::error::Error) -> CallError {
    let message = format!("The program can't be given {what}: {}", crate::chain(error));
    CallError::new(Code::Unknown, message)
}

impl Tasks {
    /// Makes a program of a container's; it waits to be started.
    ///
    /// # Errors
    ///
    /// When there is no container, it does not run, or the program makes no sense.
    pub async fn exec(&self, request: ExecRequest) -> Result<(), CallError> {
        let container = self.get(&request.id)?;
        let _changing = container.changes.lock().await;
        container.state().allows(Action::Exec)?;
        let (container_id, exec_id) = (request.id.clone(), request.exec_id.clone());
        // Before files of the same name are written.
        container.execs.check_new(&exec_id)?;
        let exec = Exec::new(request, &container)?;
        self.look(&container).await;
        if container.state() == State::Paused && !exec.is_control() {
            let message = format!(
                "The machine is paused, so its guest runs nothing: `{CONTROL} resume` lets it go on"
            );
            return Err(CallError::new(Code::FailedPrecondition, message));
        }
        container.execs.add(exec);
        self.events().tell(&Event::ExecAdded(TaskExecAdded {
            container_id,
            exec_id,
        }));
        Ok(())
    }

    /// Lets a program run. Returns its process ID.
    ///
    /// # Errors
    ///
    /// When it was started already, the container has ended, or the host can't start it.
    pub async fn start_exec(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, CallError> {
        let container = self.get(id)?;
        let exec = container.execs.get(exec_id)?;
        // A container whose end is told starts no more.
        let _changing = container.changes.lock().await;
        let _starting = exec.changes.lock().await;
        // One that was deleted meanwhile would be nobody's.
        container.execs.get(exec_id)?;
        container.state().allows(Action::Exec)?;
        exec.stage.get().allows(Action::Start)?;
        // runc goes into the container's group when it has what it needs of its own.
        let folders = match container.record.runc {
            Some(_) => &[],
            None => container.cgroup.folders(),
        };
        let started = exec.start(folders, self.log().clone()).await;
        let running = started.inspect_err(|_| {
            exec.stage.set(State::Stopped(Exit {
                status: FAILED,
                at: now(),
            }));
        })?;
        exec.stage.set(State::Running);
        self.events().tell(&Event::ExecStarted(TaskExecStarted {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid: exec.pid(),
        }));
        let pid = exec.pid();
        tokio::spawn(Arc::clone(self).follow_exec(Arc::clone(&container), exec.clone(), running));
        Ok(pid)
    }

    async fn follow_exec(
        self: Arc<Self>,
        container: Arc<Container>,
        exec: Arc<Exec>,
        running: Running,
    ) {
        let status = running.ended().await;
        exec.close_input();
        container.note_end(status);
        let at = now();
        self.events().tell(&Event::Exit(TaskExit {
            container_id: exec.request.id.clone(),
            id: exec.request.exec_id.clone(),
            pid: exec.pid(),
            exit_status: status,
            exited_at: Some(at),
        }));
        exec.stage.set(State::Stopped(Exit { status, at }));
        if exec.is_control() {
            let _changing = container.changes.lock().await;
            self.look(&container).await;
        }
    }

    /// Forgets a program that has ended, or was never started. Returns its process ID and how it
    /// ended.
    ///
    /// # Errors
    ///
    /// When there is none, or it runs.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), CallError> {
        let container = self.get(id)?;
        let exec = container.execs.get(exec_id)?;
        let _starting = exec.changes.lock().await;
        let state = exec.stage.get();
        state.allows(Action::Delete)?;
        let exit = state.exit().cloned().unwrap_or_else(|| Exit {
            status: 0,
            at: now(),
        });
        // One that is being deleted by somebody else is not there any more.
        container.execs.get(exec_id)?;
        container.execs.lock().remove(exec_id);
        Ok((exec.pid(), exit))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(ToOwned::to_owned).collect()
    }

    #[test]
    fn the_first_word_decides_what_runs() {
        let (name, arguments) = command(words("uname -a"), "m").unwrap();
        assert_eq!(name, "edgevmm");
        assert_eq!(arguments, words("agent m exec -- uname -a"));
        let (name, arguments) = command(words("edgevmm-ctl agent ping"), "m").unwrap();
        assert_eq!(name, CONTROL);
        assert_eq!(arguments, words("agent ping"));
        command(Vec::new(), "m").unwrap_err();
    }
}
