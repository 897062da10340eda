//! Why an image can't be used, before it is known by which name the user gave it.
//!
//! Formats tell it by [`io::Error`], as they do for requests; [`refusal`] makes a [`BlockError`] of
//! it.

use std::io;

use crate::{BlockError, ImageFormat};

/// An error that tells what makes no sense in an image.
pub fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// An error that tells what an image uses that this crate does not do.
pub fn unsupported(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason.into())
}

/// Tells why the image `path` of `format` can't be opened.
pub fn refusal(format: ImageFormat, path: &str) -> impl Fn(io::Error) -> BlockError + use<> {
    let path = path.to_owned();
    move |source| {
        let ours = source.get_ref().is_some();
        let path = path.clone();
        match source.kind() {
            io::ErrorKind::InvalidData
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::Unsupported
                if ours =>
            {
                BlockError::BadImage {
                    format,
                    path,
                    reason: source.to_string(),
                }
            }
            _ => BlockError::File {
                op: "read",
                path,
                source,
            },
        }
    }
}
