//! ttrpc: remote calls over a Unix socket, as containerd makes them.
//!
//! Implements unary calls of the protocol's version 1: frames of a header (length, stream, type,
//! flags; big-endian) and one protobuf message. Leaves out streams of messages, which no service of
//! a shim needs; their frames are ignored.

mod client;
mod server;

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use client::call;
pub use server::{Service, serve};

use crate::proto::ttrpc as wire;

/// Longest message in bytes, as the protocol has it.
const MAX_MESSAGE: usize = 4 << 20;
/// Bytes of a frame's header.
const HEADER: usize = 10;

/// Codes of failed calls, those of gRPC. containerd tells some apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Something that has no better code.
    Unknown = 2,
    /// The request makes no sense.
    InvalidArgument = 3,
    /// The caller's time is over.
    DeadlineExceeded = 4,
    /// There is no such task.
    NotFound = 5,
    /// There is one already.
    AlreadyExists = 6,
    /// Too many calls at a time.
    ResourceExhausted = 8,
    /// The task is not in a state for it.
    FailedPrecondition = 9,
    /// The shim can't do it.
    Unimplemented = 12,
}

impl Code {
    /// The code of that number; what is not among ours is unknown.
    fn of(number: i32) -> Self {
        let all = [
            Self::InvalidArgument,
            Self::DeadlineExceeded,
            Self::NotFound,
            Self::AlreadyExists,
            Self::ResourceExhausted,
            Self::FailedPrecondition,
            Self::Unimplemented,
        ];
        let found = all.into_iter().find(|code| *code as i32 == number);
        found.unwrap_or(Self::Unknown)
    }
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// Of what kind it is.
    pub code: Code,
    /// For people.
    pub message: String,
}

impl CallError {
    /// A failure of a kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// What a call is answered.
pub type Answer = Result<Vec<u8>, CallError>;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Response,
    /// Part of a stream, or something newer.
    Other,
}

/// One message on the wire.
#[derive(Debug)]
struct Frame {
    stream: u32,
    kind: Kind,
    message: Vec<u8>,
}

/// Reads a frame. `None` at the end of the connection.
async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER];
    match from.read_exact(&mut header).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    };
    let [a, b, c, d, e, f, g, h, kind, _flags] = header;
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length > MAX_MESSAGE {
        return Err(io::Error::other(format!(
            "a message of {length} bytes is longer than {MAX_MESSAGE}"
        )));
    }
    let mut message = Vec::new();
    // Grows with what arrives: a header alone costs no memory.
    let length = u64::try_from(length).unwrap_or(u64::MAX);
    let read = from.take(length).read_to_end(&mut message).await?;
    if u64::try_from(read).ok() != Some(length) {
        return Ok(None);
    }
    let kind = match kind {
        1 => Kind::Request,
        2 => Kind::Response,
        _ => Kind::Other,
    };
    let stream = u32::from_be_bytes([e, f, g, h]);
    Ok(Some(Frame {
        stream,
        kind,
        message,
    }))
}

/// Writes a frame of a request or a response.
async fn write_frame(to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let length = u32::try_from(frame.message.len())
        .ok()
        .filter(|_| frame.message.len() <= MAX_MESSAGE)
        .ok_or_else(|| io::Error::other("the message is too long"))?;
    let mut bytes = Vec::with_capacity(HEADER + frame.message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(frame.stream.to_be_bytes());
    bytes.push(if frame.kind == Kind::Request { 1 } else { 2 });
    bytes.push(0);
    bytes.extend_from_slice(&frame.message);
    to.write_all(&bytes).await
}

#[cfg(test)]
mod tests;
