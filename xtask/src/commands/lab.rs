//! `cargo xtask lab`: set the lab up, or run a command in it.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, SetArg, Termios};
use xtask::lab::{self, Command, Lab, Layout, Machine, Options, Running, WindowSize};
use xtask::progress::note;

/// Run a command in the nested-KVM lab: a Linux with a real /dev/kvm inside an emulated machine.
///
/// The lab is made at first use (about a minute, 1.2 GB in ~/.cache/edgevmm/lab or $EDGEVMM_LAB); then
/// each command gets a fresh clone in about a second, which is thrown away at the end. The exit code
/// is the command's. Inside, /host is this system's root (read-only), /share a directory shared with
/// it, and the command starts in this directory as seen below /host. The emulated machine is slow:
/// copy what you run to /tmp (--put) when its timing matters.
///
///   cargo xtask lab -- bash                        look around
///   cargo xtask lab -- ls -l /dev/kvm              one command
///   cargo xtask lab -- - < script.sh               a script
///   cargo xtask lab --put disk.qcow2:/tmp/d -- qemu-img info /tmp/d
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub struct LabCommand {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the lab, or bring it up to date; does nothing when there is nothing to do.
    Setup,
    /// Run a command in the lab; the same as `lab` without a subcommand.
    Run(RunArgs),
    /// Print where the lab is and whether it is set up.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// vCPUs of the lab's machine; other than 4 means a cold boot of about 10 s.
    #[arg(long, default_value_t = Machine::default().cpus)]
    smp: u8,
    /// RAM of the lab's machine in MiB; other than 4096 means a cold boot of about 10 s.
    #[arg(long, value_name = "MIB", default_value_t = Machine::default().memory_mib)]
    mem: u32,
    /// A further disk (/dev/vdb, …), such as file=PATH,format=raw; means a cold boot.
    #[arg(long, value_name = "OPTIONS")]
    drive: Vec<String>,
    /// End the command after so many seconds, with exit code 124.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The directory shared with the lab as /share.
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Copy a file into the lab first.
    #[arg(long, value_name = "HERE:THERE", value_parser = parse_pair)]
    put: Vec<(String, String)>,
    /// Copy a file out of the lab afterwards, however the command ended.
    #[arg(long, value_name = "THERE:HERE", value_parser = parse_pair)]
    get: Vec<(String, String)>,
    /// The command and its arguments; `-` reads a script from stdin.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (from, to) = text
        .split_once(':')
        .ok_or("expected two paths with ':' between them")?;
    Ok((from.to_owned(), to.to_owned()))
}

impl LabCommand {
    /// Sets up, shows or runs.
    ///
    /// # Errors
    /// The lab cannot be made or started.
    pub fn run(self) -> Result<ExitCode> {
        let layout = Layout::of_this_user();
        match self.action {
            Some(Action::Setup) => {
                ensure_lab(&layout)?;
                note(&format!("the lab in {} is ready", layout.dir().display()));
                Ok(ExitCode::SUCCESS)
            }
            Some(Action::Status { json }) => status(&layout, json),
            Some(Action::Run(run)) => run.run(&layout),
            None => self.run.run(&layout),
        }
    }
}

/// Makes the lab unless it is ready.
///
/// # Errors
/// The lab cannot be made.
pub fn ensure_lab(layout: &Layout) -> Result<()> {
    if layout.is_ready()? {
        return Ok(());
    }
    lab::setup(
        layout,
        &std::env::current_exe().context("Cannot find this program")?,
    )
}

fn status(layout: &Layout, json: bool) -> Result<ExitCode> {
    let (dir, ready) = (layout.dir().display(), layout.is_ready()?);
    if json {
        println!(
            "{}",
            serde_json::json!({ "directory": dir.to_string(), "ready": ready })
        );
    } else {
        println!(
            "{dir}: {}",
            if ready {
                "ready"
            } else {
                "not set up (cargo xtask lab setup)"
            }
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl RunArgs {
    fn run(self, layout: &Layout) -> Result<ExitCode> {
        ensure!(
            !self.command.is_empty(),
            "No command was given. Try: cargo xtask lab -- bash (or --help)"
        );
        ensure_lab(layout)?;
        // Blocked before any thread starts, so that only the one that waits for it gets it.
        window_changes().thread_block()?;
        let machine = Machine {
            cpus: self.smp,
            memory_mib: self.mem,
            drives: self.drive,
        };
        let lab = Lab::start_with(&Options {
            machine,
            share: self.share,
            ..Options::default()
        })?;
        for (from, to) in &self.put {
            lab.put(Path::new(from), to)?;
        }
        let code = attend(&lab, &self.command, self.timeout.map(Duration::from_secs))?;
        for (from, to) in &self.get {
            lab.get(from, Path::new(to))?;
        }
        Ok(ExitCode::from(code))
    }
}

/// Runs a command with this process's stdin, stdout and stderr, or with a terminal like this one.
///
/// # Errors
/// The command cannot be started, or L1 ends.
pub fn attend(lab: &Lab, argv: &[String], timeout: Option<Duration>) -> Result<u8> {
    let script = [String::from("bash"), String::from("-s")];
    let argv = if argv == ["-"] { &script } else { argv };
    let (program, arguments) = argv.split_first().context("No command was given")?;
    let here = std::env::current_dir().unwrap_or_default();
    let mut command = Command::new(program)
        .args(arguments)
        .cwd(format!("/host{}", here.display()))
        .stream();
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    if interactive {
        let term = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
        command = command.env("TERM", term).terminal(window_size());
    }
    let running = Arc::new(lab.spawn(&command)?);
    let _raw = interactive.then(RawTerminal::enter).transpose()?;
    let reader = Arc::clone(&running);
    std::thread::spawn(move || forward_stdin(&reader));
    if interactive {
        let watcher = Arc::clone(&running);
        std::thread::spawn(move || {
            while window_changes().wait().is_ok() && watcher.resize(window_size()).is_ok() {}
        });
    }
    match lab.wait(&running, timeout) {
        Ok(output) => Ok(u8::try_from(output.code).unwrap_or(255)),
        Err(error) if error.is::<lab::TimedOut>() => {
            running.signal(libc::SIGKILL)?;
            note("the command took too long and was ended");
            Ok(124)
        }
        Err(error) => Err(error),
    }
}

fn forward_stdin(running: &Running) {
    let mut buffer = [0; 4096];
    loop {
        match io::stdin().read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) if running.write(&buffer[..count]).is_err() => return,
            Ok(_) => {}
        }
    }
    let _ = running.close_stdin();
}

fn window_changes() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGWINCH);
    signals
}

fn window_size() -> WindowSize {
    nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);
    let mut size = libc::winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, which lives through the call.
    let _ = unsafe { get_window_size(libc::STDOUT_FILENO, &raw mut size) };
    WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    }
}

/// The terminal in raw mode, put back when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
