//! The nested-KVM lab: an L1 Linux with a working `/dev/kvm` inside QEMU's emulated SVM.
//!
//! For hosts without a KVM that runs stock kernels (most CI machines, containers, laptops inside
//! VMs). L1 was booted once and saved; each [`Lab`] is a copy-on-write clone of it that resumes in
//! about a second and is thrown away at the end. In L1, `/host` is this system's root (read-only),
//! `/share` a directory both sides write to, `/` and `/tmp` are in RAM.
//!
//! ```no_run
//! use xtask::lab::{Command, Lab};
//! let lab = Lab::start()?;
//! assert!(lab.run(&Command::new("test").args(["-c", "/dev/kvm"]))?.success());
//! # anyhow::Ok(())
//! ```

mod client;
mod patch;
pub(crate) mod protocol;
mod qemu;
mod qmp;
mod root;
mod setup;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::DirLock;
use crate::progress::note;
use client::Client;
use protocol::Spawn;
use qemu::{Start, Vm};

pub use client::{MachineEnded, Output, Running, TimedOut};
pub use protocol::WindowSize;
pub use qemu::Machine;
pub use setup::{Layout, setup, setup_tools};

/// How long L1 may take to answer, try by try: booted or resumed it takes 20 s on a busy machine.
///
/// Emulation now and then loses a timer interrupt of one of L1's processors for good, or makes its
/// kernel panic, while L1 starts. A new start is all that helps.
const ANSWER_TIMEOUTS: [Duration; 3] = [
    Duration::from_secs(90),
    Duration::from_secs(120),
    Duration::from_secs(240),
];

/// The files of a snapshot: L1's RAM, and its devices' state.
const RAM: &str = "ram";
const STATE: &str = "state";

/// What a lab is started with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The shape of L1; another than the default is booted cold, which takes about ten seconds.
    pub machine: Machine,
    /// The directory L1 sees at `/share`; by default one in the lab's directory.
    pub share: Option<PathBuf>,
    /// Which saved L1 it is.
    pub snapshot: Snapshot,
}

/// What a [`Lab`] has to do with snapshots, which are directories.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Snapshot {
    /// The lab's own, which has nothing but the booted system, where L1 has the default shape.
    #[default]
    Lab,
    /// One made by [`Lab::save`] of an L1 with the same shape.
    Of(PathBuf),
    /// Boots cold, so that [`Lab::save`] can make one in this directory.
    New(PathBuf),
}

/// A command for L1, built like [`std::process::Command`].
#[derive(Debug, Clone)]
pub struct Command {
    spawn: Spawn,
    input: Vec<u8>,
    timeout: Option<Duration>,
    stream: bool,
}

impl Command {
    /// A command that runs `program`, looked up in L1's `PATH`, in `/root`.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        let spawn = Spawn {
            argv: vec![program.into()],
            env: Vec::new(),
            cwd: "/root".to_owned(),
            terminal: None,
        };
        Self {
            spawn,
            input: Vec::new(),
            timeout: None,
            stream: false,
        }
    }

    /// A command that runs `script` by L1's `bash`.
    #[must_use]
    pub fn script(script: impl Into<String>) -> Self {
        Self::new("bash").args(["-c".to_owned(), script.into()])
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.spawn.argv.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.spawn
            .argv
            .extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.spawn.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<String>) -> Self {
        self.spawn.cwd = dir.into();
        self
    }

    /// What [`Lab::run`] gives it on stdin; nothing by default.
    #[must_use]
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// How long [`Lab::run`] lets it run; for ever by default.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Gives it a terminal, on which stdout and stderr become one.
    #[must_use]
    pub fn terminal(mut self, size: WindowSize) -> Self {
        self.spawn.terminal = Some(size);
        self
    }

    /// Lets its output appear on this process's stdout and stderr as it comes, instead of keeping
    /// it.
    #[must_use]
    pub fn stream(mut self) -> Self {
        self.stream = true;
        self
    }
}

/// A running L1. Dropping it throws it away.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: the connection first.
    client: Arc<Client>,
    vm: Vm,
}

impl Lab {
    /// Resumes a clone of the saved L1.
    ///
    /// # Errors
    /// The lab was not set up, or L1 does not answer.
    pub fn start() -> Result<Self> {
        Self::start_with(&Options::default())
    }

