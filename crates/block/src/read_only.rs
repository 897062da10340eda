//! A chain of images of any format as a disk that is only read.

use crate::host::Window;
use crate::plan::{Access, Plan};
use crate::stack::Stack;
use crate::{
    BlockBackend, BlockError, Limits, MapEntry, SECTOR_SIZE, VolatileSlice, check_range, io_error,
    total_len,
};

/// A disk that is only read.
#[derive(Debug)]
pub struct ReadOnlyDisk {
    stack: Stack,
    size: u64,
}

impl ReadOnlyDisk {
    /// A disk of these images.
    ///
    /// As in QEMU, a size that is no multiple of a sector is rounded down; it is that only of
    /// images which nobody makes.
    pub fn new(stack: Stack) -> Self {
        let size = stack.size() / SECTOR_SIZE * SECTOR_SIZE;
        Self { stack, size }
    }
}

impl BlockBackend for ReadOnlyDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block: self.stack.logical_block(),
            physical_block: 4096,
            discard_granularity: 0,
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        let len = total_len(bufs);
        check_range(offset, len, self.size)?;
        self.stack
            .read(Window::new(bufs), offset)
            .map_err(io_error("read", offset, len))
    }

    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn plan(
        &self,
        access: Access,
        offset: u64,
        len: u64,
        plan: &mut Plan,
    ) -> Result<bool, BlockError> {
        if access == Access::Write {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size)?;
        plan.hold(self.stack.pin());
        let planned = self
            .stack
            .plan(offset, len, plan)
            .map_err(io_error("read", offset, len))?;
        if !planned {
            plan.end();
        }
        Ok(planned)
    }

    fn map(&self, offset: u64, len: u64) -> Result<MapEntry, BlockError> {
        check_range(offset, len, self.size)?;
        self.stack
            .entry(offset, len)
            .map_err(io_error("map", offset, len))
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn resize(&self, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_compressed(&self, _: u64, _: &[u8]) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}
