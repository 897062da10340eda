//! The process that stands for a container: it joins the container's control group and namespaces,
//! waits, and becomes the VMM when it is told to. That of a pod's sandbox only waits. A program for a
//! client of a container (`kubectl exec`) begins in the same way.
//!
//! It is this program again (`hold`), as entering namespaces between fork and exec would need code
//! that must not allocate. It ends when the daemon does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use edgevmm_config::VmConfig;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::network::{self, Node, Wish};
use crate::runc::{self, Ordinary};
use crate::volumes::Given;

/// What the holder answers when it is in its place.
pub const READY: &str = "ready";
/// What it is told to become the VMM.
pub const START: &str = "start";

/// What a holder does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Files that it writes itself to, to join control groups.
    pub cgroups: Vec<PathBuf>,
    /// How easily it becomes a victim where memory runs out; as the daemon when none.
    pub oom_score: Option<i32>,
    /// Network namespace to join.
    pub network: Option<PathBuf>,
    /// Whether to make a network namespace.
    pub new_network: bool,
    /// Whether to make an IPC namespace.
    pub new_ipc: bool,
    /// Host name of a pod, for which a namespace of its own is made.
    pub hostname: Option<String>,
    /// An ordinary container, to be made and to be the parent of.
    pub ordinary: Option<Ordinary>,
    /// What to become; the holder of a sandbox becomes nothing.
    pub vmm: Option<Vmm>,
    /// What to become for a client, in place of a VMM.
    pub tool: Option<Tool>,
}

/// A VMM to be started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vmm {
    /// The program.
    pub program: PathBuf,
    /// The machine's configuration, to which its network is added.
    pub config: PathBuf,
    /// Its network.
    pub network: Wish,
    /// Folder of machines' sockets.
    pub machines: PathBuf,
    /// Files of volumes that it is given.
    pub given: Vec<Given>,
    /// FIFO of the console's input; none when empty.
    pub stdin: PathBuf,
    /// FIFO or file of the console's output; none when empty.
    pub stdout: PathBuf,
}

/// A program for a client. What it reads, unless it has a terminal, comes behind the word to start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// The program.
    pub program: PathBuf,
    /// The name it is called by.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment.
    pub environment: Vec<(String, PathBuf)>,
    /// Its terminal, if it has one.
    pub terminal: Option<PathBuf>,
    /// FIFO or file of what it writes; none when empty.
    pub stdout: PathBuf,
    /// FIFO or file of its messages; none when empty.
    pub stderr: PathBuf,
}

/// Is a holder: reads its plan from standard input, and after that the word to start.
///
/// # Errors
///
/// When it can't be what the plan says; the daemon is told.
pub fn run() -> Result<ExitCode, Failure> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let plan: Plan = serde_json::from_str(&line)?;
    let node = plan.vmm.as_ref().map(|vmm| Node::look(&vmm.network));
    let node = node.transpose()?;
    enter(&plan)?;
    if let Some((vmm, node)) = plan.vmm.as_ref().zip(node) {
        connect(vmm, node)?;
    }
    let child = plan
        .ordinary
        .map(|ordinary| ordinary.create())
        .transpose()?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{READY}")?;
    stdout.flush()?;
    if let Some(child) = child {
        let status = runc::wait_for(child)?;
        return Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)));
    }
    // The end of input is the end of the daemon.
    if !is_told_to_start()? {
        return Ok(ExitCode::SUCCESS);
    }
    match (plan.vmm, plan.tool) {
        (Some(vmm), _) => Err(become_vmm(&vmm)),
        (None, Some(tool)) => Err(become_tool(&tool)),
        (None, None) => Ok(ExitCode::SUCCESS),
    }
}

/// Reads the word and no byte more, as what follows is for the program that comes next.
fn is_told_to_start() -> io::Result<bool> {
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut word = [0; START.len() + 1];
    match input.read_exact(&mut word) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| word.strip_suffix(b"\n") == Some(START.as_bytes())),
    }
}

/// Goes to where the plan says.
fn enter(plan: &Plan) -> Result<(), Failure> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    nix::unistd::setsid()?;
    if let Some(score) = plan.oom_score {
        // A host may forbid to lower it: then it is an easier victim than it should be.
        let _ = fs::write("/proc/self/oom_score_adj", score.to_string());
    }
    for file in &plan.cgroups {
        fs::write(file, "0").map_err(|error| {
            format!(
                "Can't join the control group of {}: {error}",
                file.display()
            )
        })?;
    }
    if let Some(path) = &plan.network {
        let joined =
            File::open(path).and_then(|namespace| Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?));
        joined.map_err(|error| {
            format!(
                "Can't join the network namespace {}: {error}",
                path.display()
            )
        })?;
    }
    let mut new = CloneFlags::empty();
    new.set(CloneFlags::CLONE_NEWNET, plan.new_network);
    new.set(CloneFlags::CLONE_NEWIPC, plan.new_ipc);
    new.set(CloneFlags::CLONE_NEWUTS, plan.hostname.is_some());
    unshare(new)?;
    if let Some(hostname) = &plan.hostname {
        nix::unistd::sethostname(hostname)?;
    }
    Ok(std::env::set_current_dir("/")?)
}

