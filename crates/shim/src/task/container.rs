//! One container: the sandbox of a pod, or a machine.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::sync::watch;
use tokio::time::timeout;

use super::exec::Execs;
use super::spawn::{Spawned, Tail};
use super::state::{Action, Stage, State};
use crate::cgroup::Cgroup;
use crate::holder;
use crate::machine::guest_memory;
use crate::process::Process;
use crate::proto::task::CreateRequest;
use crate::record::Record;
use crate::spec::Resources;
use crate::stats;
use crate::ttrpc::{CallError, Code};
use crate::vmm::Vmm;

/// Exit status of what was ended by SIGKILL.
const KILLED: u32 = 137;
/// How long a VMM may take to press the power button.
const HEED: Duration = Duration::from_secs(5);
/// Signals that do nothing to a process which does not expect them.
const HARMLESS: [i32; 5] = [
    0,
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
];

/// A machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its VMM.
    pub vmm: Vmm,
    /// Its memory in bytes.
    pub memory: u64,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// What it was made from.
    pub request: CreateRequest,
    /// What it has on the host.
    pub record: Record,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its process.
    pub process: Process,
    /// The machine; a sandbox has none.
    pub machine: Option<Machine>,
    /// What its process says.
    pub tail: Tail,
    /// How its process ended.
    pub exited: watch::Receiver<Option<u32>>,
    /// Starts it.
    stdin: Mutex<Option<ChildStdin>>,
    /// Its state.
    pub stage: Stage,
    /// Programs that clients run in it.
    pub execs: Execs,
    /// How many of those the kernel ended for want of memory.
    victims: AtomicU64,
    /// Keeps an ordinary container's input open while its clients come and go.
    input: Mutex<Option<OwnedFd>>,
    /// Held by whoever changes the state, but for the end of the process.
    pub changes: tokio::sync::Mutex<()>,
}

impl Container {
    /// A container whose process is `spawned`, and whose `input` is kept open if it is an ordinary one.
    pub fn new(
        request: CreateRequest,
        record: Record,
        cgroup: Cgroup,
        machine: Option<Machine>,
        spawned: Spawned,
        input: Option<OwnedFd>,
    ) -> Self {
        Self {
            request,
            record,
            cgroup,
            machine,
            process: spawned.process,
            tail: spawned.tail,
            exited: spawned.exited,
            stdin: Mutex::new(Some(spawned.stdin)),
            stage: Stage::default(),
            execs: Execs::default(),
            victims: AtomicU64::default(),
            input: Mutex::new(input),
            changes: tokio::sync::Mutex::default(),
        }
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.stage.get()
    }

    /// Notes how a program of a client's ended. It may have been a victim where memory ran out, which is
    /// counted for the whole control group.
    pub fn note_end(&self, status: u32) {
        let victims = self.victims.load(Ordering::Relaxed);
        if status == KILLED && stats::oom_kills(&self.cgroup) > victims {
            self.victims.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether the container itself, which has ended so, was a victim where memory ran out.
    pub fn is_victim(&self, status: u32) -> bool {
        status == KILLED && stats::oom_kills(&self.cgroup) > self.victims.load(Ordering::Relaxed)
    }

    /// An ordinary container's input ends behind what is under way. A console's stays open for whoever
    /// attaches next.
    pub fn close_input(&self) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        drop(input.take());
    }

    /// Lets it run.
    ///
    /// # Errors
    ///
    /// When it is not in a state for it, or its VMM ends. Then its process is ended.
    pub async fn start(&self) -> Result<(), CallError> {
        self.state().allows(Action::Start)?;
        if let Some(machine) = &self.machine {
            let stdin = self
                .stdin
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(mut stdin) = stdin {
                // An error means that the process has ended, which is seen next.
                let word = format!("{}\n", holder::START);
                let _ = stdin.write_all(word.as_bytes()).await;
            }
            if !machine.vmm.started(self.exited.clone()).await {
                self.process.kill();
                let text = self.tail.text("the VMM ended without a word");
                return Err(CallError::new(Code::Unknown, text));
            }
        }
        if let Some(runc) = &self.record.runc
            && let Err(error) = runc.start().await
        {
            self.process.kill();
            return Err(CallError::new(Code::Unknown, error.to_string()));
        }
        self.stage.set(State::Running);
        Ok(())
    }

    /// Sends it a signal. SIGKILL ends a machine, all others that would end a process press its
    /// power button.
    ///
    /// # Errors
    ///
    /// When it has ended, or its VMM can't be told.
    pub async fn kill(&self, signal: u32) -> Result<(), CallError> {
        let state = self.state();
        state.allows(Action::Control)?;
        let signal = i32::try_from(signal).unwrap_or(i32::MAX);
        if let Some(runc) = &self.record.runc {
            let told = runc.kill(signal).await;
            return told.map_err(|error| match self.process.is_alive() {
                true => CallError::new(Code::Unknown, error.to_string()),
                false => CallError::new(Code::NotFound, "The container's process has ended"),
            });
        }
        if HARMLESS.contains(&signal) {
            return Ok(());
        }
        if !(1..=64).contains(&signal) {
            let message = format!("There is no signal {signal}");
            return Err(CallError::new(Code::InvalidArgument, message));
        }
        match &self.machine {
            Some(machine) if signal != libc::SIGKILL && state != State::Created => {
                self.power_off(machine).await
            }
            None if signal == libc::SIGTERM && self.process.is_alive() => {
                let pid = Pid::from_raw(self.process.pid);
                kill(pid, Signal::SIGTERM)
                    .map_err(|error| CallError::new(Code::Unknown, error.to_string()))
            }
            _ => {
                self.process.kill();
                Ok(())
            }
        }
    }

    /// Presses a machine's power button. A VMM that does not answer is taken for a process that heeds
    /// no signal, as whoever stops it would else never come to SIGKILL.
    async fn power_off(&self, machine: &Machine) -> Result<(), CallError> {
        let told = timeout(HEED, machine.vmm.power_off()).await;
        if !matches!(told, Ok(Ok(()))) && !self.process.is_alive() {
            return Err(CallError::new(Code::NotFound, "The machine has ended"));
        }
        Ok(())
    }

    /// The machine, for what nothing else can do.
    ///
    /// # Errors
    ///
    /// When there is none, or `action` does not fit its state.
    pub fn machine(&self, action: Action) -> Result<&Machine, CallError> {
        self.state().allows(action)?;
        self.machine.as_ref().ok_or_else(|| {
            let message = "Only a machine can do this; it is none";
            CallError::new(Code::Unimplemented, message)
        })
    }

    /// Changes its limits. A guest never loses memory that it may use: under a smaller limit it is
    /// asked to do with less, and the group's limit stays. Returns what there is to tell of it.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub async fn update(&self, mut resources: Resources) -> Result<Vec<String>, CallError> {
        self.state().allows(Action::Control)?;
        let mut notes = Vec::new();
        if let (Some(machine), Some(limit)) = (&self.machine, resources.memory.bytes()) {
            let left = guest_memory(limit);
            if let Err(error) = machine.vmm.set_memory(left).await {
                notes.push(format!("The guest's memory stays as it is: {error}"));
            }
            if left < machine.memory {
                resources.memory.limit = None;
                notes.push(format!(
                    "A memory limit of {limit} bytes is less than the machine was made with: the \
                     guest is asked to do with less, and the limit stays"
                ));
            }
        }
        self.cgroup.limit(&resources, |warning| notes.push(warning));
        Ok(notes)
    }
}
