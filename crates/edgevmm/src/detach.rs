//! Running a machine in the background.
//!
//! The parent takes the machine's name, starts this program again as the VMM and hands it the
//! lock, so that the name is never free in between. The configuration goes through the child's
//! standard input. The child reports through a pipe that its guest runs, or why not.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::Context;
use edgevmm_api::{MachineClaim, MachineDir};
use edgevmm_config::VmConfig;
use edgevmm_sandbox::{close_inherited, namespaces};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

use crate::cli::VmmArgs;
use crate::doctor;
use crate::exit::{self, Failure, Outcome};
use crate::launch::{begin_sandbox, claim, failure};
use crate::messages;
use crate::term;

/// Environment variable with the log filter, for the child.
pub const LOG_VARIABLE: &str = "EDGEVMM_LOG";
/// Most bytes of a report.
const MAX_REPORT: u64 = 64 << 10;
/// Lines of the log to show when a VMM ends without a report.
const LOG_LINES: usize = 5;

/// Starts a machine in the background, waits until its guest runs, and prints its name.
///
/// # Errors
///
/// When it can't be started, with the child's words.
pub fn run(mut vm: VmConfig, log_filter: &str, sandbox: bool) -> Outcome {
    doctor::warn_of_software_backend();
    let claim = claim(&mut vm)?;
    let dir = claim.dir().clone();
    match start(&vm, &claim, log_filter, sandbox) {
        Ok(()) => {
            println!("{}", dir.name());
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            // The child is gone or going; whoever is last finds nothing to remove.
            let _ = claim.remove();
            Err(failure)
        }
    }
}

fn start(
    vm: &VmConfig,
    claim: &MachineClaim,
    log_filter: &str,
    sandbox: bool,
) -> Result<(), Failure> {
    let config = serde_json::to_vec(vm).context("Can't write the configuration as JSON")?;
    let (report, ready) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context("Can't make a pipe")?;
    let mut child = spawn(claim, &ready, log_filter, sandbox)?;
    drop(ready);
    if let Some(mut stdin) = child.stdin.take() {
        // A child that doesn't read has something to report.
        let _ = stdin.write_all(&config);
    }
    let mut text = String::new();
    let read = File::from(report)
        .take(MAX_REPORT)
        .read_to_string(&mut text);
    read.context("Can't read the report of the VMM")?;
    match serde_json::from_str::<Option<Failure>>(&text) {
        Ok(None) => Ok(()),
        Ok(Some(failure)) => Err(failure),
        Err(_) => Err(died(child, claim.dir())),
    }
}

fn spawn(
    claim: &MachineClaim,
    ready: &OwnedFd,
    log_filter: &str,
    sandbox: bool,
) -> anyhow::Result<Child> {
    let path = claim.dir().log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path);
    let log = log.with_context(|| format!("Can't write {}", path.display()))?;
    // No other thread of this process could start another program meanwhile.
    for fd in [claim.lock().as_fd(), ready.as_fd()] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).context("Can't hand on a file descriptor")?;
    }
    if sandbox {
        // Where the host does not allow it, the VMM says so.
        namespaces::for_next_child();
    }
    Command::new("/proc/self/exe")
        .arg("__vmm")
        .arg("--dir")
        .arg(claim.dir().path())
        .args(["--lock-fd", &claim.lock().as_raw_fd().to_string()])
        .args(["--ready-fd", &ready.as_raw_fd().to_string()])
        .args(sandbox.then_some("--sandbox"))
        .env(LOG_VARIABLE, log_filter)
        .stdin(Stdio::piped())
        .stdout(log.try_clone().context("Can't share the log")?)
        .stderr(log)
        .spawn()
        .context("Can't start the VMM's process")
}

/// Says how a VMM ended that left no report.
fn died(mut child: Child, dir: &MachineDir) -> Failure {
    let status = child
        .wait()
        .map_or_else(|error| error.to_string(), |status| status.to_string());
    let log = std::fs::read_to_string(dir.log()).unwrap_or_default();
    let lines: Vec<_> = log.lines().rev().take(LOG_LINES).collect();
    let lines: Vec<_> = lines.into_iter().rev().collect();
    Failure::host(anyhow::anyhow!(
        "The VMM ended before its guest ran: {status}"
    ))
    .hint(format!("its last messages were: {}", lines.join(" | ")))
}