/// Connects the machine to the network namespace that this is in, which may be the `node`'s.
fn connect(vmm: &Vmm, node: Node) -> Result<(), Failure> {
    let mut vm: VmConfig = serde_json::from_slice(&fs::read(&vmm.config)?)?;
    vm.nets = network::set_up(&vmm.network, node)?;
    vm.validate()?;
    Ok(fs::write(&vmm.config, serde_json::to_vec(&vm)?)?)
}

/// Becomes the VMM; returns only why not.
fn become_vmm(vmm: &Vmm) -> Failure {
    let given = vmm.given.iter().map(|file| file.open(&vmm.program));
    // Held until the VMM has taken over.
    let files: Vec<OwnedFd> = match given.collect() {
        Ok(files) => files,
        Err(error) => return error,
    };
    let numbers = files.iter().map(|file| file.as_raw_fd().to_string());
    let numbers: Vec<_> = numbers.collect();
    let given_fds = (!files.is_empty()).then(|| format!("--given-fds={}", numbers.join(",")));
    let open = || -> io::Result<(Stdio, Stdio)> { Ok((input(&vmm.stdin)?, output(&vmm.stdout)?)) };
    let (stdin, stdout) = match open() {
        Ok(streams) => streams,
        Err(error) => return format!("Can't open the console's streams: {error}").into(),
    };
    let error = Command::new(&vmm.program)
        .arg("run")
        .arg("--config")
        .arg(&vmm.config)
        // What the daemon removes when the container is deleted the VMM can't touch from inside.
        .args(["--sandbox", "--leave-folder"])
        .args(given_fds)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("EDGEVMM_RUNTIME_DIR", &vmm.machines)
        .stdin(stdin)
        .stdout(stdout)
        .exec();
    format!("Can't start {}: {error}", vmm.program.display()).into()
}

/// Becomes a program for a client; returns only why not.
fn become_tool(tool: &Tool) -> Failure {
    let open = || -> io::Result<(Stdio, Stdio, Stdio)> {
        let Some(terminal) = &tool.terminal else {
            let streams = (end_of(&tool.stdout)?, end_of(&tool.stderr)?);
            return Ok((Stdio::inherit(), streams.0, streams.1));
        };
        // The first terminal that a session's leader opens is the one it is controlled by.
        let terminal = OpenOptions::new().read(true).write(true).open(terminal)?;
        let (stdout, stderr) = (terminal.try_clone()?, terminal.try_clone()?);
        Ok((terminal.into(), stdout.into(), stderr.into()))
    };
    let (stdin, stdout, stderr) = match open() {
        Ok(streams) => streams,
        Err(error) => return format!("Can't open the program's streams: {error}").into(),
    };
    let environment = tool.environment.iter().map(|(name, value)| (name, value));
    let error = Command::new(&tool.program)
        .arg0(&tool.name)
        .args(&tool.arguments)
        .env_clear()
        .envs(environment)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .exec();
    format!("Can't start {}: {error}", tool.program.display()).into()
}

/// The end of a FIFO that a client reads; whoever writes there learns that it has left.
fn end_of(path: &PathBuf) -> io::Result<Stdio> {
    if path.as_os_str().is_empty() {
        return Ok(Stdio::null());
    }
    Ok(OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)?
        .into())
}

/// A FIFO is opened for both directions: then it never ends while others come and go.
///
/// # Errors
///
/// When it can't be opened.
pub fn input(path: &Path) -> io::Result<Stdio> {
    if path.as_os_str().is_empty() {
        return Ok(Stdio::null());
    }
    Ok(OpenOptions::new().read(true).write(true).open(path)?.into())
}

/// As [`input`]: who writes while the reader is gone for a while gets no error. Files grow.
///
/// # Errors
///
/// When it can't be opened.
pub fn output(path: &Path) -> io::Result<Stdio> {
    if path.as_os_str().is_empty() {
        return Ok(Stdio::null());
    }
    let mut options = OpenOptions::new();
    Ok(options
        .read(true)
        .append(true)
        .create(true)
        .open(path)?
        .into())
}
