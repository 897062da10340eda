//! A disk with a qcow2 image on top of its chain, to be written.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use super::image::Image;
use super::payload::{Payload, Spare};
use crate::host::{Unflushed, Window};
use crate::plan::{Access, Piece, Plan};
use crate::stack::Stack;
use crate::{
    BlockBackend, BlockError, Limits, MapEntry, SECTOR_SIZE, VolatileSlice, check_range, io_error,
    total_len,
};

/// Flushes at the end that are tried until nothing is left to write: the first makes the tables
/// let go of clusters, the second frees them.
const LAST_FLUSHES: u32 = 4;

/// A disk.
pub struct Qcow2Disk {
    pub(super) image: Arc<Image>,
    /// The image and everything below it.
    pub(super) stack: Stack,
    /// Everything below the image.
    pub(super) below: Stack,
    pub(super) spare: Spare,
    /// Held while the disk grows.
    pub(super) growing: Mutex<()>,
    unflushed: Arc<Unflushed>,
}

impl fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Disk")
            .field("image", &self.image)
            .field("below", &self.below)
            .finish_non_exhaustive()
    }
}

impl Qcow2Disk {
    /// A disk of an image that was opened for writing, on top of `below`.
    pub fn new(image: Image, below: Stack) -> Self {
        let image = Arc::new(image);
        let mut layers: Vec<Arc<dyn crate::layer::Layer>> = vec![Arc::clone(&image) as _];
        layers.extend(below.layers().iter().cloned());
        Self {
            image,
            stack: Stack::new(layers),
            below,
            spare: Spare::default(),
            growing: Mutex::default(),
            unflushed: Arc::default(),
        }
    }

    /// Checks a request that changes the disk, and does it.
    pub(super) fn request(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        request: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), BlockError> {
        check_range(offset, len, self.size())?;
        if len == 0 {
            return Ok(());
        }
        let done = request();
        self.unflushed.note();
        self.image.note_damage(&done);
        done.map_err(io_error(op, offset, len))
    }

    /// Adds to `plan` how a range is written in place, if that is possible for all of it.
    fn plan_write(&self, mut offset: u64, len: u64, plan: &mut Plan) -> io::Result<bool> {
        let end = offset + len;
        while offset < end {
            let Some((at, len)) = self.in_place(offset, end - offset)? else {
                return Ok(false);
            };
            let file = Some(Arc::clone(&self.image.data));
            let piece = Piece {
                file,
                offset: at,
                len,
            };
            if !plan.push(piece) {
                return Ok(false);
            }
            offset += len;
        }
        Ok(true)
    }
}

impl BlockBackend for Qcow2Disk {
    /// As in QEMU, a size that is no multiple of a sector is rounded down; qemu-img creates no
    /// such images.
    fn size(&self) -> u64 {
        self.image.disk_size() / SECTOR_SIZE * SECTOR_SIZE
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        let layout = self.image.layout;
        let frees = layout.version > 2 || self.below.size() == 0;
        let unit = u32::try_from(layout.subcluster_size()).unwrap_or(0);
        let logical_block = self.below.logical_block();
        Limits {
            logical_block,
            physical_block: u32::try_from(layout.cluster_size())
                .unwrap_or(4096)
                .clamp(logical_block, 4096),
            discard_granularity: if frees { unit.max(logical_block) } else { 0 },
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        self.stack
            .read(Window::new(bufs), offset)
            .map_err(io_error("read", offset, len))
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let payload = Payload::window(Window::new(bufs));
        self.request("write", offset, payload.len(), || {
            self.write(payload, offset)
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
        plan.hold(self.image.in_flight.join());
        let planned = match access {
            Access::Read => self
                .stack
                .plan(offset, len, plan)
                .map_err(io_error("read", offset, len))?,
            // Whoever does without a plan what cannot be planned finds out why, and tells.
            Access::Write => self.plan_write(offset, len, plan).unwrap_or(false),
        };
        if !planned {
            plan.end();
        } else if access == Access::Write {
            plan.note_changes(Arc::clone(&self.unflushed));
        }
        Ok(planned)
    }

    /// Reads without a plan are of compressed data. Writes that the page cache takes are copies.
    fn takes_time(&self, access: Access) -> bool {
        access == Access::Read || self.image.data.is_direct()
    }

    /// A file system lets one write at a time make a file longer. Where data may have to be copied
    /// from below, several wait for reads.
    fn new_data_waits(&self) -> bool {
        self.below.size() == 0 && !self.image.data.is_device()
    }

    fn map(&self, offset: u64, len: u64) -> Result<MapEntry, BlockError> {
        check_range(offset, len, self.size())?;
        let _pin = self.stack.pin();
        self.stack
            .entry(offset, len)
            .map_err(io_error("map", offset, len))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if !self.image.durable {
            return Ok(());
        }
        self.unflushed.flush(|| self.image.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.request("discard", offset, len, || self.discard_range(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.request("zero", offset, len, || {
            self.zero_range(offset, len, may_unmap)
        })
    }

    fn resize(&self, new_size: u64) -> Result<(), BlockError> {
        self.grow(new_size)
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.request("write", offset, data.len() as u64, || {
            self.write_packed(offset, data)
        })
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if !self.image.durable {
            return;
        }
        let mut done = self.flush();
        for _ in 0..LAST_FLUSHES {
            if done.is_err() || !self.image.has_changes() {
                break;
            }
            done = self.image.flush().map_err(BlockError::Flush);
        }
        if let Err(error) = done {
            let disk = self.image.file.host().name();
            tracing::error!(disk, error = ?error, "Final flush failed");
        }
    }
}
