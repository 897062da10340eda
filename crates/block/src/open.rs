//! Opening a disk: which files it is made of, and as which format.

use std::fs::File;
use std::sync::Arc;

use crate::{BlockBackend, BlockError};

/// How the bytes of an image file make up a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The file's bytes are the disk's bytes.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
}

/// One file below an image, always used read-only.
#[derive(Debug)]
pub struct BackingFile {
    /// The file, opened for reading.
    pub file: File,
    /// Its format; probed if absent.
    pub format: Option<ImageFormat>,
    /// Its name as the user gave it, for messages only.
    pub path_hint: String,
}

/// A disk to open.
#[derive(Debug)]
pub struct DiskOptions {
    /// The image, opened for reading, and for writing unless `read_only` or `snapshot`.
    pub file: File,
    /// Its name as the user gave it, for messages only.
    pub path_hint: String,
    /// Its format; probed if absent.
    pub format: Option<ImageFormat>,
    /// Refuse every write.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// The files below the image, the nearest first.
    pub backing: Vec<BackingFile>,
    /// Keep every write in an unnamed temporary file that dies with the disk; the image itself is
    /// only read.
    pub snapshot: bool,
}

impl DiskOptions {
    /// A writable disk of `file`, its format probed, with no files below it.
    pub fn new(file: File, path_hint: impl Into<String>) -> Self {
        Self {
            file,
            path_hint: path_hint.into(),
            format: None,
            read_only: false,
            direct: false,
            backing: Vec::new(),
            snapshot: false,
        }
    }
}

/// Opens a disk.
pub fn open(options: DiskOptions) -> Result<Arc<dyn BlockBackend>, BlockError> {
    Err(BlockError::File {
        op: "open",
        path: options.path_hint,
        source: std::io::ErrorKind::Unsupported.into(),
    })
}
