//! The calling side: one call on a connection of its own.

use std::io;
use std::path::Path;

use prost::Message;
use tokio::net::UnixStream;

use super::{Answer, CallError, Code, Frame, Kind, read_frame, wire, write_frame};

/// Calls a method of the server at `socket` and returns its answer.
///
/// # Errors
///
/// When nobody answers.
pub async fn call(
    socket: &Path,
    service: &str,
    method: &str,
    payload: Vec<u8>,
    namespace: &str,
) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = wire::Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload,
        timeout_nano: 0,
        metadata: vec![wire::KeyValue {
            key: "containerd-namespace-ttrpc".to_owned(),
            value: namespace.to_owned(),
        }],
    };
    let frame = Frame {
        stream: 1,
        kind: Kind::Request,
        message: request.encode_to_vec(),
    };
    write_frame(&mut stream, &frame).await?;
    while let Some(frame) = read_frame(&mut stream).await? {
        if frame.kind != Kind::Response || frame.stream != 1 {
            continue;
        }
        let response = wire::Response::decode(frame.message.as_slice())?;
        return Ok(match response.status {
            Some(status) if status.code != 0 => {
                Err(CallError::new(Code::of(status.code), status.message))
            }
            _ => Ok(response.payload),
        });
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
