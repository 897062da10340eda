//! A guest interface on a stream socket.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, send};
use vm_memory::VolatileSlice;

use crate::filter::may_leave;
use crate::stream::{FrameReader, FrameWriter, MIN_FRAME, total};

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
    /// none now. A frame longer than `parts` is lost.
    ///
    /// Frames are read ahead, several at a time: after any other answer than `None` there may be
    /// more although the descriptor is no longer readable.
    ///
    /// # Errors
    /// `UnexpectedEof` when passt has ended; any error means that nothing more will come.
    pub fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        self.reader.read(&mut self.socket, parts)
    }

    /// Sends a frame of the guest, given in parts. Returns `false` when passt cannot take it now;
    /// offer it again when the descriptor is writable. Frames that are none, and those to the
    /// host's loopback, are dropped as if sent.
    ///
    /// # Errors
    /// Fails when passt has ended.
    pub fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        if !(MIN_FRAME..=MAX_SENT).contains(&total(parts)) {
            return Ok(true);
        }
        self.writer.write(&mut self.socket, parts, may_leave)
    }

    /// Sends the rest of a frame that was taken before the socket could take all of it; `true` when
    /// nothing is left. To be called when the descriptor is writable.
    ///
    /// # Errors
    /// Fails when passt has ended.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.writer.flush(&mut self.socket)
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
        Ok(send(self.0.as_raw_fd(), buffer, MsgFlags::MSG_NOSIGNAL)?)
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

    fn send(link: &mut FrameSocket, frame: &mut [u8]) -> io::Result<bool> {
        link.send(&[VolatileSlice::from(frame)])
    }

    #[test]
    fn a_full_socket_stops_and_goes_on() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let mut link = FrameSocket::new(ours).unwrap();
        let mut frame = frame(60_000);
        let mut sent = 0;
        while send(&mut link, &mut frame).unwrap() {
            sent += 1;
        }
        assert!(sent > 1);
        assert!(!link.flush().unwrap());

        peer.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        while !link.flush().unwrap() {
            let error = peer.read_to_end(&mut bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        peer.read_to_end(&mut bytes).unwrap_err();
        assert_eq!(bytes.len(), sent * (4 + frame.len()));
        for received in bytes.chunks(4 + frame.len()) {
            assert_eq!(
                (&received[..4], &received[4..]),
                (&60_000_u32.to_be_bytes()[..], &frame[..])
            );
        }
        assert!(send(&mut link, &mut frame).unwrap());
    }

    #[test]
    fn what_is_no_frame_is_dropped() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let mut link = FrameSocket::new(ours).unwrap();
        let mut loopback = frame(60);
        loopback[30..34].copy_from_slice(&[127, 0, 0, 1]);
        for mut dropped in [Vec::new(), vec![0; 13], frame(MAX_SENT + 1), loopback] {
            assert!(send(&mut link, &mut dropped).unwrap());
        }
        assert!(link.send(&[]).unwrap());
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
            send(&mut link, &mut frame(60)).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        let error = link.recv(&[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
