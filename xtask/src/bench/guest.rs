//! A VMM as a process, from its start to its end, with what its guest writes.

use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;

/// How a VMM is started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Launch {
    /// A path, or a name looked up in `PATH`.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// How long a VMM may take to end once asked to.
const GRACE: Duration = Duration::from_secs(10);

/// A running VMM. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    stdout: ChildStdout,
    started: Instant,
    console: Vec<u8>,
    // Its sockets and locks; goes last.
    _folder: tempfile::TempDir,
}

impl Guest {
    /// Starts a VMM, its guest's console on its stdout.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(launch: &Launch) -> Result<Self> {
        Self::start_with(launch, Stdio::null())
    }

    /// As [`start`](Self::start), with the VMM's own messages to `stderr`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with(launch: &Launch, stderr: impl Into<Stdio>) -> Result<Self> {
        let folder = tempfile::tempdir().context("Cannot make a directory for a VMM")?;
        let mut command = Command::new(&launch.program);
        command
            .args(&launch.arguments)
            .env("EDGEVMM_RUNTIME_DIR", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("Cannot start {}", launch.program))?;
        let stdout = child.stdout.take().context("A VMM without output")?;
        Ok(Self {
            child,
            stdout,
            started,
            console: Vec::new(),
            _folder: folder,
        })
    }

    /// Waits until the guest has written `text` and returns the time since the start.
    ///
    /// # Errors
    /// The VMM ends or `timeout` passes first.
    pub fn wait_for(&mut self, text: &[u8], timeout: Duration) -> Result<Duration> {
        let deadline = self.started + timeout;
        let mut searched = 0;
        loop {
            let fresh = self.console.get(searched..).unwrap_or_default();
            if fresh.windows(text.len()).any(|window| window == text) {
                return Ok(self.started.elapsed());
            }
            searched = (self.console.len() + 1).saturating_sub(text.len());
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            ensure!(poll(&mut ready, left)? > 0, self.explain("takes too long"));
            let mut buffer = [0; 4096];
            let count = self.stdout.read(&mut buffer)?;
            ensure!(count > 0, self.explain("ended"));
            self.console
                .extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }

    /// Waits for `text` and returns the rest of its line.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub fn line_after(&mut self, text: &str, timeout: Duration) -> Result<String> {
        self.wait_for(text.as_bytes(), timeout)?;
        loop {
            let console = String::from_utf8_lossy(&self.console);
            let rest = console.split_once(text).map_or("", |(_, rest)| rest);
            if let Some((line, _)) = rest.split_once('\n') {
                return Ok(line.trim().to_owned());
            }
            let mut buffer = [0; 4096];
            let count = self.stdout.read(&mut buffer)?;
            ensure!(count > 0, self.explain("ended"));
            self.console
                .extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }

    /// Waits until the VMM ends by itself and returns the time since the start.
    ///
    /// # Errors
    /// It ends with another code than 0, or `timeout` passes first.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<Duration> {
        let deadline = self.started + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            ensure!(poll(&mut ready, left)? > 0, self.explain("does not end"));
            let mut buffer = [0; 4096];
            let count = self.stdout.read(&mut buffer)?;
            if count == 0 {
                let status = self.child.wait()?;
                let ended = self.started.elapsed();
                ensure!(status.success(), self.explain(&format!("ended ({status})")));
                return Ok(ended);
            }
            self.console
                .extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }

    fn explain(&self, what: &str) -> String {
        let start = self.console.len().saturating_sub(500);
        let console = self.console.get(start..).unwrap_or_default();
        format!(
            "The VMM {what}. Its guest said:\n{}",
            String::from_utf8_lossy(console)
        )
    }

    /// The VMM's process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// CPU time of the VMM so far, with that of its guest.
    ///
    /// # Errors
    /// The VMM ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let clock = clock_getcpuclockid(Pid::from_raw(self.pid()))?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Does `work` while the VMM and its guest stand still.
    ///
    /// # Errors
    /// The VMM ended, or what `work` returns.
    pub fn frozen<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let pid = Pid::from_raw(self.pid());
        kill(pid, Signal::SIGSTOP)?;
        wait_until_stopped(self.pid());
        let result = work();
        kill(pid, Signal::SIGCONT)?;
        result
    }

    /// Ends the VMM, by force if need be. Its files are gone then.
    fn end(&mut self) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            // edgevmm presses the power button at the first and ends its guest at the second.
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            for _ in 0..20 {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until all threads of a process that was sent SIGSTOP stand still, a second at most.
fn wait_until_stopped(pid: i32) {
    let stopped = |task: &Path| {
        let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
        // The state follows the name, which may have any character in it.
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('T'))
    };
    for _ in 0..200 {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        if tasks
            .into_iter()
            .flatten()
            .flatten()
            .all(|task| stopped(&task.path()))
        {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shell(script: &str) -> Guest {
        Guest::start(&Launch {
            program: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
        })
        .unwrap()
    }

    #[test]
    fn waits_for_text_that_comes_in_parts() {
        let mut guest = shell("printf INIT-; sleep 0.05; printf FIRST-LINE; sleep 100");
        let time = guest
            .wait_for(b"INIT-FIRST", Duration::from_secs(30))
            .unwrap();
        assert!(time >= Duration::from_millis(50));
        let later = guest.wait_for(b"LINE", Duration::from_secs(30)).unwrap();
        assert!(later >= time);
    }

    #[test]
    fn tells_an_end_from_a_long_wait() {
        let error = shell("echo words")
            .wait_for(b"never", Duration::from_secs(30))
            .unwrap_err();
        assert!(error.to_string().contains("ended") && error.to_string().contains("words"));
        let error = shell("sleep 100")
            .wait_for(b"never", Duration::from_millis(20))
            .unwrap_err();
        assert!(error.to_string().contains("too long"));
    }

    #[test]
    fn waits_for_an_end_and_tells_a_bad_one() {
        let time = shell("sleep 0.05; echo off").wait_for_end(Duration::from_secs(30));
        assert!(time.unwrap() >= Duration::from_millis(50));
        let bad = shell("echo words; exit 3").wait_for_end(Duration::from_secs(30));
        let error = bad.unwrap_err().to_string();
        assert!(error.contains('3') && error.contains("words"), "{error}");
        let late = shell("sleep 100").wait_for_end(Duration::from_millis(20));
        assert!(late.unwrap_err().to_string().contains("does not end"));
    }

    #[test]
    fn a_frozen_process_does_nothing() {
        let mut guest = shell("echo up; while :; do :; done");
        guest.wait_for(b"up", Duration::from_secs(30)).unwrap();
        let times = guest.frozen(|| {
            let before = guest.cpu_time()?;
            thread::sleep(Duration::from_millis(50));
            Ok((before, guest.cpu_time()?))
        });
        let (before, after) = times.unwrap();
        assert_eq!(before, after);
    }
}
