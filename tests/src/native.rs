//! Commands on this machine, with the same handles as the lab's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use xtask::lab::WindowSize;

use crate::command::{Output, TERMINAL};

/// What is known of a command; its threads add to it.
#[derive(Debug, Default)]
struct Progress {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    open_streams: u32,
    code: Option<i32>,
}

#[derive(Debug, Default)]
struct State {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `ready` gives something; `None` when `timeout` passed first.
    fn wait<T>(&self, timeout: Duration, ready: impl Fn(&Progress) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut progress = self.lock();
        loop {
            if let Some(value) = ready(&progress) {
                return Some(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(progress, left);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A command running on this machine, in a process group of its own. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    group: Pid,
    stdin: Mutex<Option<File>>,
    state: Arc<State>,
}

impl Running {
    pub(crate) fn spawn(command: &mut Command, terminal: bool) -> Result<Self> {
        command.process_group(0);
        let mut streams = Vec::new();
        let stdin = if terminal {
            let pair = openpty(&winsize(TERMINAL), None).context("Cannot make a terminal")?;
            command
                .stdin(pair.slave.try_clone()?)
                .stdout(pair.slave.try_clone()?)
                .stderr(pair.slave);
            streams.push((File::from(pair.master.try_clone()?), true));
            Some(File::from(pair.master))
        } else {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            None
        };
        let mut child = command
            .spawn()
            .with_context(|| format!("Cannot start {}", command.get_program().display()))?;
        // The terminal ends when nobody but the child has it.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let stdin = stdin.or_else(|| child.stdin.take().map(|it| OwnedFd::from(it).into()));
        streams.extend(
            child
                .stdout
                .take()
                .map(|it| (OwnedFd::from(it).into(), true)),
        );
        streams.extend(
            child
                .stderr
                .take()
                .map(|it| (OwnedFd::from(it).into(), false)),
        );
        let state = Arc::new(State::default());
        state.lock().open_streams = u32::try_from(streams.len())?;
        for (stream, is_stdout) in streams {
            let state = Arc::clone(&state);
            thread::spawn(move || read_all(stream, is_stdout, &state));
        }
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let of_waiter = Arc::clone(&state);
        thread::spawn(move || {
            let status = child.wait().ok();
            let code = status.and_then(|it| it.code().or_else(|| it.signal().map(|n| 128 + n)));
            of_waiter.update(|progress| progress.code = Some(code.unwrap_or(255)));
        });
        Ok(Self {
            group,
            stdin: Mutex::new(stdin),
            state,
        })
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> Result<()> {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        let stdin = stdin.as_mut().context("The command's stdin is closed")?;
        stdin.write_all(bytes).context("The command takes no input")
    }

    pub(crate) fn close_stdin(&self) {
        *self.stdin.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn signal(&self, number: i32) -> Result<()> {
        Ok(killpg(self.group, Signal::try_from(number)?)?)
    }

    pub(crate) fn resize(&self, size: WindowSize) -> Result<()> {
        nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
        let stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        let terminal = stdin.as_ref().context("The command's stdin is closed")?;
        let size = winsize(size);
        // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
        unsafe { set_window_size(terminal.as_raw_fd(), &raw const size) }?;
        // The terminal is not the command's controlling one, which would have the kernel do this.
        Ok(killpg(self.group, Signal::SIGWINCH)?)
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.state.lock().stdout).into_owned()
    }

    pub(crate) fn wait_for_stdout(
        &self,
        text: &str,
        skip: usize,
        timeout: Duration,
    ) -> Result<usize> {
        let found = self.state.wait(timeout, |progress| {
            let part = progress.stdout.get(skip..).unwrap_or_default();
            let at = part
                .windows(text.len())
                .position(|it| it == text.as_bytes());
            match at {
                Some(at) => Some(Some(skip + at + text.len())),
                None => (progress.open_streams == 0).then_some(None),
            }
        });
        match found {
            Some(Some(end)) => Ok(end),
            Some(None) => bail!("No '{text}' in the output before the command ended"),
            None => bail!("No '{text}' in the output within {} s", timeout.as_secs()),
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        self.group.as_raw()
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&self) -> bool {
        self.state.lock().code.is_none()
    }

    /// Waits for the end. A child left behind may keep the streams open for ever, so they get only
    /// a moment longer.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<Output> {
        let code = self.state.wait(timeout, |progress| progress.code);
        let code = code.context("The command took too long")?;
        let closed = |progress: &Progress| (progress.open_streams == 0).then_some(());
        self.state.wait(Duration::from_secs(1), closed);
        let progress = self.state.lock();
        Ok(Output {
            code,
            stdout: String::from_utf8_lossy(&progress.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&progress.stderr).into_owned(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.state.lock().code.is_none() {
            let _ = killpg(self.group, Signal::SIGKILL);
        }
    }
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn read_all(mut stream: File, is_stdout: bool, state: &State) {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => state.update(|progress| {
                let to = if is_stdout {
                    &mut progress.stdout
                } else {
                    &mut progress.stderr
                };
                to.extend_from_slice(buffer.get(..count).unwrap_or_default());
            }),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    state.update(|progress| progress.open_streams -= 1);
}
