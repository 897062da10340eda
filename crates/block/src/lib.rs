//! Disk images as block devices: formats, overlays and their safety rules.
//!
//! [`open()`] turns opened files into one [`BlockBackend`]; everything above it (virtio-blk, IDE,
//! a CD-ROM drive) sees only that trait. The crate knows no KVM and no virtio.
//!
//! Two rules shape it. An image is data written by somebody else, so its header is checked before
//! any library reads it, and no file it names is ever opened: the caller hands over every file of
//! a backing chain. And an image has one writer: every file is locked while it is in use.

mod chain;
pub mod engine;
mod error;
mod fingerprint;
mod formats;
mod host;
mod in_flight;
mod layer;
mod map;
mod new_file;
mod open;
pub mod overlay;
mod paths;
mod plan;
mod read_only;
mod snapshot;
mod stack;

/// qcow2 images by themselves: making, describing, checking and changing them.
pub mod qcow2 {
    pub use crate::formats::Backing;
    pub use crate::formats::qcow2::{
        CheckReport, Compression, CreateOptions, DataFile, DataFileName, Description, Extension,
        HeaderParts, Repair, Snapshot, check, create, describe, edit_header,
    };
}

use std::fmt::Debug;
use std::io;

pub use error::BlockError;
pub use formats::probe::{ImageFormat, probe};
pub use formats::vmdk::vmdk_data_files;
pub use map::{MapEntry, MapKind};
pub use new_file::{Existing, NewFile, lock_file};
pub use open::{
    BackingFile, DataFile, DiskOptions, ImageInfo, check_opened, info, open, open_path,
};
pub use paths::DiskPaths;
pub use plan::{Access, Plan};
pub use vm_memory::VolatileSlice;

/// Bytes in one sector, the unit of [`BlockBackend::size`].
pub const SECTOR_SIZE: u64 = 512;

/// What a backend can do and how it likes to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Smallest unit a guest may address, in bytes.
    pub logical_block: u32,
    /// Unit below which a write costs a read-modify-write, in bytes; a multiple of
    /// `logical_block`.
    pub physical_block: u32,
    /// Smallest unit a discard can free, in bytes; 0 if discards free nothing.
    pub discard_granularity: u32,
}

/// A disk: an array of bytes that several threads may read and write at once.
///
/// Requests that overlap in time and range happen in either order. Every method checks its range
/// against [`size`](Self::size) and fails with [`BlockError::OutOfRange`] rather than touch
/// anything outside.
pub trait BlockBackend: Send + Sync + Debug {
    /// Guest-visible size in bytes, a multiple of [`SECTOR_SIZE`].
    fn size(&self) -> u64;

    /// Whether every write, discard and zeroing is refused with [`BlockError::ReadOnly`].
    fn read_only(&self) -> bool;

    /// Block sizes and discard granularity.
    fn limits(&self) -> Limits;

    /// Fills all of `bufs`, in order, from `offset` bytes into the disk.
    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError>;

    /// Writes all of `bufs`, in order, at `offset` bytes into the disk.
    ///
    /// The data is durable only after a later [`flush`](Self::flush); before it, data may be lost
    /// even if no more than this process dies.
    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError>;

    /// Tells how to do a read or write in place, where that can be told: into `plan`, which is
    /// empty. Returns whether it did; if not, the request has to go through
    /// [`read_vectored`](Self::read_vectored) or [`write_vectored`](Self::write_vectored).
    ///
    /// A planned write counts as returned for [`flush`](Self::flush) once its plan has ended.
    fn plan(
        &self,
        access: Access,
        offset: u64,
        len: u64,
        plan: &mut Plan,
    ) -> Result<bool, BlockError> {
        let _ = (access, offset, len, plan);
        Ok(false)
    }

    /// Whether a read or write that has no plan is likely to wait for the host's disk or to compute
    /// for long, so that several at a time are better done by several threads.
    fn takes_time(&self, access: Access) -> bool {
        let _ = access;
        true
    }

    /// Whether writes that have no plan would wait for each other in the host, so that one thread
    /// does them no later than several.
    fn new_data_waits(&self) -> bool {
        false
    }

    /// Tells how the bytes from `offset` are stored and for how many of `len` (at least 1) that is
    /// true.
    ///
    /// # Errors
    ///
    /// The range is past the end, or an image's tables make no sense. The default, for disks that
    /// are no chain of images, says that all is data.
    fn map(&self, offset: u64, len: u64) -> Result<MapEntry, BlockError> {
        check_range(offset, len, self.size())?;
        Ok(MapEntry {
            kind: MapKind::Data,
            len,
            depth: 0,
            host_offset: None,
        })
    }

    /// Makes every write that has returned durable, with the metadata needed to find it.
    fn flush(&self) -> Result<(), BlockError>;

    /// Tells that the range holds nothing of value; what it reads as afterwards is unspecified,
    /// but it is never data of another file or guest.
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError>;

    /// Makes the range read as zeroes; `may_unmap` allows its space to be given back.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError>;

    /// Makes the disk larger; what is new reads as zeroes. It is durable once this returns.
    fn resize(&self, new_size: u64) -> Result<(), BlockError> {
        let _ = new_size;
        Err(BlockError::Unsupported {
            op: "resize",
            reason: "its format or the way it is open does not allow it",
        })
    }

    /// Writes one cluster's worth of `data` at `offset`, which is a multiple of it, compressed if
    /// that makes it shorter. The last cluster of a disk may be shorter than the others.
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let _ = (offset, data);
        Err(BlockError::Unsupported {
            op: "compress data on",
            reason: "only qcow2 images can have compressed data",
        })
    }
}

/// Checks that `len` bytes at `offset` lie within a disk of `size` bytes.
fn check_range(offset: u64, len: u64, size: u64) -> Result<(), BlockError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, len, size }),
    }
}

/// Sum of the lengths of `bufs` in bytes.
fn total_len(bufs: &[VolatileSlice<'_>]) -> u64 {
    bufs.iter()
        .fold(0, |sum, buf| sum.saturating_add(buf.len() as u64))
}

/// Turns the host's reason for a failed request into a [`BlockError`].
fn io_error(op: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> BlockError {
    move |source| BlockError::Io {
        op,
        offset,
        len,
        source,
    }
}
