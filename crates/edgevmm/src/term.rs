//! The user's terminal: raw mode that is always undone, and its size.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use edgevmm_api::v1::TerminalSize;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::messages;

/// The mode to return to while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
/// Whether lines need a carriage return.
static RAW: AtomicBool = AtomicBool::new(false);

/// Keeps the terminal raw as long as it lives.
#[derive(Debug)]
pub struct RawMode;

impl RawMode {
    /// Makes the terminal on standard input raw. `None` when there is no terminal.
    ///
    /// # Errors
    ///
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        // A panic ends the process without dropping anything.
        let earlier = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            earlier(panic);
        }));
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw)?;
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(Self))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Returns to the saved mode, if there is one.
fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved {
        // The terminal may be gone, and then there is nothing to return to.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &saved);
    }
    RAW.store(false, Ordering::Relaxed);
}

/// Writes a line to standard error, on a line of its own also when the terminal is raw.
pub fn notice(text: &str) {
    let raw = RAW.load(Ordering::Relaxed);
    let start = if raw { "\n" } else { "" };
    tell(format_args!("{start}[{text}]"));
}

/// Standard error, where lines also end right when the terminal is raw.
#[derive(Debug, Clone, Copy)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        messages::write(&end_lines(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Text with the line ends that the terminal needs in its present mode.
pub fn end_lines(text: &[u8]) -> Cow<'_, [u8]> {
    if !RAW.load(Ordering::Relaxed) {
        return text.into();
    }
    let ended = text
        .split_inclusive(|byte| *byte == b'\n')
        .flat_map(|line| match line.strip_suffix(b"\n") {
            Some(line) => [line, b"\r\n"],
            None => [line, b""],
        });
    ended.collect::<Vec<_>>().concat().into()
}

/// Writes a line, or some, to standard error.
pub fn tell(text: impl fmt::Display) {
    let _ = Stderr.write_all(format!("{text}\n").as_bytes());
}

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);

/// Size of the terminal on standard output; `None` when it has none.
pub fn size() -> Option<TerminalSize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel writes a winsize, and nothing else, through a pointer to one.
    unsafe { get_window_size(libc::STDOUT_FILENO, &raw mut size) }.ok()?;
    let size = TerminalSize {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    };
    (size.columns > 0 && size.rows > 0).then_some(size)
}

/// A standard stream without a buffer, which waits also when whoever handed it down had made it
/// non-blocking.
#[derive(Debug)]
pub struct Stream(File);

impl Stream {
    /// Standard input.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn stdin() -> io::Result<Self> {
        Ok(Self(File::from(io::stdin().as_fd().try_clone_to_owned()?)))
    }

    /// Standard output.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn stdout() -> io::Result<Self> {
        Ok(Self(File::from(io::stdout().as_fd().try_clone_to_owned()?)))
    }

    /// Standard error.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn stderr() -> io::Result<Self> {
        Ok(Self(File::from(io::stderr().as_fd().try_clone_to_owned()?)))
    }

    /// Tries until the stream doesn't ask to come again.
    fn wait<T>(
        &mut self,
        events: PollFlags,
        mut action: impl FnMut(&mut File) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match action(&mut self.0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(
                        &mut [PollFd::new(self.0.as_fd(), events)],
                        PollTimeout::NONE,
                    )?;
                }
                result => return result,
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLIN, |file| file.read(buffer))
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLOUT, |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use nix::fcntl::OFlag;

    use super::*;

    #[test]
    fn streams_wait_on_non_blocking_pipes() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let stream = |fd: OwnedFd| Stream(File::from(fd));
        let (mut reader, mut writer) = (stream(reader), stream(writer));
        let sent = vec![7; 1 << 20];
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            writer.write_all(&vec![7; 1 << 20])
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        thread.join().unwrap().unwrap();
        assert_eq!(received, sent);
    }
}
