//! Commands on machines that are there: through their API, and through their folders when they
//! have ended.

mod channels;
mod list;
mod memory;

use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use edgevmm_api::files::HandedFile;
use edgevmm_api::v1::{
    ChangeMediumRequest, GetVersionRequest, KillRequest, PauseRequest, ResetRequest,
    ResizeDiskRequest, ResumeRequest, StopRequest, WaitRequest,
};
use edgevmm_api::{Client, ConnectError, ExitRecord, MachineDir, RuntimeDir, RuntimeDirError};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::{Code, Status};

use crate::cli::{MediaArgs, ResizeDiskArgs, RmArgs, StopArgs};
use crate::exit::{self, Failure, Outcome};

pub use list::{inspect, ps};
pub use memory::memory;

/// How long a living VMM may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an ended VMM may take to leave.
pub const LEAVE: Duration = Duration::from_secs(5);
/// How long a VMM that was told to end may take for it, as it writes out what its guest wrote.
const FLUSH: Duration = Duration::from_secs(60);
/// When waiting for it is worth a message.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often is looked whether it has.
const POLL: Duration = Duration::from_millis(20);

/// Finds a machine, living or ended.
fn open(name: &str) -> Result<MachineDir, Failure> {
    let runtime = RuntimeDir::from_env().map_err(Failure::host)?;
    runtime.open(name).map_err(|error| match error {
        RuntimeDirError::NotFound { .. } | RuntimeDirError::Name(_) => Failure::usage(error),
        error => Failure::host(error),
    })
}

/// Connects to a living machine.
///
/// # Errors
///
/// When it isn't there, has ended or doesn't answer.
pub async fn connect(name: &str) -> Result<(MachineDir, Client), Failure> {
    reach(name, edgevmm_api::connect).await
}

/// As [`connect`], to the part of the API that `connect` is for.
///
/// # Errors
///
/// As [`connect`].
pub async fn reach<T>(
    name: &str,
    connect: impl AsyncFnOnce(&Path) -> Result<T, ConnectError>,
) -> Result<(MachineDir, T), Failure> {
    let dir = open(name)?;
    if !dir.is_alive().map_err(Failure::host)? {
        return Err(
            Failure::usage(anyhow!("Machine {name} has ended")).hint(format!(
                "`edgevmm inspect {name}` tells how, `edgevmm rm {name}` removes it"
            )),
        );
    }
    let client = tokio::time::timeout(ANSWER, connect(&dir.socket())).await;
    let no_answer = || Failure::host(anyhow!("Machine {name} does not answer"));
    let hint = format!("it may still be starting; `edgevmm kill {name}` ends it");
    match client {
        Ok(Ok(client)) => Ok((dir, client)),
        Ok(Err(error)) => Err(Failure::host(error).hint(hint)),
        Err(_) => Err(no_answer().hint(hint)),
    }
}

/// Makes a failure of a refused call.
fn refused(action: &str, name: &str, status: &Status) -> Failure {
    let error = anyhow!("Can't {action} {name}: {}", status.message());
    match status.code() {
        Code::InvalidArgument | Code::NotFound => Failure::usage(error),
        _ => Failure::host(error),
    }
}

/// Does something to each of some machines, all of them also when one fails.
async fn for_each<F>(names: &[String], mut action: impl FnMut(String) -> F) -> Outcome
where
    F: Future<Output = Outcome>,
{
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match action(name.clone()).await {
            Ok(ExitCode::SUCCESS) => println!("{name}"),
            Ok(other) => code = other,
            Err(failure) => {
                eprintln!("{failure}");
                code = failure.exit_code();
            }
        }
    }
    Ok(code)
}