/// Is the VMM of a detached machine.
///
/// # Errors
///
/// When the machine can't be started; the parent has told that already.
pub fn vmm(args: &VmmArgs) -> Outcome {
    if args.lock_fd == args.ready_fd {
        return Err(Failure::usage(anyhow::anyhow!(
            "The file descriptors are the same"
        )));
    }
    let lock = inherited(args.lock_fd).context("The lock was not handed on")?;
    let ready = inherited(args.ready_fd).context("The pipe was not handed on")?;
    let mut ready = Some(File::from(ready));
    if args.sandbox {
        let keep = [args.lock_fd, args.ready_fd];
        close_inherited(&keep).context("Can't tell which files are open")?;
        begin_sandbox()?;
    }
    messages::go_to_background().context("Can't write messages in the background")?;
    let claim =
        MachineClaim::inherit(&args.dir, lock, namespaces::host_pid()).map_err(Failure::host)?;
    let result = live(&claim, &mut ready);
    if let Err(failure) = &result {
        give_up(claim, ready, failure);
    }
    result
}

/// Leaves nothing of a machine that did not start. One that did, whose parent has let it go, keeps
/// its folder: the log there is where `failure` is told.
fn give_up(claim: MachineClaim, mut ready: Option<File>, failure: &Failure) {
    if ready.is_some() {
        let _ = report(&mut ready, Some(failure));
        let _ = claim.remove();
    }
}

fn live(claim: &MachineClaim, ready: &mut Option<File>) -> Outcome {
    // Away from the terminal that this was started from, and from the folder too.
    nix::unistd::setsid().context("Can't leave the terminal")?;
    let vm = VmConfig::from_json(io::stdin().lock()).context("Can't read the configuration")?;
    std::env::set_current_dir("/").context("Can't change to /")?;
    let result = edgevmm_vmm::run(&vm, claim, |started| {
        if let Some(note) = &started.boot_note {
            term::notice(note);
        }
        report(ready, None)
    });
    let record = result.map_err(failure)?;
    if let Err(error) = std::fs::remove_file(claim.dir().socket()) {
        tracing::debug!(%error, "Can't remove the socket");
    }
    Ok(exit::report(claim.dir().name(), &record))
}

/// Tells the parent how the start went, and lets it go.
fn report(ready: &mut Option<File>, failure: Option<&Failure>) -> io::Result<()> {
    if let Some(pipe) = ready {
        serde_json::to_writer(pipe, &failure)?;
    }
    // The parent reads to the end, which comes when the last descriptor of the pipe is closed.
    *ready = None;
    Ok(())
}

/// Takes a file descriptor that the parent handed on, and hands it on no further.
///
/// # Errors
///
/// When none was handed on by that number.
pub fn inherited(fd: i32) -> anyhow::Result<OwnedFd> {
    anyhow::ensure!(fd > 2, "{fd} is a standard stream");
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}"))
        .with_context(|| format!("The file descriptor {fd} is not open"))?;
    // SAFETY: it is open, and as nothing here opens files before this, it comes from the parent
    // and has no other owner. Each number is taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use edgevmm_api::RuntimeDir;

    use super::*;

    /// Gives up, after telling that the guest runs if it `started`. Returns what the parent reads,
    /// and whether the folder is still there.
    fn give_up_after(started: bool) -> (String, bool) {
        let folder = tempfile::tempdir().unwrap();
        let claim = RuntimeDir::new(folder.path()).claim("vm").unwrap();
        let (parent, ready) = nix::unistd::pipe().unwrap();
        let mut ready = Some(File::from(ready));
        if started {
            report(&mut ready, None).unwrap();
        }
        give_up(claim, ready, &Failure::host(anyhow::anyhow!("late")));
        let mut text = String::new();
        File::from(parent).read_to_string(&mut text).unwrap();
        (text, folder.path().join("vm").exists())
    }

    #[test]
    fn only_a_machine_that_never_ran_is_removed() {
        let (text, kept) = give_up_after(false);
        assert!(text.contains("late") && !kept, "{text}");
        assert_eq!(give_up_after(true), ("null".to_owned(), true));
    }
}
