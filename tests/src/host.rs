//! The machine `edgevmm` runs on.

use std::fmt;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;
use xtask::kvm::{KvmVerdict, host_kvm_runs_stock_kernels};
use xtask::lab::{self, Lab, Machine, Options, Snapshot, TimedOut};

use crate::command::{Command, Output, TERMINAL};
use crate::process::Process;
use crate::slots::Slot;
use crate::{binary, native, prepare};

/// The tests' directory in the lab's machine, which is in its RAM.
const LAB_DIR: &str = "/tmp/e2e";

/// How long something may take before the test fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// A command of the host or the guest.
    Command,
    /// A small guest's start, or much data through a device.
    Boot,
    /// A distribution's start or end.
    Distribution,
}

/// A machine that runs `edgevmm`. Dropping it ends all guests and removes all files.
#[derive(Debug)]
pub struct Host {
    place: Place,
    dir: String,
    edgevmm: String,
}

#[derive(Debug)]
enum Place {
    Native(#[expect(dead_code, reason = "removed when dropped")] TempDir),
    Lab(
        Lab,
        #[expect(dead_code, reason = "given back when dropped")] Slot,
    ),
}

impl Host {
    /// This machine where its KVM boots stock kernels, else the lab.
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(&Machine::default())
    }

    /// As [`Host::start`], but this machine only when this is root.
    pub(crate) fn start_as_root() -> Result<Self> {
        if nix::unistd::geteuid().is_root() {
            Self::start()
        } else {
            Self::lab(&Machine::default())
        }
    }

    /// As [`Host::start`], with a lab of that shape.
    pub(crate) fn start_with(machine: &Machine) -> Result<Self> {
        match host_kvm_runs_stock_kernels() {
            KvmVerdict::Usable => Self::this_machine(),
            _ => Self::lab(machine),
        }
    }

    /// This machine, whatever its KVM can do.
    pub(crate) fn this_machine() -> Result<Self> {
        // Not below a home directory: paths of sockets have to be short.
        let dir = tempfile::Builder::new().prefix("evm-").tempdir_in("/tmp")?;
        let host = Self {
            dir: text(dir.path())?,
            place: Place::Native(dir),
            edgevmm: text(&binary::edgevmm()?)?,
        };
        fs::create_dir(host.path("run"))?;
        Ok(host)
    }

    /// A lab, whatever this machine's KVM can do.
    pub(crate) fn lab(machine: &Machine) -> Result<Self> {
        let machine = machine.clone();
        let host = Self::start_lab(&Options {
            machine,
            ..Options::default()
        })?;
        host.put_programs()?;
        Ok(host)
    }

    /// A lab as it was saved.
    pub(crate) fn resumed(machine: &Machine, snapshot: &Path) -> Result<Self> {
        let host = Self::start_lab(&Options {
            machine: machine.clone(),
            snapshot: Snapshot::Of(snapshot.to_owned()),
            ..Options::default()
        })?;
        host.put_programs()?;
        Ok(host)
    }

    /// Has `prepare` make of a lab what is then saved. It gets no `edgevmm`.
    pub(crate) fn save(
        machine: &Machine,
        snapshot: &Path,
        prepare: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        let host = Self::start_lab(&Options {
            machine: machine.clone(),
            snapshot: Snapshot::New(snapshot.to_owned()),
            ..Options::default()
        })?;
        if let Err(error) = prepare(&host) {
            host.print_machines();
            return Err(error);
        }
        match host.place {
            Place::Lab(ref lab, _) => lab.save(snapshot),
            Place::Native(_) => Ok(()),
        }
    }

    fn start_lab(options: &Options) -> Result<Self> {
        prepare::lab()?;
        let slot = Slot::take()?;
        let lab = Lab::start_with(options)?;
        let host = Self {
            place: Place::Lab(lab, slot),
            dir: LAB_DIR.to_owned(),
            edgevmm: format!("{LAB_DIR}/edgevmm"),
        };
        host.ok(&Command::new("mkdir").args(["-p", &host.path("run")]))?;
        Ok(host)
    }