/// Implements a command that is one call.
macro_rules! call {
    ($(#[$doc:meta])* $command:ident, $request:expr) => {
        $(#[$doc])*
        pub async fn $command(names: &[String]) -> Outcome {
            for_each(names, async |name| {
                let (_, mut client) = connect(&name).await?;
                let answer = client.$command($request).await;
                answer.map_err(|status| refused(stringify!($command), &name, &status))?;
                Ok(ExitCode::SUCCESS)
            })
            .await
        }
    };
}

call!(
    /// Halts vCPUs.
    pause, PauseRequest {}
);
call!(
    /// Lets vCPUs go on.
    resume, ResumeRequest {}
);
call!(
    /// Resets machines.
    reset, ResetRequest {}
);

/// Makes a disk larger.
///
/// # Errors
///
/// When there is no such machine or disk, or the disk can't become that large.
pub async fn resize_disk(args: &ResizeDiskArgs) -> Outcome {
    let (_, mut client) = connect(&args.name).await?;
    let request = ResizeDiskRequest {
        disk: args.disk.clone(),
        size: args.size.0,
    };
    let answer = client.resize_disk(request).await;
    answer.map_err(|status| refused("resize a disk of", &args.name, &status))?;
    Ok(ExitCode::SUCCESS)
}

/// Changes what is in a CD-ROM drive.
///
/// # Errors
///
/// When there is no such machine, drive or image, or the guest has locked the drive.
pub async fn media(args: &MediaArgs) -> Outcome {
    let path = match &args.path {
        None => String::new(),
        Some(path) => {
            let path = std::path::absolute(path).context("Can't tell the current folder")?;
            let path = path.into_os_string().into_string();
            let unfit = |path| anyhow!("the path {} is no UTF-8", Path::new(&path).display());
            path.map_err(|path| Failure::usage(unfit(path)))?
        }
    };
    let (dir, mut client) = connect(&args.name).await?;
    let image = args.path.as_deref();
    let handed = image.map(|image| hand_over(&dir, image)).transpose()?;
    let request = ChangeMediumRequest {
        drive: args.drive.clone(),
        path,
        force: args.force,
        file: handed.as_ref().map_or(0, HandedFile::number),
    };
    let answer = client.change_medium(request).await;
    answer.map_err(|status| refused("change the medium of", &args.name, &status))?;
    Ok(ExitCode::SUCCESS)
}

/// Hands a file to a VMM, to be read.
fn hand_over(dir: &MachineDir, path: &Path) -> Result<HandedFile, Failure> {
    let file = edgevmm_block::open_path(path, false).map_err(Failure::host)?;
    let name = dir.name();
    let handed = HandedFile::new(&dir.files_socket(), &file);
    let handed = handed.with_context(|| format!("Can't hand {} to {name}", path.display()))?;
    Ok(handed)
}

/// Presses power buttons and waits for the ends.
///
/// # Errors
///
/// Tells failures as they come; the exit code is that of the last.
pub async fn stop(args: &StopArgs) -> Outcome {
    for_each(&args.names, async |name| {
        let (dir, mut client) = connect(&name).await?;
        let timeout = args
            .timeout
            .map(|seconds| Duration::from_secs(seconds.into()));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        let mut waiter = client.clone();
        let mut end = pin!(ended(&dir, &mut waiter));
        // Asked first for how the machine ends: between two calls it may end and its VMM leave.
        let record = tokio::select! {
            biased;
            record = &mut end => record?,
            answer = client.stop(StopRequest { timeout }) => match answer {
                Err(status) if status.code() != Code::Unavailable => {
                    return Err(refused("stop", &name, &status));
                }
                // When it is no longer there to be stopped, it has ended.
                Ok(_) | Err(_) => end.await?,
            },
        };
        Ok(exit::report(&name, &record))
    })
    .await
}

/// Ends machines by force; by a signal to the VMM when it doesn't answer.
///
/// # Errors
///
/// Tells failures as they come; the exit code is that of the last.
pub async fn kill_all(names: &[String]) -> Outcome {
    for_each(names, async |name| {
        force_end(&name).await?;
        Ok(ExitCode::SUCCESS)
    })
    .await
}

async fn force_end(name: &str) -> Result<(), Failure> {
    let dir = open(name)?;
    let told = match connect(name).await {
        Ok((_, client)) => tell_to_end(client).await,
        Err(failure) if !dir.is_alive().map_err(Failure::host)? => return Err(failure),
        Err(_) => false,
    };
    if told {
        if left(&dir, PATIENCE).await? {
            return Ok(());
        }
        eprintln!("edgevmm: waiting for {name} to write to its disks what is not there yet");
        if left(&dir, FLUSH).await? {
            return Ok(());
        }
        eprintln!(
            "edgevmm: {name} has not ended within {} seconds and gets SIGKILL: what its guest \
             wrote last may be lost",
            FLUSH.as_secs()
        );
    } else {
        tracing::info!("The VMM of {name} does not answer, so it gets SIGKILL");
    }
    sigkill(&dir).await
}

/// Tells a VMM to end by force. False when it doesn't answer.
async fn tell_to_end(mut client: Client) -> bool {
    let version = tokio::time::timeout(ANSWER, client.get_version(GetVersionRequest {}));
    if !matches!(version.await, Ok(Ok(_))) {
        return false;
    }
    // It may be too busy with ending to answer this one, or be gone.
    let _ = tokio::time::timeout(ANSWER, client.kill(KillRequest {})).await;
    true
}

/// Has the kernel end a VMM.
async fn sigkill(dir: &MachineDir) -> Result<(), Failure> {
    let name = dir.name();
    let pid = dir.pid().map_err(Failure::host)?;
    let sent = match pid {
        Some(pid) => kill(Pid::from_raw(pid), Signal::SIGKILL),
        None => Err(Errno::ESRCH),
    };
    if left(dir, LEAVE).await? {
        return Ok(());
    }
    Err(match sent {
        Ok(()) => Failure::host(anyhow!("The VMM of {name} has not ended after SIGKILL"))
            .hint("it can't end before the host's storage answers: see `dmesg`"),
        Err(error) => Failure::host(anyhow!("Can't kill the VMM of {name}: {error}")),
    })
}

/// Waits until the VMM has left. False when it takes longer than `limit`.
///
/// # Errors
///
/// When its folder can't be looked at.
pub async fn left(dir: &MachineDir, limit: Duration) -> Result<bool, Failure> {
    for _ in 0..limit.as_millis() / POLL.as_millis() {
        if !dir.is_alive().map_err(Failure::host)? {
            return Ok(true);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(false)
}

/// Waits for the end of a machine and of its VMM.
async fn ended(dir: &MachineDir, client: &mut Client) -> Result<ExitRecord, Failure> {
    let record = match client.wait(WaitRequest {}).await {
        Ok(answer) => answer.into_inner().exit.map(ExitRecord::from),
        // The VMM may leave before its answer comes through.
        Err(status)
            if matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled
            ) =>
        {
            None
        }
        Err(status) => return Err(refused("wait for", dir.name(), &status)),
    };
    left(dir, LEAVE).await?;
    let record = record.or_else(|| dir.exit().ok().flatten());
    record.ok_or_else(|| lost(dir))
}

/// The failure of a VMM that left no word.
fn lost(dir: &MachineDir) -> Failure {
    let name = dir.name();
    if !dir.path().exists() {
        // One in the foreground takes its folder with it.
        return Failure::host(anyhow!(
            "{name} has ended, and nothing is left that tells how"
        ))
        .hint("machines that run with --detach leave a record of their end");
    }
    Failure::host(anyhow!("The VMM of {name} died without a word"))
        .hint(format!("`edgevmm logs {name}` shows its last messages"))
}

/// Waits for the end of a machine and gives the exit code for it.
///
/// # Errors
///
/// When there is no machine, or nobody knows how it ended.
pub async fn wait(name: &str) -> Outcome {
    let dir = open(name)?;
    let record = if dir.is_alive().map_err(Failure::host)? {
        let (dir, mut client) = connect(name).await?;
        ended(&dir, &mut client).await?
    } else {
        dir.exit()
            .map_err(Failure::host)?
            .ok_or_else(|| lost(&dir))?
    };
    println!("{}", exit::words(record.reason));
    Ok(exit::code(record.reason))
}

/// Removes what ended machines left.
///
/// # Errors
///
/// Tells failures as they come; the exit code is that of the last.
pub async fn rm(args: &RmArgs) -> Outcome {
    for_each(&args.names, async |name| {
        let dir = open(&name)?;
        if args.force && dir.is_alive().map_err(Failure::host)? {
            force_end(&name).await?;
        }
        let sockets = channels::of(&dir);
        match dir.remove() {
            // A machine in the foreground removes its folder itself.
            Ok(()) | Err(RuntimeDirError::NotFound { .. }) => {
                channels::remove(&sockets);
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => Err(Failure::usage(error)),
        }
    })
    .await
}

/// Shows the messages of a detached VMM.
///
/// # Errors
///
/// When there are none.
pub fn logs(name: &str) -> Outcome {
    let dir = open(name)?;
    match std::fs::File::open(dir.log()) {
        Ok(mut log) => {
            let copied = std::io::copy(&mut log, &mut std::io::stdout());
            copied.map_err(|error| Failure::host(anyhow!(error).context("Can't copy the log")))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(_) => Err(Failure::usage(anyhow!("Machine {name} has no log"))
            .hint("only machines that were started with --detach have one")),
    }
}
