//! Starts the process of a container and follows it to its end.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};
use tokio::sync::watch;

use super::log::Log;
use super::processes;
use crate::holder::{Plan, READY};
use crate::process::Process;
use crate::ttrpc::{CallError, Code};

/// Bytes kept of the newest messages.
const MAX_TAIL: usize = 2048;
/// Longest line of a message; longer ones are cut up.
const MAX_LINE: u64 = 4096;
/// Bytes of messages that are taken within a [`SPAN`]: a VMM that was taken over could write without end.
const MAX_IN_SPAN: u64 = 64 << 10;
/// How long the writer of more than that waits at most.
const SPAN: Duration = Duration::from_secs(10);
/// How long the last messages of a process that has ended may take.
const DRAIN: Duration = Duration::from_millis(500);

/// The newest messages of a process.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<String>>);

impl Tail {
    /// As one line, or `default` when there are none.
    pub fn text(&self, default: &str) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = tail.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.is_empty() {
            default.to_owned()
        } else {
            text
        }
    }

    fn push(&self, line: &str) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.push_str(line);
        let excess = tail.len().saturating_sub(MAX_TAIL);
        let cut = (excess..tail.len()).find(|at| tail.is_char_boundary(*at));
        tail.drain(..cut.unwrap_or(0));
    }
}

/// How much of a process's messages is taken.
#[derive(Debug)]
struct Allowance {
    since: Instant,
    left: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            left: MAX_IN_SPAN,
        }
    }

    /// Counts what was taken. Gives the time until which nothing more is.
    fn spend(&mut self, bytes: u64, now: Instant) -> Option<Instant> {
        if now.saturating_duration_since(self.since) >= SPAN {
            *self = Self::new(now);
        }
        self.left = self.left.saturating_sub(bytes);
        (self.left == 0).then(|| self.since + SPAN)
    }
}

/// A container's process.
#[derive(Debug)]
pub struct Spawned {
    /// Tells it what to do.
    pub stdin: ChildStdin,
    /// Which it is.
    pub process: Process,
    /// Its exit status, once it has ended.
    pub exited: watch::Receiver<Option<u32>>,
    /// What it says.
    pub tail: Tail,
}

/// Starts the holder of a container, and returns once it is where `plan` says.
///
/// # Errors
///
/// When it can't get there.
pub async fn spawn(plan: &Plan, log: Log) -> Result<Spawned, CallError> {
    let failed = |error: io::Error| {
        let message = format!("Can't start a process for the container: {error}");
        CallError::new(Code::Unknown, message)
    };
    // By this name it is the same program also after the file was replaced.
    let mut command = Command::new("/proc/self/exe");
    let command = command
        .arg("hold")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut start = || command.spawn();
    let child = match plan.vmm {
        Some(_) => processes::in_own(start),
        None => start(),
    };
    let mut child = child.map_err(failed)?;
    let no_pipe = || failed(io::ErrorKind::BrokenPipe.into());
    let mut stdin = child.stdin.take().ok_or_else(no_pipe)?;
    let stdout = child.stdout.take().ok_or_else(no_pipe)?;
    let stderr = child.stderr.take().ok_or_else(no_pipe)?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let process = pid.and_then(Process::find);
    let tail = Tail::default();
    let (sender, exited) = watch::channel(None);
    tokio::spawn(follow(child, stderr, tail.clone(), log, sender));

    let mut line = serde_json::to_vec(plan).unwrap_or_default();
    line.push(b'\n');
    let mut answer = String::new();
    let asked = async {
        stdin.write_all(&line).await?;
        let mut answers = BufReader::with_capacity(64, stdout.take(64));
        answers.read_line(&mut answer).await
    };
    // What it does not say, its messages tell.
    let _ = asked.await;
    match process {
        Some(process) if answer.trim_end() == READY => Ok(Spawned {
            stdin,
            process,
            exited,
            tail,
        }),
        _ => {
            drop(stdin);
            let mut exited = exited;
            let _ = tokio::time::timeout(DRAIN, exited.wait_for(Option::is_some)).await;
            let text = tail.text("the process for the container ended");
            Err(CallError::new(Code::Unknown, text))
        }
    }
}

/// Follows a process to its end, and then tells how it ended.
async fn follow(
    mut child: Child,
    stderr: ChildStderr,
    tail: Tail,
    log: Log,
    exited: watch::Sender<Option<u32>>,
) {
    let messages = tokio::spawn(follow_messages(stderr, tail, log));
    let status = child.wait().await;
    let _ = tokio::time::timeout(DRAIN, messages).await;
    let status = status.map_or(255, exit_status);
    let _ = exited.send(Some(status));
}

async fn follow_messages(stderr: ChildStderr, tail: Tail, log: Log) {
    let mut reader = BufReader::with_capacity(512, stderr);
    let mut line = Vec::new();
    let mut allowance = Allowance::new(Instant::now());
    loop {
        line.clear();
        match (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        tail.push(&text);
        log.say(text.trim_end());
        let bytes = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if let Some(until) = allowance.spend(bytes, Instant::now()) {
            tokio::time::sleep_until(until.into()).await;
        }
    }
}

/// As shells have it: a signal counts from 128.
fn exit_status(status: ExitStatus) -> u32 {
    let status = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => signal.saturating_add(128),
        (None, None) => 255,
    };
    u32::try_from(status).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_messages_are_kept() {
        let tail = Tail::default();
        assert_eq!(tail.text("none"), "none");
        for number in 0..1000 {
            tail.push(&format!("é line {number}\n"));
        }
        let text = tail.text("");
        assert!(
            text.len() <= MAX_TAIL && text.ends_with("line 999"),
            "{text}"
        );
    }

    #[test]
    fn who_writes_without_end_waits() {
        let begin = Instant::now();
        let mut allowance = Allowance::new(begin);
        assert_eq!(allowance.spend(MAX_IN_SPAN - 1, begin), None);
        let until = allowance.spend(MAX_LINE, begin + SPAN / 2);
        assert_eq!(until, Some(begin + SPAN));
        assert_eq!(allowance.spend(MAX_LINE, begin + SPAN), None);
    }

    #[test]
    fn ends_are_numbers_as_in_shells() {
        assert_eq!(exit_status(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
    }
}