    fn put_programs(&self) -> Result<()> {
        let binary = binary::edgevmm()?;
        self.copy(&binary, "edgevmm")?;
        for beside in [binary::FIRMWARE, binary::SHIM] {
            let file = binary.with_file_name(beside);
            if file.exists() {
                self.copy(&file, beside)?;
            }
        }
        Ok(())
    }

    /// Whether it is this machine.
    #[must_use]
    pub(crate) const fn is_this_machine(&self) -> bool {
        matches!(self.place, Place::Native(_))
    }

    /// The path of a file in the test's directory, which is the working directory of all commands.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// The path at which the host has a file of this machine, for reading it.
    ///
    /// # Errors
    /// The path is not UTF-8.
    pub fn shared(&self, file: &Path) -> Result<String> {
        let file = std::path::absolute(file)?;
        match &self.place {
            Place::Native(_) => text(&file),
            Place::Lab(..) => Ok(format!("/host{}", text(&file)?)),
        }
    }

    /// Copies a file of this machine into the test's directory.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn copy(&self, file: &Path, name: &str) -> Result<String> {
        let to = self.path(name);
        match &self.place {
            Place::Native(_) => {
                let copied = fs::copy(file, &to);
                copied.with_context(|| format!("Cannot copy {}", file.display()))?;
            }
            Place::Lab(lab, _) => lab.put(file, &to)?,
        }
        Ok(to)
    }

    /// Writes a file in the test's directory.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, name: &str, content: &str) -> Result<String> {
        let to = self.path(name);
        match &self.place {
            Place::Native(_) => fs::write(&to, content)?,
            Place::Lab(lab, _) => lab.write(&to, content)?,
        }
        Ok(to)
    }

    /// As [`Host::write`], for what is no text.
    pub(crate) fn write_bytes(&self, name: &str, content: Vec<u8>) -> Result<()> {
        let to = self.path(name);
        match &self.place {
            Place::Native(_) => Ok(fs::write(to, content)?),
            Place::Lab(lab, _) => lab.write(&to, content),
        }
    }

    /// The path of a busybox with all applets.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn busybox(&self) -> Result<String> {
        self.shared(&prepare::busybox()?)
    }

    /// The path of the boot firmware beside `edgevmm`.
    #[must_use]
    pub fn fast_firmware(&self) -> String {
        let firmware = Path::new(&self.edgevmm).with_file_name(binary::FIRMWARE);
        firmware.display().to_string()
    }

    /// The folder of `edgevmm`, and of containerd's shim.
    #[must_use]
    pub fn programs(&self) -> &str {
        let folder = self.edgevmm.rsplit_once('/');
        folder.map_or(".", |(folder, _)| folder)
    }

    /// A call of `edgevmm`, whose machines are this test's own.
    #[must_use]
    pub fn edgevmm<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(&*self.edgevmm)
            .args(arguments)
            .env("EDGEVMM_RUNTIME_DIR", self.path("run"))
    }

    /// Runs a command to its end, with nothing on its stdin.
    ///
    /// # Errors
    /// It cannot be started or takes longer than [`Limit::Boot`].
    pub fn run(&self, command: &Command) -> Result<Output> {
        self.run_for(command, Limit::Boot)
    }

    /// Runs a command that may take so long.
    ///
    /// # Errors
    /// It cannot be started or takes longer.
    pub fn run_for(&self, command: &Command, limit: Limit) -> Result<Output> {
        let name = shown(command);
        let timeout = self.limit(limit);
        let start = Instant::now();
        let output = match &self.place {
            Place::Native(_) => {
                let running = self.spawn_natively(command)?;
                running.close_stdin();
                running.wait(timeout)
            }
            Place::Lab(lab, _) => lab.run(&self.for_lab(command).timeout(timeout)).map(
                |lab::Output {
                     code,
                     stdout,
                     stderr,
                 }| Output {
                    code,
                    stdout,
                    stderr,
                },
            ),
        };
        let output = output.with_context(|| format!("While running `{name}`"))?;
        let seconds = start.elapsed().as_secs_f32();
        let said = [&output.stdout, &output.stderr].map(|it| tail(it.trim_end(), 2000).to_owned());
        eprintln!(
            "+ {name} -> {} ({seconds:.1} s)\n{}",
            output.code,
            said.join("\n").trim()
        );
        Ok(output)
    }

    /// Runs a command that must succeed, and gives its stdout without white space around it.
    ///
    /// # Errors
    /// It fails.
    pub fn ok(&self, command: &Command) -> Result<String> {
        let output = self.run(command)?;
        let stdout = output.expect_code(0);
        Ok(stdout.with_context(|| shown(command))?.to_owned())
    }

    /// Starts a command.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: &Command) -> Result<Process<'_>> {
        let name = shown(command);
        eprintln!("+ {name} &");
        match &self.place {
            Place::Native(_) => Ok(Process::native(name, self.spawn_natively(command)?)),
            Place::Lab(lab, _) => {
                let running = lab.spawn(&self.for_lab(command))?;
                Ok(Process::in_lab(name, lab, running))
            }
        }
    }

    /// The hash of a file's content.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sha256(&self, path: &str) -> Result<String> {
        let line = self.ok(&Command::new("sha256sum").args([path]))?;
        let hash = line.split_whitespace().next();
        Ok(hash.context("sha256sum says nothing")?.to_owned())
    }

    /// A TCP port nobody has.
    ///
    /// # Errors
    /// There is none.
    pub fn free_port(&self) -> Result<u16> {
        Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
    }

    /// How long something may take here.
    #[must_use]
    pub const fn limit(&self, limit: Limit) -> Duration {
        let native = matches!(self.place, Place::Native(_));
        Duration::from_secs(match (limit, native) {
            (Limit::Command, true) => 30,
            (Limit::Boot, true) => 90,
            (Limit::Distribution, true) => 240,
            (Limit::Command, false) => 240,
            (Limit::Boot, false) => 480,
            (Limit::Distribution, false) => 1200,
        })
    }

    /// Whether the lab's machine ended by itself: it takes no command any more. One that is only
    /// too slow is not taken for ended, as a guest may be to blame for that.
    pub(crate) fn is_broken(&self) -> bool {
        match &self.place {
            Place::Native(_) => false,
            Place::Lab(lab, _) => lab
                .run(&lab::Command::new("true").timeout(Duration::from_secs(60)))
                .is_err_and(|error| !error.is::<TimedOut>()),
        }
    }

    /// Prints what the machines and other programs in the background left behind.
    pub(crate) fn print_machines(&self) {
        let script = "shopt -s nullglob; tail -n 40 run/*/log run/*/exit.json *.log < /dev/null";
        let _ = self.run_for(&Command::script(script), Limit::Command);
    }

    fn spawn_natively(&self, command: &Command) -> Result<native::Running> {
        let (program, arguments) = command.argv.split_first().context("No program")?;
        let mut native = std::process::Command::new(program);
        native.args(arguments).current_dir(&self.dir);
        native.envs(command.env.iter().map(|(name, value)| (name, value)));
        native::Running::spawn(&mut native, command.terminal)
    }

    fn for_lab(&self, command: &Command) -> lab::Command {
        let mut argv = command.argv.iter().cloned();
        let program = argv.next().unwrap_or_default();
        let inside = lab::Command::new(program).args(argv).cwd(&*self.dir);
        let inside = command
            .env
            .iter()
            .fold(inside, |inside, (name, value)| inside.env(name, value));
        if command.terminal {
            inside.terminal(TERMINAL)
        } else {
            inside
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !matches!(self.place, Place::Native(_)) {
            return;
        }
        let machines = fs::read_dir(self.path("run"))
            .into_iter()
            .flatten()
            .flatten();
        let names: Vec<_> = machines
            .filter_map(|machine| machine.file_name().into_string().ok())
            .collect();
        if !names.is_empty() {
            let rm = self.edgevmm(["rm", "--force"]).args(names);
            let _ = self.run_for(&rm, Limit::Command);
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.place {
            Place::Native(_) => "this machine",
            Place::Lab(..) => "a machine of the lab",
        })
    }
}

fn text(path: &Path) -> Result<String> {
    let text = PathBuf::from(path).into_os_string().into_string().ok();
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}

fn shown(command: &Command) -> String {
    command.argv.join(" ")
}

/// The last `length` bytes of a text, or a little less.
pub(crate) fn tail(text: &str, length: usize) -> &str {
    let mut start = text.len().saturating_sub(length);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default()
}
