//! A terminal for a program that a client runs, between the FIFOs that containerd made.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::pty::{Winsize, openpty};
use tokio::net::unix::pipe;

/// The host's end of a terminal.
#[derive(Debug)]
pub struct Terminal(OwnedFd);

/// The program's end. It has to be kept until the program has ended: after that nothing more can be
/// read from the terminal.
#[derive(Debug)]
pub struct Line {
    /// Where the program opens it.
    pub path: PathBuf,
    _end: OwnedFd,
}

impl Terminal {
    /// A new one, with its program's end.
    ///
    /// # Errors
    ///
    /// When the host gives none.
    pub fn open() -> io::Result<(Self, Line)> {
        let pair = openpty(None, None)?;
        let path = nix::unistd::ttyname(&pair.slave)?;
        fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        for end in [&pair.master, &pair.slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let line = Line {
            path,
            _end: pair.slave,
        };
        Ok((Self(pair.master), line))
    }

    /// What the program writes. When it has ended, an error is how the kernel tells that.
    ///
    /// # Errors
    ///
    /// When there are no more file descriptors.
    pub fn screen(&self) -> io::Result<pipe::Receiver> {
        pipe::Receiver::from_owned_fd_unchecked(self.0.try_clone()?)
    }

    /// What is typed.
    ///
    /// # Errors
    ///
    /// As [`screen`](Self::screen).
    pub fn keyboard(&self) -> io::Result<pipe::Sender> {
        pipe::Sender::from_owned_fd_unchecked(self.0.try_clone()?)
    }

    /// Changes its size, of which its program is told.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn resize(&self, columns: u32, rows: u32) -> io::Result<()> {
        nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);
        let short = |size| u16::try_from(size).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: short(rows),
            ws_col: short(columns),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call.
        unsafe { set_window_size(self.0.as_raw_fd(), &raw const size) }?;
        Ok(())
    }
}

/// Opens a FIFO that a client writes to. Its end is the client's.
///
/// # Errors
///
/// When it is none, or can't be opened.
pub fn input(path: &Path) -> io::Result<pipe::Receiver> {
    pipe::OpenOptions::new().open_receiver(path)
}

/// Opens a FIFO that a client reads, which it may do later.
///
/// # Errors
///
/// When it is none, or can't be opened.
pub fn output(path: &Path) -> io::Result<pipe::Sender> {
    pipe::OpenOptions::new().read_write(true).open_sender(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    #[test]
    fn what_is_typed_and_written_passes_and_ends_with_the_program() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let [stdin, stdout] = ["in", "out"].map(|name| folder.path().join(name));
            for path in [&stdin, &stdout] {
                mkfifo(path, Mode::S_IRWXU).unwrap();
            }
            let (terminal, line) = Terminal::open().unwrap();
            terminal.resize(81, 23).unwrap();
            let open = || {
                std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open(&line.path)
            };
            let mut child = Command::new("sh")
                .args(["-c", "stty size; read word; echo got $word"])
                .stdin(Stdio::from(open().unwrap()))
                .stdout(Stdio::from(open().unwrap()))
                .spawn()
                .unwrap();
            let (mut from, mut keyboard) = (input(&stdin).unwrap(), terminal.keyboard().unwrap());
            tokio::spawn(async move { tokio::io::copy(&mut from, &mut keyboard).await });
            let mut keys = pipe::OpenOptions::new().open_sender(&stdin).unwrap();
            let mut client = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
            let (mut screen, mut to) = (terminal.screen().unwrap(), output(&stdout).unwrap());
            let drained = tokio::spawn(async move {
                // Ends with an error.
                let _ = tokio::io::copy(&mut screen, &mut to).await;
            });
            keys.write_all(b"hello\n").await.unwrap();
            tokio::task::spawn_blocking(move || child.wait())
                .await
                .unwrap()
                .unwrap();
            drop(line);
            let second = Duration::from_secs(5);
            timeout(second, drained).await.unwrap().unwrap();
            let mut text = String::new();
            timeout(second, client.read_to_string(&mut text))
                .await
                .unwrap()
                .unwrap();
            assert!(
                text.contains("23 81\r\n") && text.contains("got hello\r\n"),
                "{text}"
            );
        });
    }
}
