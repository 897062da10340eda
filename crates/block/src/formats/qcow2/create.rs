//! New images.

use std::fs::File;

use crate::BlockError;
use crate::formats::Backing;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, which every reader of qcow2 knows.
    #[default]
    Zlib,
    /// Zstandard, which QEMU reads from version 5.1 on.
    Zstd,
}

/// A header extension that this crate gives no meaning to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub magic: u32,
    /// Its content.
    pub data: Vec<u8>,
}

/// The external data file that an image is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// The name that is recorded.
    pub name: String,
    /// Keep the file readable as a raw image by itself.
    pub raw: bool,
}

/// What a new image is to be like. The default is what `qemu-img create` makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bits in a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Divide clusters of at least 16 KiB into 32 subclusters each.
    pub extended_l2: bool,
    /// Allow QEMU to leave refcounts behind until the image is closed.
    pub lazy_refcounts: bool,
    /// How clusters are compressed where they are.
    pub compression: Compression,
    /// What lies below the image.
    pub backing: Option<Backing>,
    /// Where the data goes, if not into the image.
    pub data_file: Option<DataFileName>,
    /// A header extension of the caller's own.
    pub extension: Option<Extension>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            extension: None,
        }
    }
}

/// Makes an empty image of `file`, whatever it held, and syncs it.
///
/// `path_hint` names the file in messages. `data_file` is given if, and only if, the options name
/// one; it is cut or grown to the disk's size.
///
/// # Errors
///
/// [`BlockError::BadImage`] for options that the format does not allow, [`BlockError::Locked`] if
/// somebody uses the file, else what the host says.
pub fn create(
    file: File,
    path_hint: &str,
    data_file: Option<File>,
    options: &CreateOptions,
) -> Result<(), BlockError> {
    let _ = (file, data_file, options);
    Err(super::unfinished(path_hint))
}
