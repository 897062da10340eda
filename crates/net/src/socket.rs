//! A guest interface on a stream socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, sendmsg};

use crate::filter::may_leave;
use crate::stream::{FrameReader, FrameWriter, MIN_FRAME};

/// passt takes frames up to here; what is longer no guest sends that keeps to its MTU.
const MAX_SENT: usize = 65_535;

/// The host end of a guest interface whose frames go through [`Passt`](crate::Passt).
///
/// Frames are bare Ethernet, without a virtio-net header. The descriptor is non-blocking.
#[derive(Debug)]
pub struct FrameSocket {
    socket: Socket,
    reader: FrameReader,
    writer: FrameWriter,
}

impl FrameSocket {
    /// Takes over `stream` and makes it non-blocking.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            socket: Socket(stream),
            reader: FrameReader::default(),
            writer: FrameWriter::default(),
        })
    }

    /// Moves the next frame for the guest into `parts` and returns its length; `None` when there is
    /// none now. A frame that does not fit is dropped.
    ///
    /// Frames are read ahead, several at a time: after any other answer than `None` there may be
    /// more although the descriptor is no longer readable.
    ///
    /// # Errors
    /// `UnexpectedEof` when passt has ended; any error means that nothing more will come.
    pub fn recv(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        self.reader.read(&mut self.socket, parts)
    }

    /// Sends a frame of the guest, given in parts. Returns `false` when passt cannot take it now;
    /// offer it again when the descriptor is writable. Frames that are none, and those to the
    /// host's loopback, are dropped as if sent.
    ///
    /// # Errors
    /// Fails when passt has ended.
    pub fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<bool> {
        let length = parts
            .iter()
            .fold(0, |sum: usize, part| sum.saturating_add(part.len()));
        if !(MIN_FRAME..=MAX_SENT).contains(&length) || !may_leave(parts) {
            return Ok(true);
        }
        self.writer.write(&mut self.socket, parts)
    }

    /// Sends the rest of a frame of which the socket took a part; `true` when nothing is left. To
    /// be called when the descriptor is writable and [`FrameSocket::is_pending`].
    ///
    /// # Errors
    /// Fails when passt has ended.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.writer.flush(&mut self.socket)
    }

    /// Whether the rest of a frame waits for the descriptor to be writable.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.writer.is_pending()
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.0.as_fd()
    }
}

impl AsRawFd for FrameSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.0.as_raw_fd()
    }
}

/// A socket whose writes raise no SIGPIPE when the peer is gone.
#[derive(Debug)]
struct Socket(UnixStream);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(sendmsg::<()>(
            self.0.as_raw_fd(),
            parts,
            &[],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        let mut frame = vec![7; length];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame
    }

    #[test]
    fn a_full_socket_stops_and_goes_on() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let mut link = FrameSocket::new(ours).unwrap();
        let frame = frame(60_000);
        let mut sent = 0;
        while link.send(&[IoSlice::new(&frame)]).unwrap() {
            sent += 1;
        }
        assert!(sent > 0);
        let mut bytes = vec![0; sent * (4 + frame.len())];
        let (half, rest) = bytes.split_at_mut(frame.len());
        peer.read_exact(half).unwrap();
        while !link.flush().unwrap() {}
        peer.read_exact(rest).unwrap();
        assert!(!link.is_pending());
        for received in bytes.chunks(4 + frame.len()) {
            assert_eq!(
                (&received[..4], &received[4..]),
                (&60_000_u32.to_be_bytes()[..], &frame[..])
            );
        }
        assert!(link.send(&[IoSlice::new(&frame)]).unwrap());
    }

    #[test]
    fn what_is_no_frame_is_dropped() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let mut link = FrameSocket::new(ours).unwrap();
        let mut loopback = frame(60);
        loopback[30..34].copy_from_slice(&[127, 0, 0, 1]);
        for dropped in [Vec::new(), vec![0; 13], frame(MAX_SENT + 1), loopback] {
            assert!(link.send(&[IoSlice::new(&dropped)]).unwrap());
        }
        peer.set_nonblocking(true).unwrap();
        assert_eq!(
            peer.read(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn a_gone_peer_is_an_error() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let mut link = FrameSocket::new(ours).unwrap();
        drop(peer);
        assert_eq!(
            link.send(&[IoSlice::new(&frame(60))]).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        let error = link.recv(&mut []).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
