//! Running a machine in this process, with the console on the terminal if it is to be there.

use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use edgevmm_api::{MachineClaim, RuntimeDir, RuntimeDirError};
use edgevmm_config::{ConsoleOutput, VmConfig};
use edgevmm_vmm::boot::BootError;
use edgevmm_vmm::channel::ChannelError;
use edgevmm_vmm::console::ends;
use edgevmm_vmm::lifecycle::Handle;
use edgevmm_vmm::machine::{BuildError, NetworkError, StorageError};
use edgevmm_vmm::service::{Resizer, resize};
use edgevmm_vmm::{Started, VmmError};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::detach::inherited;
use crate::doctor;
use crate::escape::{Escape, Typed};
use crate::exit::{self, Failure, Outcome};
use crate::janitor::Janitor;
use crate::messages;
use crate::resolve::default_name;
use crate::term::{self, RawMode, Stream};

/// How long the last output may take to go out when the guest has ended.
const DRAIN: Duration = Duration::from_secs(2);

/// Takes the machine's name, and writes it into the configuration.
///
/// # Errors
///
/// When the name is taken or no folder can be made.
pub fn claim(vm: &mut VmConfig) -> Result<MachineClaim, Failure> {
    let runtime = RuntimeDir::from_env().map_err(Failure::host)?;
    let claim = match &vm.name {
        Some(name) => runtime.claim(name),
        None => runtime.claim_unique(&default_name(vm)),
    };
    let claim = claim.map_err(|error| match error {
        RuntimeDirError::NameInUse { .. } | RuntimeDirError::Name(_) => Failure::usage(error),
        error => Failure::host(error),
    })?;
    vm.name = Some(claim.dir().name().to_owned());
    Ok(claim)
}

/// The sandbox of a machine in the foreground.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// Descriptors by which the machine names files, and which are handed down for that.
    pub given: Vec<RawFd>,
    /// Whether whoever started this process removes the machine's folder.
    pub leave_folder: bool,
}

/// Who removes a machine's folder at its end.
#[derive(Debug)]
enum Remover {
    Itself,
    Janitor(Janitor),
    Parent,
}

/// Runs a machine to its end in the foreground. Nothing of it is left then, but for a folder that is
/// left to the parent.
///
/// # Errors
///
/// When it can't be started.
pub fn foreground(mut vm: VmConfig, sandbox: Option<Sandbox>) -> Outcome {
    let mut given = Vec::new();
    if let Some(sandbox) = &sandbox {
        given = take_given(&sandbox.given)?;
    } else {
        messages_in_background()?;
    }
    let mut claim = claim(&mut vm)?;
    let mut remover = Remover::Itself;
    if let Some(sandbox) = sandbox {
        if sandbox.leave_folder {
            remover = Remover::Parent;
        } else {
            let sockets: Vec<_> = vm.channels.iter().map(|it| it.socket.clone()).collect();
            let started = Janitor::start(claim, &sockets).context("Can't start a process")?;
            (remover, claim) = (Remover::Janitor(started.0), started.1);
        }
        // Until then there may be one thread only.
        begin_sandbox()?;
        messages_in_background()?;
    }
    doctor::warn_of_software_backend();
    let result = run_on_terminal(&vm, &claim, given);
    let name = claim.dir().name().to_owned();
    match remover {
        Remover::Janitor(janitor) => janitor.finish(),
        Remover::Parent => {}
        Remover::Itself => {
            if let Err(error) = claim.remove() {
                tracing::warn!("{:#}", anyhow::Error::from(error));
            }
        }
    }
    Ok(exit::report(&name, &result.map_err(failure)?))
}

/// Takes over the descriptors that were handed down on purpose, and closes all others.
fn take_given(given: &[RawFd]) -> Result<Vec<OwnedFd>, Failure> {
    let mut given = given.to_vec();
    given.sort_unstable();
    given.dedup();
    edgevmm_sandbox::close_inherited(&given).context("Can't tell which files are open")?;
    let taken: anyhow::Result<Vec<_>> = given.into_iter().map(inherited).collect();
    Ok(taken.context("A file was not handed on")?)
}

fn messages_in_background() -> anyhow::Result<()> {
    messages::go_to_background().context("Can't write messages in the background")
}

/// Begins the sandbox of this process, which is to be a VMM and has one thread.
///
/// # Errors
///
/// When no thread can be started.
pub fn begin_sandbox() -> Result<(), Failure> {
    let settings = edgevmm_sandbox::Settings {
        ids: None,
        ioctls: edgevmm_vmm::confinement::ioctls,
    };
    edgevmm_sandbox::begin(&settings).map_err(Failure::host)
}

