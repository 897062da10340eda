//! `cargo xtask run`: from a fresh checkout to a booted distribution.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xtask::images::{Image, Images};
use xtask::kvm::{self, KvmVerdict};
use xtask::lab::Layout;
use xtask::progress::note;

use super::{build, lab};

/// What a login prompt ends with.
const PROMPT: &[u8] = b"login: ";

/// How long a machine gets to end after it was asked to.
const GRACE: Duration = Duration::from_secs(30);

/// Build edgevmm, make a Debian 12 disk image and boot it with its console on this terminal.
///
/// The image is left untouched (`--snapshot`). Log in as root with password root. Where this host's
/// KVM cannot run stock kernels, the same binary runs inside the nested-KVM lab, which is slower.
/// When stdin is not a terminal, this ends once the login prompt is there.
#[derive(Debug, Args)]
pub struct RunCommand {
    /// Further arguments for `edgevmm run`, such as --cpus 2.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    arguments: Vec<String>,
}

impl RunCommand {
    /// Builds, makes and boots.
    ///
    /// # Errors
    /// A step fails; a machine that ends badly is an exit code, not an error.
    pub fn run(&self) -> Result<ExitCode> {
        let binary = build::release_binary()?;
        let images = Images::of_this_user();
        images.ensure(Image::Debian12)?;
        let mut command = match kvm::host_kvm_runs_stock_kernels() {
            KvmVerdict::Usable => natively(&binary, &images.debian12()),
            verdict => {
                note(&format!(
                    "{verdict}; running edgevmm inside the nested-KVM lab instead"
                ));
                lab::ensure_lab(&Layout::of_this_user())?;
                in_lab(&binary, &images.debian12())?
            }
        };
        command.args(&self.arguments);
        note("booting Debian 12; user root, password root; leave by Ctrl-A x or poweroff");
        if io::stdin().is_terminal() {
            let status = command.status().context("Cannot start edgevmm")?;
            return Ok(ExitCode::from(exit_code(status.code())));
        }
        until_prompt(command)
    }
}

fn natively(binary: &Path, image: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["run", "--snapshot"]).arg(image);
    command
}

/// The same in the lab; the image is copied into its RAM, where reading it is fast.
fn in_lab(binary: &Path, image: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("Cannot find this program")?);
    command.arg("lab");
    for (from, to) in [(binary, "/tmp/edgevmm"), (image, "/tmp/debian12.qcow2")] {
        command.arg("--put").arg(format!("{}:{to}", from.display()));
    }
    command.args([
        "--",
        "/tmp/edgevmm",
        "run",
        "--snapshot",
        "/tmp/debian12.qcow2",
    ]);
    Ok(command)
}

fn until_prompt(mut command: Command) -> Result<ExitCode> {
    // A pipe that stays open: the console's end of input would say nothing about the machine.
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start edgevmm")?;
    let mut output = child.stdout.take().context("edgevmm has no output")?;
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = output.read(&mut buffer)?;
        let bytes = buffer.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(ExitCode::from(exit_code(child.wait()?.code())));
        }
        let _ = io::stdout()
            .write_all(bytes)
            .and_then(|()| io::stdout().flush());
        seen.extend_from_slice(bytes);
        if seen.windows(PROMPT.len()).any(|window| window == PROMPT) {
            println!();
            note("the login prompt is there; stopping, as stdin is not a terminal");
            // The console goes on while the machine shuts down.
            std::thread::spawn(move || io::copy(&mut output, &mut io::sink()));
            stop(&mut child)?;
            return Ok(ExitCode::SUCCESS);
        }
        seen.drain(..seen.len().saturating_sub(PROMPT.len()));
    }
}

fn stop(child: &mut Child) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn exit_code(code: Option<i32>) -> u8 {
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255)
}
