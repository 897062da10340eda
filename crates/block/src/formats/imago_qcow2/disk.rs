//! The block device on top of a chain of layers.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use imago::FormatAccess;
use imago::io_buffers::{IoVector, IoVectorMut};

use super::WriteOrder;
use crate::host::Unflushed;
use crate::storage::ImageFile;
use crate::{
    BlockBackend, BlockError, Limits, SECTOR_SIZE, VolatileSlice, check_range, io_error, total_len,
};

/// Bytes of zeroes written at a time to an image that cannot mark clusters as zero.
const ZEROES_LEN: usize = 64 << 10;
static ZEROES: [u8; ZEROES_LEN] = [0; ZEROES_LEN];

/// A chain of layers with a qcow2 image, or a snapshot's overlay, on top.
///
/// imago describes each request by vectors of its own, so unlike raw images this one allocates a
/// few small vectors for each request.
#[derive(Debug)]
pub struct Qcow2Disk {
    /// Shared by requests; exclusive for those that free clusters others may be reading.
    image: RwLock<FormatAccess<ImageFile>>,
    name: String,
    size: u64,
    kind: Kind,
    /// Absent if nothing need be durable.
    order: Option<Arc<WriteOrder>>,
    cluster_size: u32,
    unflushed: Unflushed,
}

/// What a disk is for, which decides what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every change is refused.
    ReadOnly,
    /// An image of version 2 with a backing file: nothing in it can hide the backing file's data,
    /// so discards do nothing and zeroes are data.
    WritableV2Overlay,
    /// An image of version 2 without a backing file: freed clusters read as zeroes.
    WritableV2,
    /// An image of version 3.
    Writable,
    /// A version 3 overlay that dies with this process, so nothing in it need be durable.
    Temporary,
}

impl Qcow2Disk {
    /// Wraps the topmost layer.
    ///
    /// As in QEMU, a size that is no multiple of a sector is rounded down; qemu-img creates no
    /// such images.
    pub fn new(
        image: FormatAccess<ImageFile>,
        name: String,
        cluster_size: u64,
        kind: Kind,
        order: Option<Arc<WriteOrder>>,
    ) -> Self {
        let size = image.size() / SECTOR_SIZE * SECTOR_SIZE;
        Self {
            image: RwLock::new(image),
            name,
            size,
            kind,
            order,
            cluster_size: u32::try_from(cluster_size).unwrap_or(0),
            unflushed: Unflushed::default(),
        }
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a request that changes the disk, and does it.
    fn change(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        request: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), BlockError> {
        if self.kind == Kind::ReadOnly {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size)?;
        if len == 0 {
            return Ok(());
        }
        let done = request();
        self.unflushed.note();
        done.map_err(io_error(op, offset, len))
    }

    /// Frees clusters so that they read as zeroes.
    fn free(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        if self.kind == Kind::WritableV2 {
            image.discard_to_backing(offset, len)
        } else {
            image.discard_to_zero(offset, len)
        }
    }

    fn write_zero_data(&self, offset: u64, len: u64) -> io::Result<()> {
        let image = self.shared();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let chunk = usize::try_from(end - at)
                .unwrap_or(ZEROES_LEN)
                .min(ZEROES_LEN);
            image.write(&ZEROES[..chunk], at)?;
            at += chunk as u64;
        }
        Ok(())
    }
}

impl BlockBackend for Qcow2Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.kind == Kind::ReadOnly
    }

    fn limits(&self) -> Limits {
        let frees = !matches!(self.kind, Kind::ReadOnly | Kind::WritableV2Overlay);
        Limits {
            logical_block: 512,
            physical_block: self.cluster_size.min(4096),
            discard_granularity: if frees { self.cluster_size } else { 0 },
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let len = total_len(bufs);
        check_range(offset, len, self.size)?;
        if len == 0 {
            return Ok(());
        }
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(bufs);
        self.shared()
            .readv(vector, offset)
            .map_err(io_error("read", offset, len))
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.change("write", offset, total_len(bufs), || {
            let (vector, _mapped) = IoVector::from_volatile_slice(bufs);
            self.shared().writev(vector, offset)
        })
    }

    fn flush(&self) -> Result<(), BlockError> {
        let Some(order) = &self.order else {
            return Ok(());
        };
        self.unflushed.flush(|| {
            let image = self.shared();
            let kept = order.begin_flush();
            let flushed = image.flush().and_then(|()| image.sync());
            order.end_flush(kept, flushed)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.change("discard", offset, len, || {
            if self.kind == Kind::WritableV2Overlay {
                return Ok(());
            }
            // Only whole clusters: zeroing the rest would cost writes to no use.
            let cluster = u64::from(self.cluster_size);
            let start = offset.next_multiple_of(cluster);
            let end = if offset + len == self.size {
                self.size
            } else {
                (offset + len) / cluster * cluster
            };
            if start < end {
                self.free(start, end - start)
            } else {
                Ok(())
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.change("zero", offset, len, || match self.kind {
            Kind::WritableV2 | Kind::WritableV2Overlay => self.write_zero_data(offset, len),
            _ if may_unmap => self.free(offset, len),
            _ => self.shared().write_zeroes(offset, len),
        })
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if let Err(err) = self.flush() {
            tracing::error!(disk = self.name, error = ?err, "Final flush failed");
        }
    }
}
