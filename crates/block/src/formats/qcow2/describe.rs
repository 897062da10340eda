//! What an image says of itself.

use std::fs::File;
use std::time::Duration;

use super::create::{Compression, Extension};
use super::header::{CORRUPT, DIRTY, Header, LAZY_REFCOUNTS};
use super::open::refused;
use super::snapshots::Directory;
use crate::BlockError;
use crate::formats::Backing;
use crate::host::HostFile;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of its disk in bytes.
    pub size: u64,
    /// Bytes of the machine's state that it holds; 0 if it holds none.
    pub vm_state: u64,
    /// When it was taken, since the epoch.
    pub taken: Duration,
    /// How long the machine had run.
    pub vm_clock: Duration,
}

/// An external data file, as the image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name; absent if the image does not tell.
    pub name: Option<String>,
    /// It is a raw image by itself.
    pub raw: bool,
}

/// Everything an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// Clusters have subclusters.
    pub extended_l2: bool,
    /// Refcounts may be left behind until the image is closed.
    pub lazy_refcounts: bool,
    /// How clusters are compressed where they are.
    pub compression: Compression,
    /// "AES" or "LUKS" if the data is encrypted; such an image can't be opened.
    pub encryption: Option<&'static str>,
    /// It was not closed cleanly; its refcounts may be wrong.
    pub dirty: bool,
    /// Somebody found its metadata damaged.
    pub corrupt: bool,
    /// What lies below it.
    pub backing: Option<Backing>,
    /// Where its data is, if not in the image.
    pub data_file: Option<DataFile>,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Number of its persistent dirty bitmaps.
    pub bitmaps: u32,
    /// Header extensions that this crate gives no meaning to.
    pub extensions: Vec<Extension>,
}

/// Tells what an image says of itself, without locking it or opening anything else.
///
/// # Errors
///
/// [`BlockError::BadImage`] if the header breaks the format's rules, else what the host says.
pub fn describe(file: File, path_hint: &str) -> Result<Description, BlockError> {
    let file = HostFile::new(file, path_hint, false)?;
    let header = Header::read(&file)?;
    let directory = Directory::read(&file, &header).map_err(refused(&file))?;
    let layout = header.layout();
    let data_file = layout.external.then(|| DataFile {
        name: header.data_file.clone(),
        raw: header.has_raw_data_file(),
    });
    Ok(Description {
        version: header.version,
        size: header.size,
        cluster_size: layout.cluster_size(),
        refcount_bits: 1 << header.refcount_order,
        extended_l2: layout.extended,
        lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
        compression: header.compression,
        encryption: header.encryption(),
        dirty: header.incompatible & DIRTY != 0,
        corrupt: header.incompatible & CORRUPT != 0,
        data_file,
        snapshots: directory
            .records
            .into_iter()
            .map(|record| record.snapshot)
            .collect(),
        bitmaps: header.bitmaps(),
        extensions: header.unknown_extensions().cloned().collect(),
        backing: header.backing,
    })
}
