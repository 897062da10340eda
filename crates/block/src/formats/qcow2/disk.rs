//! A disk with a qcow2 image on top of its chain, to be written.

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
#[derive(Debug)]
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

    /// Adds pieces to `plan` until all of the range is there; whether it worked out.
    fn plan_pieces(&self, access: Access, mut offset: u64, len: u64, plan: &mut Plan) -> io::Result<bool> {
        let end = offset + len;
        while offset < end {
            let piece = match access {
                Access::Read => match self.stack.map(offset, end - offset)? {
                    (source, len) => source.piece(len),
                },
                Access::Write => self.in_place(offset, end - offset)?.map(|(at, len)| Piece {
                    file: Some(Arc::clone(&self.image.data)),
                    offset: at,
                    len,
                }),
            };
            let Some(piece) = piece else {
                return Ok(false);
            };
            offset += piece.len;
            if !plan.push(piece) {
                return Ok(false);
            }
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
        Limits {
            logical_block: 512,
            physical_block: u32::try_from(layout.cluster_size()).unwrap_or(4096).min(4096),
            discard_granularity: if frees { unit } else { 0 },
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
        self.request("write", offset, payload.len(), || self.write(payload, offset))
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
        let done = self.plan_pieces(access, offset, len, plan);
        if access == Access::Write {
            if let Err(error) = &done {
                // Whoever does the request without a plan finds out again, and tells.
                tracing::debug!(%error, "A write was not planned");
                plan.end();
                return Ok(false);
            }
            plan.note_changes(Arc::clone(&self.unflushed));
        }
        let planned = done.map_err(io_error("read", offset, len))?;
        if !planned {
            plan.end();
        }
        Ok(planned)
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
