//! A channel's host end as a Unix socket, for one client at a time.
//!
//! While no client is connected the guest finds its port closed on the host: Linux has its writers
//! wait or tells them so, and what a driver sends nevertheless is lost. A client that does not read
//! holds the guest's writers back, and one that writes waits for the guest to open the port. More
//! clients wait for their turn.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::Link;

/// Bytes moved at a time.
const PIECE: usize = 16 << 10;

/// Clients that wait for the one before them.
const BACKLOG: i32 = 8;

/// How long nobody is let in after the host could not.
const PAUSE: Duration = Duration::from_secs(1);

/// Why a channel has no socket.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Somebody listens there.
    #[error(
        "The socket {} of channel {name} is in use: give each machine its own", path.display()
    )]
    InUse {
        /// The channel.
        name: String,
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error(
        "The socket of channel {name} can't be at {}, where there is a file: remove it, or choose \
         another path", path.display()
    )]
    Exists {
        /// The channel.
        name: String,
        /// The socket.
        path: PathBuf,
    },
    /// It can't be made.
    #[error("Can't make the socket {} of channel {name}", path.display())]
    Bind {
        /// The channel.
        name: String,
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A channel's socket. It goes with this.
#[derive(Debug)]
pub struct ChannelSocket {
    path: PathBuf,
    waiting: Option<(StdListener, Link)>,
}

impl ChannelSocket {
    /// Makes the socket of `link` at `path`, for the process's own user only. One that a process
    /// left behind is replaced.
    ///
    /// # Errors
    /// Fails when something is there, or nothing can be made there.
    pub fn bind(path: &Path, link: Link) -> Result<ChannelSocket, ChannelError> {
        let (name, path) = (link.channel().name().to_owned(), path.to_owned());
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ChannelError::Exists { name, path });
            }
            Ok(_) if !is_left_behind(&path) => return Err(ChannelError::InUse { name, path }),
            Ok(_) | Err(_) => {}
        }
        match listen_at(&path) {
            Ok(listener) => Ok(ChannelSocket {
                path,
                waiting: Some((listener, link)),
            }),
            Err(source) => Err(ChannelError::Bind { name, path, source }),
        }
    }

    /// Lets clients in from now on; in tokio's context.
    ///
    /// # Errors
    /// Fails when the process may not wait for more.
    pub fn serve(&mut self) -> io::Result<()> {
        if let Some((listener, link)) = self.waiting.take() {
            tokio::spawn(serve(UnixListener::from_std(listener)?, link));
        }
        Ok(())
    }
}

impl Drop for ChannelSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes a socket that nobody listens at. False if somebody does.
fn is_left_behind(path: &Path) -> bool {
    let refused = StdStream::connect(path).err();
    refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        && fs::remove_file(path).is_ok()
}

fn listen_at(path: &Path) -> io::Result<StdListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file gets the mode that the socket has before.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(StdListener::from(fd))
}

async fn serve(listener: UnixListener, link: Link) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                link.channel().set_open(true);
                copy(client, &link).await;
                link.channel().set_open(false);
            }
            Err(error) => {
                let name = link.channel().name();
                tracing::warn!(%error, "Nobody can connect to channel {name} for now");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Copies both ways until the client leaves.
async fn copy(mut client: UnixStream, link: &Link) {
    let (mut from, mut to) = client.split();
    let to_guest = async {
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = from.read(&mut piece).await {
            let bytes = piece.get(..count).unwrap_or_default();
            // What a guest that closed its port did not read is lost.
            let _ = link.write(link.opened().await, bytes).await;
        }
    };
    let to_host = async {
        let mut piece = vec![0; PIECE];
        loop {
            let count = link.take(&mut piece).await;
            let bytes = piece.get(..count).unwrap_or_default();
            if to.write_all(bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = to_guest => {}
        () = to_host => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn link() -> Link {
        Link::new("a").unwrap()
    }

    #[test]
    fn a_socket_replaces_none_but_a_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = ChannelSocket::bind(&path, link()).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = ChannelSocket::bind(&path, link()).unwrap_err();
        assert!(matches!(error, ChannelError::InUse { .. }), "{error}");
        drop(first);
        assert!(!path.exists());

        drop(StdListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(ChannelSocket::bind(&path, link()).unwrap());

        fs::write(&path, "precious").unwrap();
        let error = ChannelSocket::bind(&path, link()).unwrap_err();
        assert!(matches!(error, ChannelError::Exists { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let error = ChannelSocket::bind(&folder.path().join("no/s"), link()).unwrap_err();
        assert!(matches!(error, ChannelError::Bind { .. }), "{error}");
    }
}
