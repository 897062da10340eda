//! Raw images: the file's bytes are the disk's bytes.
//!
//! Guest memory goes straight to the kernel, without a copy or an allocation.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::OpenLayer;
use crate::host::{HostFile, Unflushed, Window};
use crate::layer::{Extent, Layer, Mapping};
use crate::plan::{Access, Piece, Plan};
use crate::stack::Stack;
use crate::{
    BlockBackend, BlockError, Limits, MapEntry, SECTOR_SIZE, VolatileSlice, check_range, io_error,
    total_len,
};

/// A raw image as a layer.
///
/// A length that is no multiple of a sector is rounded up, so that every byte of the file can be
/// reached: the missing bytes read as zeroes, and the first write to them extends the file.
#[derive(Debug)]
struct RawLayer {
    file: Arc<HostFile>,
    size: AtomicU64,
}

impl RawLayer {
    fn new(file: Arc<HostFile>) -> io::Result<Self> {
        let len = file.len()?;
        let size = len
            .checked_next_multiple_of(SECTOR_SIZE)
            .ok_or(io::ErrorKind::FileTooLarge)?
            .into();
        file.expect_len(len);
        Ok(Self { file, size })
    }
}

impl Layer for RawLayer {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let file = &self.file;
        Ok(Mapping {
            extent: Extent::Data { file, offset },
            len,
        })
    }
}

/// A raw image as a disk.
#[derive(Debug)]
pub struct RawDisk {
    image: Arc<RawLayer>,
    /// The image alone.
    stack: Stack,
    read_only: bool,
    unflushed: Arc<Unflushed>,
}

impl RawDisk {
    /// Uses all of `file`.
    ///
    /// # Errors
    /// The host does not tell how long it is.
    pub fn new(file: Arc<HostFile>, read_only: bool) -> Result<Self, BlockError> {
        let name = file.name().to_owned();
        let image = RawLayer::new(file).map_err(|source| BlockError::File {
            op: "examine",
            path: name,
            source,
        })?;
        let image = Arc::new(image);
        image.file.keep_within(image.size());
        Ok(Self {
            stack: Stack::new(vec![Arc::clone(&image) as _]),
            image,
            read_only,
            unflushed: Arc::default(),
        })
    }

    fn file(&self) -> &HostFile {
        &self.image.file
    }

    /// Checks a request that changes the disk, and does it.
    fn change(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        request: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size())?;
        let done = request();
        self.unflushed.note();
        done.map_err(io_error(op, offset, len))
    }
}

impl BlockBackend for RawDisk {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        let physical_block = self.file().physical_block();
        Limits {
            logical_block: 512,
            physical_block,
            discard_granularity: if self.read_only { 0 } else { physical_block },
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        // SAFETY: a window's memory is writable for as long as it is borrowed.
        unsafe { self.file().read_at(Window::new(bufs).iovecs(), offset) }
            .map_err(io_error("read", offset, len))
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.change("write", offset, total_len(bufs), || {
            // SAFETY: a window's memory is readable for as long as it is borrowed.
            unsafe { self.file().write_at(Window::new(bufs).iovecs(), offset) }
        })
    }

    fn plan(
        &self,
        access: Access,
        offset: u64,
        len: u64,
        plan: &mut Plan,
    ) -> Result<bool, BlockError> {
        check_range(offset, len, self.size())?;
        if access == Access::Write {
            if self.read_only {
                return Err(BlockError::ReadOnly);
            }
            plan.note_changes(Arc::clone(&self.unflushed));
        }
        Ok(plan.push(Piece {
            file: Some(Arc::clone(&self.image.file)),
            offset,
            len,
        }))
    }

    fn map(&self, offset: u64, len: u64) -> Result<MapEntry, BlockError> {
        check_range(offset, len, self.size())?;
        self.stack
            .entry(offset, len)
            .map_err(io_error("map", offset, len))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.unflushed.flush(|| self.file().sync())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.change("discard", offset, len, || self.file().discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.change("zero", offset, len, || {
            self.file().write_zeroes(offset, len, may_unmap)
        })
    }

    /// A block device can only follow what was done to it from outside.
    fn resize(&self, new_size: u64) -> Result<(), BlockError> {
        let unsupported = |reason| {
            Err(BlockError::Unsupported {
                op: "resize",
                reason,
            })
        };
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        let old = self.size();
        if new_size < old {
            return unsupported("it would become smaller, and lose what is at its end");
        }
        if !new_size.is_multiple_of(SECTOR_SIZE) {
            return unsupported("its size has to be a multiple of 512 bytes");
        }
        self.file()
            .grow(new_size)
            .and_then(|()| self.file().sync())
            .map_err(io_error("grow the disk by", old, new_size - old))?;
        self.image.size.store(new_size, Ordering::Release);
        Ok(())
    }
}

impl Drop for RawDisk {
    fn drop(&mut self) {
        if let Err(err) = self.flush() {
            tracing::error!(disk = self.file().name(), error = ?err, "Final flush failed");
        }
    }
}

/// As [`open_layer`](super::open_layer).
pub fn open_layer(
    file: Arc<HostFile>,
    data_files: &[Arc<HostFile>],
    snapshot: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    check_alone(&file, data_files, snapshot)?;
    let name = file.name().to_owned();
    let layer = RawLayer::new(file).map_err(|source| BlockError::File {
        op: "examine",
        path: name,
        source,
    })?;
    Ok(OpenLayer {
        layer: Arc::new(layer),
        backing: None,
        extensions: Vec::new(),
    })
}

/// Refuses what a raw image cannot have.
///
/// # Errors
/// [`BlockError::NoSnapshot`] or [`BlockError::DataFileNotWanted`].
pub fn check_alone(
    file: &HostFile,
    data_files: &[Arc<HostFile>],
    snapshot: Option<&str>,
) -> Result<(), BlockError> {
    let path = || file.name().to_owned();
    if let Some(snapshot) = snapshot {
        return Err(BlockError::NoSnapshot {
            path: path(),
            snapshot: snapshot.to_owned(),
        });
    }
    match data_files.first() {
        None => Ok(()),
        Some(given) => Err(BlockError::DataFileNotWanted {
            path: path(),
            given: given.name().to_owned(),
        }),
    }
}
