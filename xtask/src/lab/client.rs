//! The host's side of the agent's protocol: commands in L1 as if they were here.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::protocol::{Frame, Hello, INITIAL_CREDIT, Kind, Spawn, WindowSize};

/// Input is sent in pieces of this many bytes.
const CHUNK: usize = 32 * 1024;

/// What is known of one command; changed by the connection's reader, waited for by its owner.
#[derive(Debug, Default)]
struct Progress {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    credit: usize,
    end: Option<Result<i32, String>>,
    /// Write output to this process's own stdout and stderr instead of keeping it.
    stream: bool,
}

#[derive(Debug, Default)]
struct Shared {
    commands: HashMap<u32, Progress>,
    /// The channel of the newest command. None is used twice, lest a command hears of another.
    newest: u32,
    greeted: Option<String>,
    /// The connection's end.
    closed: bool,
}

#[derive(Debug, Default)]
struct State {
    shared: Mutex<Shared>,
    changed: Condvar,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` returns something; `None` when `timeout` passed first.
    fn wait<T>(
        &self,
        timeout: Option<Duration>,
        mut ready: impl FnMut(&mut Shared) -> Option<T>,
    ) -> Option<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut shared = self.lock();
        loop {
            if let Some(value) = ready(&mut shared) {
                return Some(value);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return None;
            }
            // A year stands for "for ever": a condition variable takes no `None`.
            let left = left.unwrap_or(Duration::from_secs(365 * 24 * 3600));
            let waited = self.changed.wait_timeout(shared, left);
            shared = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A connection to the agent.
#[derive(Debug)]
pub(super) struct Client {
    writer: Mutex<UnixStream>,
    state: Arc<State>,
}

impl Client {
    /// Greets the agent, which answers once it runs. `alive` ends the wait when it returns false.
    pub(super) fn connect(
        stream: UnixStream,
        mount_shares: bool,
        timeout: Duration,
        alive: impl Fn() -> bool,
    ) -> Result<Arc<Self>> {
        let state = Arc::new(State::default());
        let reader = stream.try_clone()?;
        let of_reader = Arc::clone(&state);
        thread::spawn(move || read_frames(reader, &of_reader));
        let client = Self {
            writer: Mutex::new(stream),
            state,
        };
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let hello = Hello {
            unix_nanos: u64::try_from(now.as_nanos())?,
            entropy: entropy()?,
            mount_shares,
        };
        client.send(&Frame::json(0, Kind::Hello, &hello)?)?;
        let deadline = Instant::now() + timeout;
        let greeted = loop {
            let step = Some(Duration::from_millis(100));
            let answer = client.state.wait(step, |shared| {
                if shared.closed {
                    Some(None)
                } else {
                    shared.greeted.take().map(Some)
                }
            });
            match answer {
                Some(answer) => break answer,
                None if Instant::now() > deadline => bail!("L1's agent does not answer"),
                None if !alive() => break None,
                None => {}
            }
        };
        match greeted.as_deref() {
            Some("") => Ok(Arc::new(client)),
            Some(problem) => bail!("L1 is not ready: {problem}"),
            None => bail!("L1 ended before its agent answered"),
        }
    }

    /// Starts a command on a channel of its own.
    pub(super) fn spawn(self: &Arc<Self>, spawn: &Spawn, stream: bool) -> Result<Running> {
        let channel = {
            let mut shared = self.state.lock();
            shared.newest += 1;
            let channel = shared.newest;
            let progress = Progress {
                credit: INITIAL_CREDIT,
                stream,
                ..Progress::default()
            };
            shared.commands.insert(channel, progress);
            channel
        };
        let running = Running {
            client: Arc::clone(self),
            channel,
        };
        self.send(&Frame::json(channel, Kind::Spawn, spawn)?)?;
        Ok(running)
    }

    fn send(&self, frame: &Frame) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        frame
            .write(&mut *writer)
            .context("The connection to L1 is gone")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Ends the reader's thread, which has the other half.
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writer.shutdown(Shutdown::Both);
    }
}

fn entropy() -> Result<Vec<u8>> {
    let mut bytes = vec![0; 64];
    let mut source = std::fs::File::open("/dev/urandom").context("Cannot open /dev/urandom")?;
    io::Read::read_exact(&mut source, &mut bytes)?;
    Ok(bytes)
}

fn read_frames(mut stream: UnixStream, state: &State) {
    while let Ok(frame) = Frame::read(&mut stream) {
        let mut shared = state.lock();
        if frame.kind == Kind::Ready {
            shared.greeted = Some(String::from_utf8_lossy(&frame.payload).into_owned());
        } else if let Some(progress) = shared.commands.get_mut(&frame.channel) {
            progress.update(frame);
        }
        drop(shared);
        state.changed.notify_all();
    }
    state.lock().closed = true;
    state.changed.notify_all();
}

impl Progress {
    fn update(&mut self, mut frame: Frame) {
        match frame.kind {
            Kind::Output if self.stream => write_through(&mut io::stdout(), &frame.payload),
            Kind::ErrorOutput if self.stream => write_through(&mut io::stderr(), &frame.payload),
            Kind::Output => self.stdout.append(&mut frame.payload),
            Kind::ErrorOutput => self.stderr.append(&mut frame.payload),
            Kind::Credit => {
                let taken = frame.number().and_then(|taken| usize::try_from(taken).ok());
                self.credit += taken.unwrap_or(0);
            }
            Kind::Exit => self.end = Some(Ok(frame.number().unwrap_or(255))),
            Kind::Failed => {
                let why = String::from_utf8_lossy(&frame.payload).into_owned();
                self.end = Some(Err(why));
            }
            _ => {}
        }
    }
}

/// A closed stdout or stderr here is no reason to stop the command there.
fn write_through(to: &mut impl Write, bytes: &[u8]) {
    let _ = to.write_all(bytes).and_then(|()| to.flush());
}

/// How a command in L1 ended, and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit code; 128 + N when it was ended by signal N.
    pub code: i32,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

impl Output {
    /// Whether the exit code is 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == 0
    }
}

/// [`Output`] in bytes.
#[derive(Debug)]
pub(super) struct RawOutput {
    pub(super) code: i32,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// A command running in L1. Dropping it ends it.
#[derive(Debug)]
pub struct Running {
    client: Arc<Client>,
    channel: u32,
}

impl Running {
    /// Sends bytes to the command's stdin, waiting while it does not read.
    ///
    /// # Errors
    /// The command or L1 ended.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(CHUNK) {
            let allowed = self.client.state.wait(None, |shared| {
                let closed = shared.closed;
                let progress = shared.commands.get_mut(&self.channel)?;
                if closed || progress.end.is_some() {
                    return Some(false);
                }
                progress.credit = progress.credit.checked_sub(piece.len())?;
                Some(true)
            });
            if allowed != Some(true) {
                bail!("The command in L1 has ended and takes no more input");
            }
            self.send(Kind::Input, piece.to_vec())?;
        }
        Ok(())
    }

    /// Ends the command's stdin.
    ///
    /// # Errors
    /// L1 ended.
    pub fn close_stdin(&self) -> Result<()> {
        self.send(Kind::InputEnd, Vec::new())
    }

    /// Sends a signal to the command and the children it started.
    ///
    /// # Errors
    /// L1 ended.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.send(Kind::Signal, number.to_le_bytes().to_vec())
    }

    /// Tells the command's terminal its new size.
    ///
    /// # Errors
    /// L1 ended.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        self.client
            .send(&Frame::json(self.channel, Kind::Resize, &size)?)
    }

    /// What the command wrote to its stdout (or terminal) so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        let shared = self.client.state.lock();
        let progress = shared.commands.get(&self.channel);
        progress.map_or_else(String::new, |it| {
            String::from_utf8_lossy(&it.stdout).into_owned()
        })
    }

    /// Waits until the command's stdout has `text` in it after its first `skip` bytes; returns the
    /// byte after it, to go on from.
    ///
    /// # Errors
    /// The command ended without it, or `timeout` passed; both with what it wrote.
    pub fn wait_for_stdout(&self, text: &str, skip: usize, timeout: Duration) -> Result<usize> {
        let mut looked_at = skip;
        let found = self.client.state.wait(Some(timeout), |shared| {
            let closed = shared.closed;
            let progress = shared.commands.get(&self.channel)?;
            let part = progress.stdout.get(looked_at..).unwrap_or_default();
            if let Some(at) = part
                .windows(text.len())
                .position(|it| it == text.as_bytes())
            {
                return Some(Some(looked_at + at + text.len()));
            }
            looked_at = looked_at.max(progress.stdout.len().saturating_sub(text.len()));
            (closed || progress.end.is_some()).then_some(None)
        });
        let what = match found {
            Some(Some(end)) => return Ok(end),
            Some(None) => "the command ended",
            None => "it took too long",
        };
        bail!(
            "No '{text}' in the output before {what}. It wrote:\n{}",
            self.tail()
        )
    }

    /// Waits for the command's end.
    ///
    /// # Errors
    /// It could not be started, L1 ended, or `timeout` passed. In the last case it goes on running.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Output> {
        self.wait_raw(timeout).map(|raw| Output {
            code: raw.code,
            stdout: String::from_utf8_lossy(&raw.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&raw.stderr).into_owned(),
        })
    }

    /// [`Running::wait`] for output that is not text.
    pub(super) fn wait_raw(&self, timeout: Option<Duration>) -> Result<RawOutput> {
        let end = self.client.state.wait(timeout, |shared| {
            let closed = shared.closed;
            let progress = shared.commands.get_mut(&self.channel)?;
            match &progress.end {
                Some(Ok(code)) => Some(Ok(RawOutput {
                    code: *code,
                    stdout: progress.stdout.clone(),
                    stderr: progress.stderr.clone(),
                })),
                Some(Err(why)) => Some(Err(Some(why.clone()))),
                None => closed.then_some(Err(None)),
            }
        });
        match end {
            Some(Ok(output)) => Ok(output),
            Some(Err(Some(why))) => bail!("The command cannot be started in L1: {why}"),
            Some(Err(None)) => Err(anyhow::Error::new(MachineEnded)).with_context(|| self.tail()),
            None => Err(anyhow::Error::new(TimedOut)).with_context(|| self.tail()),
        }
    }

    fn tail(&self) -> String {
        let shared = self.client.state.lock();
        let Some(progress) = shared.commands.get(&self.channel) else {
            return String::new();
        };
        let tail = |bytes: &[u8]| {
            let start = bytes.len().saturating_sub(4000);
            String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
        };
        format!("{}\n{}", tail(&progress.stdout), tail(&progress.stderr))
    }

    fn send(&self, kind: Kind, payload: Vec<u8>) -> Result<()> {
        self.client.send(&Frame {
            channel: self.channel,
            kind,
            payload,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let progress = self.client.state.lock().commands.remove(&self.channel);
        // A command that ended may have left others running on purpose: these are let be.
        if progress.is_some_and(|progress| progress.end.is_none()) {
            let _ = self.signal(libc::SIGKILL);
        }
        let _ = self.send(Kind::Close, Vec::new());
    }
}

/// A command in L1 took longer than it was allowed to.
#[derive(Debug)]
pub struct TimedOut;

impl std::fmt::Display for TimedOut {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("The command in L1 took too long")
    }
}

impl std::error::Error for TimedOut {}

/// L1 ended while a command ran in it.
#[derive(Debug)]
pub struct MachineEnded;

impl std::fmt::Display for MachineEnded {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("L1 ended while a command ran in it")
    }
}

impl std::error::Error for MachineEnded {}
