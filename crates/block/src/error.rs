//! The one error type of the crate.

use std::io;

use crate::ImageFormat;

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
    /// The disk cannot do it at all.
    #[error("Cannot {op} the disk: {reason}")]
    Unsupported {
        /// What was asked for, such as "resize".
        op: &'static str,
        /// Why not.
        reason: &'static str,
    },
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
    /// The device that asked stops, and did not wait for the rest of a long request.
    #[error("The request was given up halfway")]
    Cancelled,
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
    /// Another file has come to the image's place while it was being opened.
    #[error("Disk image {path:?} was replaced while it was being opened; try again")]
    Replaced {
        /// The image as the user named it.
        path: String,
    },
    /// The name given for an image names nothing.
    #[error("Disk image {path:?} does not exist; check the path")]
    Missing {
        /// The image as the user named it.
        path: String,
    },
    /// The name for a new image is taken.
    #[error("{path:?} exists already; choose another name, or have it replaced")]
    Exists {
        /// The name as the user gave it.
        path: String,
    },
    /// The host denies access to an image.
    #[error("No permission to {access} disk image {path:?}; change its mode or owner{hint}")]
    Permission {
        /// The image as the user named it.
        path: String,
        /// "read" or "read and write".
        access: &'static str,
        /// What else would help, or nothing.
        hint: &'static str,
    },
    /// A directory, socket, pipe or character device was given as an image.
    #[error("Disk image {path:?} is {kind}; give a regular file or a block device")]
    NotADisk {
        /// The image as the user named it.
        path: String,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// The image has no bytes.
    #[error("Disk image {path:?} is empty; a disk needs at least one byte")]
    Empty {
        /// The image as the user named it.
        path: String,
    },
    /// The content is recognised as something this crate cannot read.
    #[error("Disk image {path:?} is {format}, which is not supported yet; {hint}")]
    UnsupportedFormat {
        /// The image as the user named it.
        path: String,
        /// What the content is, with its article.
        format: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
    /// A disk of a format that is only read was to be written.
    #[error(
        "Disk image {path:?} is {format}, which can only be read; open it read-only or as a \
         snapshot, or put an overlay over it"
    )]
    OnlyRead {
        /// The image as the user named it.
        path: String,
        /// Its format.
        format: ImageFormat,
    },
    /// An image breaks its format's rules or uses a feature that is not supported.
    #[error("Cannot use {format} image {path:?}: {reason}")]
    BadImage {
        /// Its format.
        format: ImageFormat,
        /// The image as the user named it.
        path: String,
        /// What is wrong and, where there is a remedy, what to do.
        reason: String,
    },
    /// An image names a file below it that the user did not give.
    #[error(
        "Disk image {path:?} asks for the backing file {wanted:?}; a file an image names is never \
         opened by itself, as it could be any file of the host: give backing=PATH if it is wanted"
    )]
    BackingNotGiven {
        /// The image as the user named it.
        path: String,
        /// The file the image asks for.
        wanted: String,
    },
    /// The user gave a backing file to an image that has none.
    #[error(
        "Disk image {path:?} has no backing file, but {given:?} was given as one; leave it out"
    )]
    BackingNotWanted {
        /// The image as the user named it.
        path: String,
        /// The first file given in excess.
        given: String,
    },
    /// An image keeps its data in another file that the user did not give.
    #[error(
        "Disk image {path:?} keeps its data in another file, {wanted:?}; a file an image names is \
         never opened by itself, as it could be any file of the host: give data_file=PATH if it \
         is wanted"
    )]
    DataFileNotGiven {
        /// The image as the user named it.
        path: String,
        /// The file the image asks for.
        wanted: String,
    },
    /// The user gave a data file to an image that has none, or no more.
    #[error(
        "Disk image {path:?} does not keep its data in {given:?}, which was given as its data \
         file; leave it out"
    )]
    DataFileNotWanted {
        /// The image as the user named it.
        path: String,
        /// The first file given in excess.
        given: String,
    },
    /// The image has no such internal snapshot.
    #[error("Disk image {path:?} has no internal snapshot with the ID or name {snapshot:?}")]
    NoSnapshot {
        /// The image as the user named it.
        path: String,
        /// What was asked for.
        snapshot: String,
    },
    /// A backing file is not of the format expected.
    #[error("Backing file {path:?} is {found}, but {who} says it is {expected}; {hint}")]
    BackingFormat {
        /// The backing file as the user named it.
        path: String,
        /// What its content is.
        found: ImageFormat,
        /// Who expects something else.
        who: &'static str,
        /// What is expected there.
        expected: String,
        /// What to do.
        hint: &'static str,
    },
    /// What lies below an overlay is not what it was made over.
    #[error("Overlay {path:?} does not fit its base {base:?} any more: {how}")]
    BaseChanged {
        /// The overlay as the user named it.
        path: String,
        /// The base as the user named it.
        base: String,
        /// Why, and what to do.
        how: &'static str,
    },
    /// An overlay was being moved into its base when that ended too early.
    #[error(
        "Overlay {path:?} was being committed into its base when that was interrupted; do it once \
         more by `edgevmm image commit`"
    )]
    CommitInterrupted {
        /// The overlay as the user named it.
        path: String,
    },
    /// Somebody else uses the image in a way that excludes this one.
    #[error("Disk image {path:?} is in use by {holder}; {hint}")]
    Locked {
        /// The image as the user named it.
        path: String,
        /// Who, such as "process 123".
        holder: String,
        /// What to do.
        hint: &'static str,
    },
    /// The temporary file for a snapshot cannot be made.
    #[error(
        "Cannot create a temporary file for the snapshot of {path:?} in {dir:?}; name another \
         directory in TMPDIR"
    )]
    Snapshot {
        /// The image as the user named it.
        path: String,
        /// Directory tried.
        dir: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}