    /// Starts an L1 of a given shape.
    ///
    /// # Errors
    /// The lab was not set up, or L1 does not answer.
    pub fn start_with(options: &Options) -> Result<Self> {
        let layout = Layout::of_this_user();
        // Until QEMU has its files open, nobody may replace them.
        let _lock = DirLock::shared(layout.dir())?;
        ensure!(
            layout.is_ready()?,
            "The lab in {} is not set up, or by an older recipe. Run: cargo xtask lab setup",
            layout.dir().display()
        );
        let share = options.share.clone().unwrap_or_else(|| layout.share());
        let share = std::path::absolute(share)?;
        let machine = &options.machine;
        let (vm, client) = boot(|timeout| match &options.snapshot {
            Snapshot::Lab if *machine == Machine::default() => {
                resume(&layout, machine, &layout.snapshot(), &share, timeout)
            }
            Snapshot::Of(snapshot) => resume(&layout, machine, snapshot, &share, timeout),
            Snapshot::Lab => cold(&layout, machine, Start::Cold, &share, timeout),
            Snapshot::New(dir) => {
                let ram = dir.join(RAM);
                cold(&layout, machine, Start::Recorded(&ram), &share, timeout)
            }
        })?;
        Ok(Self { client, vm })
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// It cannot be started, L1 ends, or its time is over ([`TimedOut`] is then in the chain).
    /// An exit code other than 0 is not an error.
    pub fn run(&self, command: &Command) -> Result<Output> {
        let running = self.spawn(command)?;
        // A command may end without reading all it was given.
        let _ = running
            .write(&command.input)
            .and_then(|()| running.close_stdin());
        self.wait(&running, command.timeout)
    }

    /// [`Running::wait`], with the machine's last words when it is the machine that ended.
    ///
    /// # Errors
    /// As [`Running::wait`].
    pub fn wait(&self, running: &Running, timeout: Option<Duration>) -> Result<Output> {
        running.wait(timeout).map_err(|error| self.explained(error))
    }

    /// Starts a command; its stdin stays open. Many may run at once.
    ///
    /// # Errors
    /// L1 ended.
    pub fn spawn(&self, command: &Command) -> Result<Running> {
        let spawned = self.client.spawn(&command.spawn, command.stream);
        spawned.map_err(|error| self.explained(error))
    }

    /// Copies a file of this system into L1, where its directory is made, with its mode.
    ///
    /// # Errors
    /// Either side cannot read or write it.
    pub fn put(&self, from: &Path, to: &str) -> Result<()> {
        let from = std::path::absolute(from)?;
        let inside = format!("/host{}", from.display());
        let script = r#"mkdir -p -- "$(dirname -- "$2")" && cp --dereference -- "$1" "$2""#;
        self.copy(script, &inside, to)
            .with_context(|| format!("Cannot put {} to {to} in L1", from.display()))
    }

    /// Writes a file in L1, making its directory.
    ///
    /// # Errors
    /// L1 cannot write it.
    pub fn write(&self, to: &str, content: impl Into<Vec<u8>>) -> Result<()> {
        let script = r#"mkdir -p -- "$(dirname -- "$1")" && cat > "$1""#;
        let command = Command::new("sh")
            .args(["-c", script, "sh", to])
            .stdin(content);
        let output = self.run(&command)?;
        ensure!(
            output.success(),
            "Cannot write {to} in L1: {}",
            output.stderr
        );
        Ok(())
    }

    /// Copies a file of L1 to this system.
    ///
    /// # Errors
    /// Either side cannot read or write it.
    pub fn get(&self, from: &str, to: &Path) -> Result<()> {
        let running = self.spawn(&Command::new("cat").args(["--", from]))?;
        let output = running
            .wait_raw(None)
            .map_err(|error| self.explained(error))?;
        let problem = String::from_utf8_lossy(&output.stderr);
        ensure!(output.code == 0, "Cannot get {from} from L1: {problem}");
        std::fs::write(to, output.stdout).with_context(|| format!("Cannot write {}", to.display()))
    }

    /// Halts it for good and completes the snapshot that it was started for ([`Snapshot::New`]),
    /// which goes on from here. Nothing in L1 may use `/host` or `/share` any more; all else may run.
    ///
    /// # Errors
    /// It was not started for that, something uses these, or L1 ends.
    pub fn save(&self, dir: &Path) -> Result<()> {
        ensure!(dir.join(RAM).exists(), "The machine can't be saved there");
        let settle =
            "umount /host /share && sync && echo 3 > /proc/sys/vm/drop_caches && sleep 0.5";
        let output = self.run(&Command::script(settle).timeout(Duration::from_secs(60)))?;
        ensure!(output.success(), "L1 can't be saved: {}", output.stderr);
        qemu::save(&mut self.vm.qmp()?, &dir.join(STATE))
    }

    fn copy(&self, script: &str, from: &str, to: &str) -> Result<()> {
        let output = self.run(&Command::new("sh").args(["-c", script, "sh", from, to]))?;
        if output.success() {
            Ok(())
        } else {
            bail!("{}", output.stderr.trim())
        }
    }

    fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        if error.is::<MachineEnded>() {
            error.context(self.vm.last_words())
        } else {
            error
        }
    }
}

/// A machine that was just started, and how greeting its agent went.
type Started = (Vm, Result<Arc<Client>>);

/// Starts an L1, and another one when it fails in a way that only this start did.
fn boot(start: impl Fn(Duration) -> Result<Started>) -> Result<(Vm, Arc<Client>)> {
    let mut timeouts = ANSWER_TIMEOUTS.into_iter().peekable();
    while let Some(timeout) = timeouts.next() {
        match start(timeout)? {
            (vm, Ok(client)) => return Ok((vm, client)),
            (vm, Err(error)) => {
                let error = error.context(vm.explain("L1 does not start"));
                // QEMU that ends by itself, without a panic, would do so again.
                if timeouts.peek().is_none() || (vm.has_ended() && !vm.has_panicked()) {
                    return Err(error);
                }
                note(&format!("{error:#}\nStarting another L1"));
            }
        }
    }
    bail!("L1 was never started")
}

fn cold(
    layout: &Layout,
    machine: &Machine,
    start: Start<'_>,
    share: &Path,
    timeout: Duration,
) -> Result<Started> {
    let vm = Vm::spawn(layout, machine, start, share)?;
    let client = Client::connect(vm.connect("agent")?, true, timeout, || !vm.has_ended());
    Ok((vm, client))
}

fn resume(
    layout: &Layout,
    machine: &Machine,
    snapshot: &Path,
    share: &Path,
    timeout: Duration,
) -> Result<Started> {
    let vm = Vm::spawn(layout, machine, Start::Resumed(snapshot), share)?;
    qemu::resume(&mut vm.qmp()?, &snapshot.join(STATE))?;
    let client = Client::connect(vm.connect("agent")?, true, timeout, || !vm.has_ended());
    Ok((vm, client))
}
