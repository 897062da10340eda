//! One command of the host: its process, its input and its output.

use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, setsid};

use super::serve::Sender;
use crate::lab::protocol::{Kind, Spawn, WindowSize};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes of output taken and sent at a time.
const CHUNK: usize = 32 * 1024;

/// How much output is still looked for after a command ended: more than a pipe can hold, yet an
/// end when a process it left behind goes on writing.
const LAST_OUTPUT: usize = 1 << 20;

/// A running command, as the host's frames reach it.
#[derive(Debug)]
pub(super) struct Channel {
    group: Pid,
    input: Option<mpsc::Sender<Vec<u8>>>,
    terminal: Option<OwnedFd>,
}

/// Where a command's bytes go and come from.
struct Streams {
    input: File,
    outputs: Vec<(File, Kind)>,
}

impl Channel {
    /// Starts a command whose output and end are reported on channel `id`.
    pub(super) fn start(id: u32, spawn: &Spawn, sender: &Sender) -> Result<Self> {
        let (program, arguments) = spawn.argv.split_first().context("No program was given")?;
        let cwd = if Path::new(&spawn.cwd).is_dir() {
            &spawn.cwd
        } else {
            "/root"
        };
        let mut command = Command::new(program);
        command.args(arguments).current_dir(cwd);
        command
            .env("PATH", PATH)
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8");
        command.envs(spawn.env.iter().map(|(name, value)| (name, value)));
        let (mut child, streams, terminal) = match spawn.terminal {
            Some(size) => with_terminal(&mut command, size)?,
            None => with_pipes(&mut command)?,
        };
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let (ended, mut on_end) = std::io::pipe()?;
        thread::spawn(move || {
            let code = child.wait().map_or(255, |status| {
                status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
            });
            let _ = on_end.write_all(&code.to_le_bytes());
        });
        let (input, received) = mpsc::channel();
        let feeder = sender.clone();
        thread::spawn(move || feed(id, streams.input, &received, &feeder));
        let sender = sender.clone();
        thread::spawn(move || forward(id, streams.outputs, ended, &sender));
        Ok(Self {
            group,
            input: Some(input),
            terminal,
        })
    }

    pub(super) fn input(&self, bytes: Vec<u8>) {
        if let Some(input) = &self.input {
            let _ = input.send(bytes);
        }
    }

    pub(super) fn end_input(&mut self) {
        if self.terminal.is_some() {
            self.input(vec![0x04]);
        }
        self.input = None;
    }

    pub(super) fn resize(&self, size: WindowSize) {
        if let Some(terminal) = &self.terminal {
            let _ = set_size(terminal, size);
        }
    }

    pub(super) fn signal(&self, number: i32) {
        if let Ok(signal) = Signal::try_from(number) {
            let _ = killpg(self.group, signal);
        }
    }
}

fn with_pipes(command: &mut Command) -> Result<(Child, Streams, Option<OwnedFd>)> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = spawn(command)?;
    let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        anyhow::bail!("A command without pipes");
    };
    let outputs = vec![
        (File::from(OwnedFd::from(stdout)), Kind::Output),
        (File::from(OwnedFd::from(stderr)), Kind::ErrorOutput),
    ];
    Ok((
        child,
        Streams {
            input: File::from(OwnedFd::from(stdin)),
            outputs,
        },
        None,
    ))
}

fn with_terminal(
    command: &mut Command,
    size: WindowSize,
) -> Result<(Child, Streams, Option<OwnedFd>)> {
    let terminal = openpty(None, None).context("Cannot open a terminal")?;
    set_size(&terminal.master, size)?;
    command
        .stdin(terminal.slave.try_clone()?)
        .stdout(terminal.slave.try_clone()?)
        .stderr(terminal.slave);
    // SAFETY: between fork and exec only setsid and ioctl run, which are async-signal-safe, and
    // nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            // SAFETY: makes stdin, which is the terminal, the new session's own one.
            if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = spawn(command)?;
    // The command holds the other end of the terminal open as well.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let master = &terminal.master;
    let outputs = vec![(File::from(master.try_clone()?), Kind::Output)];
    let input = File::from(master.try_clone()?);
    Ok((child, Streams { input, outputs }, Some(terminal.master)))
}

fn spawn(command: &mut Command) -> Result<Child> {
    command
        .spawn()
        .with_context(|| format!("Cannot run {}", command.get_program().display()))
}

fn set_size(terminal: &OwnedFd, size: WindowSize) -> Result<()> {
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
    unsafe { set_window_size(terminal.as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Writes what the host sends, giving it credit for more. A command that closed its input gets the
/// rest thrown away, so that the host does not wait for it.
fn feed(id: u32, input: File, received: &mpsc::Receiver<Vec<u8>>, sender: &Sender) {
    let mut input = Some(input);
    for bytes in received {
        if let Some(file) = &mut input
            && write_all(file, &bytes).is_err()
        {
            input = None;
        }
        let taken = u32::try_from(bytes.len()).unwrap_or(0);
        sender.send(id, Kind::Credit, &taken.to_le_bytes());
    }
}

/// Writes everything, also to a terminal's side that was made non-blocking for reading.
fn write_all(file: &mut File, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(
                    &mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                )?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Sends a command's output, then its end; and then keeps the pipes of processes it left behind
/// empty, so that they neither block nor die of it.
fn forward(id: u32, mut outputs: Vec<(File, Kind)>, mut ended: PipeReader, sender: &Sender) {
    let mut buffer = vec![0; CHUNK];
    outputs.retain(|(file, _)| set_nonblocking(file).is_ok());
    while !wait_for_any(&outputs, Some(&ended)) {
        outputs.retain_mut(|(file, kind)| {
            take(file, &mut buffer, CHUNK, |bytes| {
                sender.send(id, *kind, bytes);
            })
        });
    }
    outputs.retain_mut(|(file, kind)| {
        take(file, &mut buffer, LAST_OUTPUT, |bytes| {
            sender.send(id, *kind, bytes);
        })
    });
    let mut code = 255_i32.to_le_bytes();
    let _ = ended.read_exact(&mut code);
    sender.send(id, Kind::Exit, &code);
    while !outputs.is_empty() {
        wait_for_any(&outputs, None);
        outputs.retain_mut(|(file, _)| take(file, &mut buffer, CHUNK, |_| ()));
    }
}

fn set_nonblocking(file: &File) -> Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let result = fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    ensure!(result == 0, "Cannot make a pipe non-blocking");
    Ok(())
}

/// Waits until there is something to read; tells whether it is the command's end.
fn wait_for_any(outputs: &[(File, Kind)], ended: Option<&PipeReader>) -> bool {
    let mut polled: Vec<PollFd<'_>> = outputs
        .iter()
        .map(|(file, _)| file.as_fd())
        .chain(ended.map(AsFd::as_fd))
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    let _ = poll(&mut polled, PollTimeout::NONE);
    ended.is_some() && polled.last().and_then(PollFd::any).unwrap_or(true)
}

/// Takes up to `most` bytes that are there; tells whether more may come.
fn take(file: &mut File, buffer: &mut [u8], most: usize, mut to: impl FnMut(&[u8])) -> bool {
    let mut taken = 0;
    while taken < most {
        match file.read(buffer) {
            Ok(0) => return false,
            Ok(count) => {
                to(buffer.get(..count).unwrap_or_default());
                taken += count;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A terminal whose other side is closed says EIO.
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
    true
}

#[cfg(test)]
mod tests;
