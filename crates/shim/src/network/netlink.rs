//! Netlink (Linux Documentation/userspace-api/netlink/intro.rst): requests to the kernel, of which
//! the acknowledgement is read, or the one thing asked for.
//!
//! The kept crates for it parse all that a kernel can tell of links, routes and traffic control, and
//! know neither nf_tables nor the `skbedit` action. What a pod's network needs is a dozen requests;
//! what it looks at, other interfaces of the kernel tell.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Bytes before a message's own header (`nlmsghdr`).
const HEADER: usize = 16;
/// Seconds that an answer may take.
const PATIENCE: i64 = 5;
/// Type of an answer.
const ERROR: u16 = 2;
/// Flags of a request.
const REQUEST: u16 = 1;
/// It shall be answered also when all is well.
pub const ACK: u16 = 4;
/// It makes what is missing.
pub const CREATE: u16 = 0x400;
/// It makes nothing that is there already.
pub const EXCLUSIVE: u16 = 0x200;
/// It changes what is there already.
pub const REPLACE: u16 = 0x100;
/// Mark of an attribute that has attributes in it.
const NESTED: u16 = 0x8000;
/// What is no mark in the type of an attribute.
const KIND: u16 = 0x3fff;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// A request of a type, with flags and the header that its family of messages has.
    pub fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        put(&mut bytes, 4, &kind.to_ne_bytes());
        put(&mut bytes, 6, &(flags | REQUEST).to_ne_bytes());
        bytes.extend(header);
        Self(bytes)
    }

    /// Adds an attribute.
    pub fn add(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |message| message.0.extend(value));
    }

    /// Adds an attribute whose value is a text with a zero at its end.
    pub fn add_text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |message| {
            message.0.extend(text.as_bytes());
            message.0.push(0);
        });
    }

    /// Adds an attribute with those in it that `fill` adds.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, fill);
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        fill(self);
        let len = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        put(&mut self.0, start, &len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Its bytes, as number `sequence`.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        put(&mut self.0, 0, &len.to_ne_bytes());
        put(&mut self.0, 8, &sequence.to_ne_bytes());
        self.0
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// A way to a part of the kernel, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// To links, addresses and traffic control.
    ///
    /// # Errors
    ///
    /// When the kernel has none.
    pub fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// To packet filters.
    ///
    /// # Errors
    ///
    /// When the kernel has none.
    pub fn netfilter() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        let (family, flags) = (AddressFamily::Netlink, SockFlag::SOCK_CLOEXEC);
        let socket = socket(family, SockType::Raw, flags, protocol)?;
        // The kernel answers while it is asked: an answer that is not there then never comes.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE))?;
        let sequence = 0;
        Ok(Self { socket, sequence })
    }

    /// Has the kernel do what a message asks for.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn request(&mut self, message: Message) -> io::Result<()> {
        self.send([message])
    }

    /// Has the kernel do what several messages ask for that belong together, of which just the last
    /// that does anything has [`ACK`] among its flags.
    ///
    /// # Errors
    ///
    /// What the kernel says of the first that it does not do.
    pub fn send(&mut self, messages: impl IntoIterator<Item = Message>) -> io::Result<()> {
        let mut bytes = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            bytes.extend(message.finish(self.sequence));
        }
        result(&self.exchange(&bytes)?)
    }

    /// What the kernel says of the one thing that a message asks for: all behind the header that its
    /// family of messages has, which has `header` bytes.
    ///
    /// # Errors
    ///
    /// What the kernel says instead.
    pub fn get(&mut self, message: Message, header: usize) -> io::Result<Attributes> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut answer = self.exchange(&message.finish(self.sequence))?;
        if answer.get(4..6) == Some(&ERROR.to_ne_bytes()[..]) {
            result(&answer)?;
        }
        let start = (HEADER + header).min(answer.len());
        Ok(Attributes(answer.split_off(start)))
    }

    fn exchange(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let kernel = NetlinkAddr::new(0, 0);
        let fd = self.socket.as_raw_fd();
        sendto(fd, bytes, &kernel, MsgFlags::empty())?;
        let mut answer = vec![0; 4096];
        let len = recv(fd, &mut answer, MsgFlags::empty())?;
        answer.truncate(len);
        Ok(answer)
    }
}

/// Attributes of an answer.
#[derive(Debug)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// The value of the first of a type.
    pub fn find(&self, kind: u16) -> Option<&[u8]> {
        let mut rest = &self.0[..];
        loop {
            let &[a, b, c, d] = rest.first_chunk()?;
            let len = usize::from(u16::from_ne_bytes([a, b]));
            let value = rest.get(4..len)?;
            if u16::from_ne_bytes([c, d]) & KIND == kind {
                return Some(value);
            }
            rest = rest.get(len.next_multiple_of(4)..)?;
        }
    }

    /// Those in the first of a type.
    pub fn nested(&self, kind: u16) -> Option<Self> {
        self.find(kind).map(|value| Self(value.to_vec()))
    }
}

/// What an answer says.
fn result(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6) == Some(&ERROR.to_ne_bytes()[..]);
    let code = answer.get(HEADER..).and_then(|rest| rest.first_chunk());
    match code.filter(|_| kind).map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let mut message = Message::new(0x1234, ACK, &[9, 9, 9, 9]);
        message.nest(2, |inner| {
            inner.add(3, &[7; 5]);
            inner.add_text(4, "ab");
        });
        let expected = [
            &44_u32.to_ne_bytes()[..],
            &0x1234_u16.to_ne_bytes(),
            &(ACK | REQUEST).to_ne_bytes(),
            &[8, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9],
            &[24, 0, 2, 0x80, 9, 0, 3, 0, 7, 7, 7, 7, 7, 0, 0, 0],
            &[7, 0, 4, 0, b'a', b'b', 0, 0],
        ];
        assert_eq!(message.finish(8), expected.concat());
    }

    #[test]
    fn attributes_are_found() {
        let bytes = |parts: &[(u16, u16, &[u8])]| {
            let parts = parts.iter().map(|(len, kind, value)| {
                [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
            });
            Attributes(parts.collect::<Vec<_>>().concat())
        };
        let found = bytes(&[(5, 1, &[7, 0, 0, 0]), (8, 2, &[1, 2, 3, 4])]);
        assert_eq!(found.find(1), Some(&[7][..]));
        assert_eq!(found.find(2), Some(&[1, 2, 3, 4][..]));
        assert_eq!(found.find(3), None);
        let inner = [5, 0, 1, 0, 7, 0, 0, 0];
        let nested = bytes(&[(12, 9 | NESTED, &inner), (12, 8, &inner)]);
        for kind in [8, 9] {
            let inner = nested.nested(kind).unwrap();
            assert_eq!(inner.find(1), Some(&[7][..]));
        }
        for broken in [(0, 9, &[0; 4]), (3, 9, &[0; 4]), (40, 9, &[0; 4])] {
            assert_eq!(bytes(&[(broken.0, broken.1, broken.2)]).find(1), None);
        }
    }

    #[test]
    fn refusals_are_told() {
        // No interface has this index.
        let mut header = [0; 16];
        put(&mut header, 4, &i32::MAX.to_ne_bytes());
        let error = Socket::route().and_then(|mut socket| {
            let delete_link = 17;
            socket.request(Message::new(delete_link, ACK, &header))
        });
        let error = error.unwrap_err().raw_os_error();
        use nix::libc::{ENODEV, EPERM};
        assert!(matches!(error, Some(ENODEV | EPERM)), "{error:?}");
        result(&[]).unwrap_err();
        result(&[0; 19]).unwrap_err();
    }
}
