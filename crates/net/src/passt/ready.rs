//! Waits until passt answers.
//!
//! passt has no way of its own to report that it is ready which works in every release and as every
//! user, so it is asked as a guest would: who has the gateway's address? ARP is RFC 826.

use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::VolatileSlice;

use crate::socket::FrameSocket;

/// The asker; locally administered, and passt forgets it at the guest's first frame.
const ASKER: [u8; 6] = [0x02, 0, 0, 0, 0, 0];
const ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4, with addresses of 6 and 4 bytes.
const KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// Asks for `gateway` on `stream` until there is an answer.
///
/// # Errors
/// `TimedOut` when there is none within `limit`; any other error when passt has gone.
pub(super) fn wait(
    stream: UnixStream,
    gateway: Ipv4Addr,
    limit: Duration,
) -> io::Result<FrameSocket> {
    let deadline = Instant::now() + limit;
    let mut socket = FrameSocket::new(stream)?;
    socket.send(&[VolatileSlice::from(&mut request(gateway)[..])])?;
    loop {
        let mut frame = [0; 128];
        let received = socket.recv(&[VolatileSlice::from(&mut frame[..])])?;
        if received.is_some_and(|length| answers(frame.get(..length).unwrap_or_default(), gateway))
        {
            return Ok(socket);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        if received.is_none() {
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn request(gateway: Ipv4Addr) -> [u8; 42] {
    let mut frame = [0; 42];
    let nobody = [0; 10];
    let parts: [&[u8]; 8] = [
        &[0xff; 6],
        &ASKER,
        &ARP,
        &KINDS,
        &REQUEST,
        &ASKER,
        &nobody,
        &gateway.octets(),
    ];
    for (to, from) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    frame
}

fn answers(frame: &[u8], gateway: Ipv4Addr) -> bool {
    let field = |from: usize, to: usize| frame.get(from..to).unwrap_or_default();
    field(12, 14) == ARP && field(20, 22) == REPLY && field(28, 32) == gateway.octets()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;

    use super::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

    /// What [`wait`] makes of a peer that says `frames` and then, perhaps, hangs up.
    fn outcome(frames: &[&[u8]], hang_up: bool) -> io::Result<FrameSocket> {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        for frame in frames {
            peer.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes())
                .unwrap();
            peer.write_all(frame).unwrap();
        }
        if hang_up {
            peer.shutdown(std::net::Shutdown::Write).unwrap();
        }
        wait(ours, GATEWAY, Duration::from_millis(50))
    }

    fn reply() -> [u8; 42] {
        let mut frame = request(GATEWAY);
        frame[20..22].copy_from_slice(&REPLY);
        frame[28..32].copy_from_slice(&GATEWAY.octets());
        frame
    }

    #[test]
    fn the_answer_is_found_among_other_frames() {
        let question = request(GATEWAY);
        assert_eq!(question[38..], GATEWAY.octets());
        outcome(&[&[0; 14], &question, &[0; 1500], &reply()], false).unwrap();
    }

    #[test]
    fn no_answer_or_an_end() {
        let question = request(GATEWAY);
        let kind = |frames: &[&[u8]], hang_up| outcome(frames, hang_up).unwrap_err().kind();
        assert_eq!(kind(&[], false), ErrorKind::TimedOut);
        assert_eq!(kind(&[&question[..]; 3], false), ErrorKind::TimedOut);
        assert_eq!(kind(&[&question], true), ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[&reply()[..13]], false), ErrorKind::InvalidData);
    }
}
