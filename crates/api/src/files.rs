//! Handing files to a running VMM, which may open none itself.
//!
//! Beside the API's socket a machine has one for files. A client connects and sends one byte with
//! the open file's descriptor; the VMM answers with a number of eight bytes, least significant
//! first, by which a call of the API then names the file. The file waits as long as the connection
//! lives. All that the VMM can do with it is what it was opened for.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// How long a VMM may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// What goes with a descriptor: a message has to have something.
const FILE: u8 = b'F';

/// A file that a VMM has. It may be named in calls as long as this lives.
#[derive(Debug)]
pub struct HandedFile {
    number: u64,
    _connection: UnixStream,
}

impl HandedFile {
    /// Hands `file` to the VMM that listens at `socket`.
    ///
    /// # Errors
    ///
    /// When nobody listens there or too many files wait already.
    pub fn new(socket: &Path, file: &File) -> io::Result<Self> {
        let mut connection = UnixStream::connect(socket)?;
        connection.set_read_timeout(Some(ANSWER))?;
        let descriptors = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let data = [IoSlice::new(&[FILE])];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<UnixAddr>(connection.as_raw_fd(), &data, &rights, flags, None)?;
        let mut number = [0; 8];
        connection.read_exact(&mut number)?;
        Ok(Self {
            number: u64::from_le_bytes(number),
            _connection: connection,
        })
    }

    /// Its number in calls of the API.
    #[must_use]
    pub const fn number(&self) -> u64 {
        self.number
    }
}

/// Takes the file that a client sends through `connection`, for a VMM.
///
/// # Errors
///
/// When nothing has come yet, or what came is no file.
pub fn receive(connection: BorrowedFd<'_>) -> io::Result<File> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut room = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(connection.as_raw_fd(), &mut data, Some(&mut room), flags)?;
    let mut files = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            // SAFETY: the kernel has made them for this process just now.
            let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
            files.extend(descriptors.into_iter().map(own).map(File::from));
        }
    }
    match (byte, files.pop()) {
        ([FILE], Some(file)) => Ok(file),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_file_arrives_with_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, path) = (folder.path().join("s"), folder.path().join("f"));
        std::fs::write(&path, "content").unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let file = receive(connection.as_fd()).unwrap();
            connection.write_all(&7_u64.to_le_bytes()).unwrap();
            io::read_to_string(file).unwrap()
        });
        let handed = HandedFile::new(&socket, &File::open(&path).unwrap()).unwrap();
        assert_eq!(handed.number(), 7);
        assert_eq!(vmm.join().unwrap(), "content");
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let (mut client, vmm) = UnixStream::pair().unwrap();
        client.write_all(b"F").unwrap();
        assert!(receive(vmm.as_fd()).is_err());
        drop(client);
        assert!(receive(vmm.as_fd()).is_err());
    }
}