/// The failure of a VMM.
pub fn failure(error: VmmError) -> Failure {
    match &error {
        VmmError::Build(
            BuildError::Boot(
                BootError::UnknownKernel(_)
                | BootError::KernelTooLong(_)
                | BootError::NoRoom(_)
                | BootError::CommandLine { .. }
                | BootError::NotFirmware { .. }
                | BootError::NotVars(_)
                | BootError::KeepsNoVars(_)
                | BootError::FirmwareSize { .. },
            )
            | BuildError::Network(NetworkError::Ipv6 { .. })
            | BuildError::Storage(StorageError::NoOverlay(_) | StorageError::OverlaySize { .. })
            | BuildError::Channel(ChannelError::InUse { .. } | ChannelError::Exists { .. })
            | BuildError::Slots
            | BuildError::Topology(_),
        ) => Failure::usage(error),
        VmmError::Build(BuildError::Kvm(_)) => {
            Failure::host(error).hint("`edgevmm doctor` checks what this host has and lacks")
        }
        _ => Failure::host(error),
    }
}

fn run_on_terminal(
    vm: &VmConfig,
    claim: &MachineClaim,
    given: Vec<OwnedFd>,
) -> Result<edgevmm_api::ExitRecord, VmmError> {
    let mut terminal = None;
    let result = edgevmm_vmm::run(vm, claim, |started| {
        // What the machine needs of them it has opened.
        drop(given);
        if let Some(note) = &started.boot_note {
            term::notice(note);
        }
        if let Some(path) = &started.console_pty {
            term::notice(&format!("the console is at {}", path.display()));
        }
        if vm.console.output == ConsoleOutput::Stdio {
            terminal = Some(Terminal::attach(started)?);
        }
        Ok(())
    });
    if let Some(terminal) = terminal {
        terminal.detach();
    }
    result
}

/// The user's side of the console.
#[derive(Debug)]
struct Terminal {
    raw: Option<RawMode>,
    output: JoinHandle<()>,
}

impl Terminal {
    fn attach(started: Started) -> io::Result<Self> {
        let Started {
            handle,
            console,
            resizer,
            ..
        } = started;
        let stdin = Stream::stdin()?;
        let raw = RawMode::enter()?;
        if let Some(resizer) = resizer {
            let changes = signal(SignalKind::window_change())?;
            tokio::spawn(follow_size(changes, resizer));
        }
        let output = ends::copy_output(&console, Stream::stdout()?).map_err(io::Error::other)?;
        if raw.is_some() {
            term::notice("Ctrl-A x powers the machine off, Ctrl-A h shows help");
            let keyboard = Keyboard::new(stdin, handle);
            ends::copy_input(&console, keyboard).map_err(io::Error::other)?;
        } else {
            ends::copy_input(&console, stdin).map_err(io::Error::other)?;
        }
        Ok(Self { raw, output })
    }

    /// Lets the last output go out, unless nobody takes it, and gives the terminal back.
    fn detach(self) {
        let deadline = Instant::now() + DRAIN;
        while !self.output.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(raw) = self.raw {
            drop(raw);
            // The guest rarely ends on a line of its own.
            term::tell("");
        }
    }
}

/// Tells the guest the terminal's size, now and after each change.
async fn follow_size(mut changes: Signal, resizer: Resizer) {
    loop {
        if let Some(size) = term::size() {
            resize(&resizer, size);
        }
        if changes.recv().await.is_none() {
            return;
        }
    }
}

/// A terminal's input without the commands in it, which it carries out.
#[derive(Debug)]
struct Keyboard {
    stdin: Stream,
    handle: Handle,
    escape: Escape,
    quits: u32,
    /// Bytes that didn't fit the last reader's buffer.
    rest: Vec<u8>,
}

const HELP: &str = "Ctrl-A x: press the power button; again: end the machine by force. \
                    Ctrl-A Ctrl-A: type Ctrl-A";

impl Keyboard {
    fn new(stdin: Stream, handle: Handle) -> Self {
        Self {
            stdin,
            handle,
            escape: Escape::default(),
            quits: 0,
            rest: Vec::new(),
        }
    }

    fn quit(&mut self) {
        self.quits += 1;
        if self.quits == 1 {
            term::notice("pressing the power button; Ctrl-A x again ends the machine by force");
            self.handle.request_stop(None);
        } else {
            self.handle.request_kill();
        }
    }
}

impl Read for Keyboard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            let mut bytes = [0; 256];
            let length = self.stdin.read(&mut bytes)?;
            if length == 0 {
                return Ok(0);
            }
            for typed in self.escape.feed(bytes.get(..length).unwrap_or_default()) {
                match typed {
                    Typed::Input(input) => self.rest.extend(input),
                    Typed::Quit => self.quit(),
                    Typed::Help => term::notice(HELP),
                }
            }
        }
        let length = self.rest.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(self.rest.drain(..length)) {
            *to = from;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_configuration_is_wrong_usage() {
        let boot = |error| VmmError::Build(BuildError::Boot(error));
        let kernel = || boot(BootError::UnknownKernel("kernel".into()));
        assert_eq!(failure(kernel()), Failure::usage(kernel()));
        let slots = || VmmError::Build(BuildError::Slots);
        assert_eq!(failure(slots()), Failure::usage(slots()));
        let missing = || {
            boot(BootError::NoFirmware {
                what: "BIOS image",
                path: "bios".into(),
                package: "seabios",
            })
        };
        assert_eq!(failure(missing()), Failure::host(missing()));
    }
}
