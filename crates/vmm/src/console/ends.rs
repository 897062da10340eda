//! Host ends of a console that live in this process: files, pseudo-terminals and the standard
//! streams. Each direction is a thread that may block as long as it likes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use edgevmm_sandbox::{Kind, enter, threads};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{ConsoleHub, HISTORY};

/// Stack of a console thread.
const STACK: usize = 64 << 10;

/// Why a console's host end can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file can't be written.
    #[error("Can't write the console to {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal.
    #[error("Can't make a pseudo-terminal for the console")]
    Pty(#[source] io::Error),
    /// No thread.
    #[error("Can't start a thread for the console")]
    Thread(#[source] io::Error),
}

/// Copies the console's output, its history first, to `target` on a thread until it closes or
/// `target` fails.
///
/// # Errors
/// Fails when there is no thread to be had.
pub fn copy_output(
    hub: &Arc<ConsoleHub>,
    mut target: impl Write + Send + 'static,
) -> Result<JoinHandle<()>, ConsoleError> {
    let mut reader = hub.reader(HISTORY as u64);
    let body = move || {
        enter(Kind::Copy);
        let mut buffer = [0; 4096];
        loop {
            let chunk = reader.read_blocking(&mut buffer);
            if chunk.closed {
                return;
            }
            if chunk.dropped > 0 {
                let note = format!("\r\n[{} bytes of output lost here]\r\n", chunk.dropped);
                if target.write_all(note.as_bytes()).is_err() {
                    return;
                }
            }
            let bytes = buffer.get(..chunk.len).unwrap_or_default();
            if target
                .write_all(bytes)
                .and_then(|()| target.flush())
                .is_err()
            {
                return;
            }
        }
    };
    threads::spawn("console-out".into(), STACK, body).map_err(ConsoleError::Thread)
}

/// Types what comes from `source` into the console, on a thread, until its end. The end of the
/// source means nothing to the guest.
///
/// # Errors
/// Fails when there is no thread to be had.
pub fn copy_input(
    hub: &Arc<ConsoleHub>,
    mut source: impl Read + Send + 'static,
) -> Result<JoinHandle<()>, ConsoleError> {
    let hub = Arc::clone(hub);
    let body = move || {
        enter(Kind::Copy);
        let mut buffer = [0; 1024];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(len) => type_in(&hub, buffer.get(..len).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    };
    threads::spawn("console-in".into(), STACK, body).map_err(ConsoleError::Thread)
}

/// Types `bytes` at the guest's pace.
pub fn type_in(hub: &ConsoleHub, mut bytes: &[u8]) {
    loop {
        let taken = hub.input().push(bytes);
        bytes = bytes.get(taken..).unwrap_or_default();
        if bytes.is_empty() {
            return;
        }
        let room = hub.input().room();
        // SAFETY: the eventfd belongs to the hub, which outlives this call.
        let fd = unsafe { BorrowedFd::borrow_raw(room.as_raw_fd()) };
        let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE);
        let _ = room.read();
    }
}

/// Appends the console to a file.
///
/// # Errors
/// Fails when the file can't be opened for writing.
pub fn to_file(hub: &Arc<ConsoleHub>, path: &Path) -> Result<(), ConsoleError> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    let file = file.map_err(|source| ConsoleError::File {
        path: path.to_path_buf(),
        source,
    })?;
    copy_output(hub, file).map(drop)
}

/// A pseudo-terminal that is the console.
#[derive(Debug)]
pub struct Pty {
    path: PathBuf,
    /// Held so that the terminal stays when its last user leaves.
    _slave: OwnedFd,
}

impl Pty {
    /// Makes a pseudo-terminal and connects it.
    ///
    /// # Errors
    /// Fails when there is none to be had.
    pub fn open(hub: &Arc<ConsoleHub>) -> Result<Pty, ConsoleError> {
        let error = |errno: nix::Error| ConsoleError::Pty(errno.into());
        let pair = openpty(None, None).map_err(error)?;
        let mut mode = tcgetattr(&pair.slave).map_err(error)?;
        cfmakeraw(&mut mode);
        tcsetattr(&pair.slave, SetArg::TCSANOW, &mode).map_err(error)?;
        let path = nix::unistd::ttyname(&pair.slave).map_err(error)?;
        let output = File::from(pair.master);
        let input = output.try_clone().map_err(ConsoleError::Pty)?;
        copy_output(hub, output)?;
        copy_input(hub, input)?;
        Ok(Pty {
            path,
            _slave: pair.slave,
        })
    }

    /// Path of the terminal, for `screen` and the like.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
