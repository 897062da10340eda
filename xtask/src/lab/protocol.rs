//! What the lab's host side and the agent in L1 say to each other over one virtio-serial port.
//!
//! A frame is a little-endian `u32` payload length, a `u32` channel, a kind byte and the payload.
//! Each command has a channel of its own; channel 0 is the connection itself. Input to a command is
//! limited by credit, so that a command that does not read holds up nobody else.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub const PORT: &str = "edgevmm.lab";

/// Bytes of input a command may be sent before it took any.
pub const INITIAL_CREDIT: usize = 256 * 1024;

/// The most payload either side puts in one frame.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host: a new connection, with a [`Hello`].
    Hello = 1,
    /// Agent: answers a `Hello`; the payload is an error text, or empty.
    Ready = 2,
    /// Host: start a command, with a [`Spawn`].
    Spawn = 3,
    /// Host: bytes for the command's stdin.
    Input = 4,
    /// Host: end of the command's stdin.
    InputEnd = 5,
    /// Host: a new [`WindowSize`] for the command's terminal.
    Resize = 6,
    /// Host: a signal number (`i32`) for the command and its children.
    Signal = 7,
    /// Agent: bytes from the command's stdout or terminal.
    Output = 8,
    /// Agent: bytes from the command's stderr.
    ErrorOutput = 9,
    /// Agent: this many more bytes of input (`u32`) were taken.
    Credit = 10,
    /// Agent: the command ended with this exit code (`i32`), 128 + N when by signal N.
    Exit = 11,
    /// Agent: the command could not be started, and why.
    Failed = 12,
    /// Host: nothing more will be said on this channel.
    Close = 13,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::Hello,
        Self::Ready,
        Self::Spawn,
        Self::Input,
        Self::InputEnd,
        Self::Resize,
        Self::Signal,
        Self::Output,
        Self::ErrorOutput,
        Self::Credit,
        Self::Exit,
        Self::Failed,
        Self::Close,
    ];
}

/// Starts a connection: what a machine that was asleep in a snapshot has to be told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The host's clock, in nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Random bytes that make this clone's random numbers differ from its siblings'.
    pub entropy: Vec<u8>,
    /// Whether to mount the 9p shares, which may not be mounted in a machine that is being saved.
    pub mount_shares: bool,
}

/// A command to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spawn {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment variables on top of the agent's own.
    pub env: Vec<(String, String)>,
    /// Working directory; where it does not exist, `/root`.
    pub cwd: String,
    /// A terminal of this size instead of pipes.
    pub terminal: Option<WindowSize>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Whom it is about.
    pub channel: u32,
    /// What it means.
    pub kind: Kind,
    /// As `kind` says.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Writes the frame in one piece.
    ///
    /// # Errors
    /// What `writer` returns.
    pub fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(9 + self.payload.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.channel.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.payload);
        writer.write_all(&bytes)
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// The stream ended or is not one of frames.
    pub fn read(reader: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; 9];
        reader.read_exact(&mut header)?;
        let [l0, l1, l2, l3, c0, c1, c2, c3, kind] = header;
        let length =
            usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).map_err(io::Error::other)?;
        let kind = Kind::ALL.into_iter().find(|each| *each as u8 == kind);
        let (Some(kind), true) = (kind, length <= MAX_PAYLOAD) else {
            return Err(io::Error::other("not a frame of the lab's protocol"));
        };
        let mut payload = vec![0; length];
        reader.read_exact(&mut payload)?;
        Ok(Self {
            channel: u32::from_le_bytes([c0, c1, c2, c3]),
            kind,
            payload,
        })
    }

    /// A frame whose payload is `value` as JSON.
    ///
    /// # Errors
    /// `value` cannot be written as JSON.
    pub fn json(channel: u32, kind: Kind, value: &impl Serialize) -> io::Result<Self> {
        Ok(Self {
            channel,
            kind,
            payload: serde_json::to_vec(value)?,
        })
    }

    /// The payload as a number, for kinds that carry one.
    #[must_use]
    pub fn number(&self) -> Option<i32> {
        self.payload
            .as_slice()
            .try_into()
            .ok()
            .map(i32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn frames_come_back_as_they_went() {
        let mut stream = Vec::new();
        for kind in Kind::ALL {
            let frame = Frame {
                channel: 7,
                kind,
                payload: vec![kind as u8; 3],
            };
            frame.write(&mut stream).unwrap();
        }
        let mut reader = stream.as_slice();
        for kind in Kind::ALL {
            let frame = Frame::read(&mut reader).unwrap();
            assert_eq!(
                frame,
                Frame {
                    channel: 7,
                    kind,
                    payload: vec![kind as u8; 3]
                }
            );
        }
        assert!(Frame::read(&mut reader).is_err());
    }

    #[test]
    fn refuses_other_streams() {
        assert!(Frame::read(&mut b"\0\0\0\0\0\0\0\0\xff".as_slice()).is_err());
        assert!(Frame::read(&mut b"\xff\xff\xff\xff\0\0\0\0\x04".as_slice()).is_err());
    }
}
