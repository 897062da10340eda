//! The one error type of the crate.

use std::io;

/// Why a disk could not be opened or a request on it not be done.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A request reaches past the end of the disk.
    #[error("Request of {len} bytes at offset {offset} reaches past the disk's end at {size}")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A write, discard or zeroing of a read-only disk.
    #[error("The disk is read-only")]
    ReadOnly,
    /// The host failed a request.
    #[error("Cannot {op} {len} bytes at offset {offset}")]
    Io {
        /// What was tried: "read", "write", "discard", "zero".
        op: &'static str,
        /// First byte of the request.
        offset: u64,
        /// Bytes of the request.
        len: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The host could not make writes durable.
    #[error("Cannot flush the disk")]
    Flush(#[source] io::Error),
    /// A file could not be opened or examined.
    #[error("Cannot {op} disk image {path:?}")]
    File {
        /// What was tried, such as "open".
        op: &'static str,
        /// The image as the user named it.
        path: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}
