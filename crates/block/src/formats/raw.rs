//! Raw images: the file's bytes are the disk's bytes.
//!
//! Guest memory goes straight to the kernel, without a copy or an allocation. With the page cache
//! off, requests go through imago's storage layer, which realigns what the host would refuse.

use std::io;
use std::sync::Arc;

use imago::StorageExt;
use imago::io_buffers::{IoVector, IoVectorMut};
use libc::iovec;

use super::OpenLayer;
use crate::host::{HostFile, Unflushed};
use crate::layer::{Extent, Layer, Mapping};
use crate::storage::ImageFile;
use crate::{
    BlockBackend, BlockError, Limits, SECTOR_SIZE, VolatileSlice, check_range, io_error, total_len,
};

/// A raw image.
#[derive(Debug)]
pub struct RawDisk {
    file: ImageFile,
    size: u64,
    read_only: bool,
    direct: bool,
    unflushed: Unflushed,
}

impl RawDisk {
    /// Uses all of `file`.
    ///
    /// A length that is no multiple of a sector is rounded up, so that the guest can reach every
    /// byte of the file: the missing bytes read as zeroes and the first write to them extends the
    /// file.
    pub fn new(file: ImageFile, read_only: bool) -> io::Result<Self> {
        let size = file
            .host()
            .len()?
            .checked_next_multiple_of(SECTOR_SIZE)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let direct = file.host().is_direct();
        Ok(Self {
            file,
            size,
            read_only,
            direct,
            unflushed: Unflushed::default(),
        })
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
        check_range(offset, len, self.size)?;
        let done = request();
        self.unflushed.note();
        done.map_err(io_error(op, offset, len))
    }
}

impl BlockBackend for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block: 512,
            physical_block: self.file.host().physical_block(),
            discard_granularity: if self.read_only {
                0
            } else {
                self.file.host().physical_block()
            },
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let len = total_len(bufs);
        check_range(offset, len, self.size)?;
        let done = if self.direct {
            let (vector, _mapped) = IoVectorMut::from_volatile_slice(bufs);
            self.file.readv(vector, offset)
        } else {
            let iovecs = bufs.iter().map(|buf| {
                let guard = buf.ptr_guard_mut();
                iovec {
                    iov_base: guard.as_ptr().cast(),
                    iov_len: guard.len(),
                }
            });
            // SAFETY: a VolatileSlice is writable for as long as it is borrowed; its pointer guard
            // holds nothing, as guest memory is always mapped here.
            unsafe { self.file.host().read_at(iovecs, offset) }
        };
        done.map_err(io_error("read", offset, len))
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.change("write", offset, total_len(bufs), || {
            if self.direct {
                let (vector, _mapped) = IoVector::from_volatile_slice(bufs);
                return self.file.writev(vector, offset);
            }
            let iovecs = bufs.iter().map(|buf| {
                let guard = buf.ptr_guard();
                iovec {
                    iov_base: guard.as_ptr().cast_mut().cast(),
                    iov_len: guard.len(),
                }
            });
            // SAFETY: a VolatileSlice is readable for as long as it is borrowed; its pointer guard
            // holds nothing, as guest memory is always mapped here.
            unsafe { self.file.host().write_at(iovecs, offset) }
        })
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.unflushed.flush(|| self.file.host().sync())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.change("discard", offset, len, || {
            StorageExt::discard(&self.file, offset, len)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.change("zero", offset, len, || {
            if may_unmap {
                StorageExt::write_zeroes(&self.file, offset, len)
            } else {
                self.file.write_allocated_zeroes(offset, len)
            }
        })
    }
}

impl Drop for RawDisk {
    fn drop(&mut self) {
        if let Err(err) = self.flush() {
            tracing::error!(disk = self.file.host().name(), error = ?err, "Final flush failed");
        }
    }
}

/// A raw image that is only read.
#[derive(Debug)]
struct RawLayer {
    file: Arc<HostFile>,
    size: u64,
}

impl Layer for RawLayer {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let file = &self.file;
        Ok(Mapping {
            extent: Extent::Data { file, offset },
            len,
        })
    }
}

/// As [`open_layer`](super::open_layer).
pub fn open_layer(
    file: Arc<HostFile>,
    data_files: &[Arc<HostFile>],
    snapshot: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    let name = || file.name().to_owned();
    if let Some(snapshot) = snapshot {
        return Err(BlockError::NoSnapshot {
            path: name(),
            snapshot: snapshot.to_owned(),
        });
    }
    if let Some(given) = data_files.first() {
        return Err(BlockError::DataFileNotWanted {
            path: name(),
            given: given.name().to_owned(),
        });
    }
    let size = file.len().map_err(|source| BlockError::File {
        op: "examine",
        path: name(),
        source,
    })?;
    Ok(OpenLayer {
        layer: Arc::new(RawLayer { file, size }),
        backing: None,
    })
}
