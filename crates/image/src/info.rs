//! Telling what images are.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use edgevmm_block::qcow2::{self, Compression, Description};
use edgevmm_block::{BlockError, DiskPaths, ImageFormat, open_path, overlay, probe};
use serde::Serialize;

use crate::ImageError;
use crate::disk::Disk;

/// What an image is. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// Its name, as it was given.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Size of the disk.
    pub virtual_size: u64,
    /// What its file takes up on its filesystem.
    pub host_size: u64,
    /// Length of its file.
    pub file_length: u64,
    /// What only a qcow2 says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Info>,
    /// The image that it says lies below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingInfo>,
    /// The images that were given as those below it, from the nearest to the base.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<Self>,
}

/// What a qcow2 says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Qcow2Info {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// How data is compressed where it is: "zlib" or "zstd".
    pub compression: &'static str,
    /// Clusters are divided into subclusters.
    pub extended_l2: bool,
    /// QEMU may leave refcounts behind until it is closed.
    pub lazy_refcounts: bool,
    /// "AES" or "LUKS", if the data is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encryption: Option<&'static str>,
    /// It was not closed cleanly.
    pub dirty: bool,
    /// It is marked as damaged.
    pub corrupt: bool,
    /// The other file that its data is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<DataFileInfo>,
    /// Persistent bitmaps in it.
    pub bitmaps: u32,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// The image below another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackingInfo {
    /// Its name as recorded.
    pub name: String,
    /// Its format by QEMU's name for it, as recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The overlay knows what it was like, and is refused over anything else.
    pub checked: bool,
    /// Why the one that was given is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The external data file of a qcow2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataFileInfo {
    /// Its name as recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// It is a raw image by itself.
    pub raw: bool,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotInfo {
    /// Its ID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of its disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the state of a machine that it has beside it.
    pub vm_state_size: u64,
    /// When it was taken, in seconds since 1970.
    pub taken: u64,
}

/// Tells what an image is, and those below it that were given. None of them is locked unless it is
/// of a format that is only read.
///
/// # Errors
///
/// One can't be read, or is of no format known.
pub fn info(paths: &DiskPaths) -> Result<Info, ImageError> {
    let mut info = one(paths)?;
    for path in &paths.backing {
        info.chain.push(one(&DiskPaths::new(path))?);
    }
    if let (Some(backing), Some((first, rest))) = (&mut info.backing, paths.backing.split_first())
        && backing.checked
    {
        let base = DiskPaths {
            backing: rest.to_vec(),
            ..DiskPaths::new(first)
        };
        let own = qcow2::describe(open_path(&paths.path, false)?, &paths.hint())?;
        let verified = overlay::verify(&paths.hint(), &own.extensions, &base.open(false)?);
        backing.problem = verified.err().map(|error| error.to_string());
    }
    Ok(info)
}

/// Lists the internal snapshots of an image, of which only a qcow2 has any.
///
/// # Errors
///
/// The image can't be read.
pub fn snapshots(paths: &DiskPaths) -> Result<Vec<SnapshotInfo>, ImageError> {
    Ok(one(paths)?.qcow2.map_or_else(Vec::new, |own| own.snapshots))
}

fn one(paths: &DiskPaths) -> Result<Info, ImageError> {
    let file = open_path(&paths.path, false)?;
    let (host_size, file_length) = sizes(&paths.path, &file)?;
    let format = match paths.format {
        Some(format) => format,
        None => probe(&file)?,
    };
    let mut info = Info {
        path: paths.hint(),
        format: format.to_string(),
        virtual_size: file_length.next_multiple_of(edgevmm_block::SECTOR_SIZE),
        host_size,
        file_length,
        qcow2: None,
        backing: None,
        chain: Vec::new(),
    };
    match format {
        ImageFormat::Raw => {}
        ImageFormat::Qcow2 => info.take(qcow2::describe(file, &paths.hint())?),
        _ => info.virtual_size = Disk::open(paths.open(false)?)?.size(),
    }
    Ok(info)
}

/// What a file takes up, and how long it is, in bytes.
fn sizes(path: &Path, file: &std::fs::File) -> Result<(u64, u64), ImageError> {
    let failed = |source| BlockError::File {
        op: "examine",
        path: path.display().to_string(),
        source,
    };
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() {
        return Ok((metadata.blocks().saturating_mul(512), metadata.len()));
    }
    let again = file.try_clone().map_err(failed)?;
    let size = edgevmm_block::info(again, &path.display().to_string())?.size;
    Ok((size, size))
}

impl Info {
    fn take(&mut self, own: Description) {
        self.virtual_size = own.size;
        let checked = overlay::find(&own.extensions).is_some();
        self.backing = own.backing.map(|backing| BackingInfo {
            name: backing.name,
            format: backing.format,
            checked,
            problem: None,
        });
        let snapshots = own.snapshots.into_iter().map(|snapshot| SnapshotInfo {
            id: snapshot.id,
            name: snapshot.name,
            virtual_size: snapshot.size,
            vm_state_size: snapshot.vm_state,
            taken: snapshot.taken.as_secs(),
        });
        self.qcow2 = Some(Qcow2Info {
            version: own.version,
            cluster_size: own.cluster_size,
            refcount_bits: own.refcount_bits,
            compression: match own.compression {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            },
            extended_l2: own.extended_l2,
            lazy_refcounts: own.lazy_refcounts,
            encryption: own.encryption,
            dirty: own.dirty,
            corrupt: own.corrupt,
            data_file: own.data_file.map(|file| DataFileInfo {
                name: file.name,
                raw: file.raw,
            }),
            bitmaps: own.bitmaps,
            snapshots: snapshots.collect(),
        });
    }
}
