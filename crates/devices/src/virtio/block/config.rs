//! The config space (virtio 1.2, 5.2.4) up to the last field of a feature that we offer.

use edgevmm_block::{Limits, SECTOR_SIZE};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// Most sectors of one discard or write-zeroes request: 2 GiB less a sector, which keeps a
/// request's byte count within 31 bits.
pub(super) const MAX_RANGE_SECTORS: u32 = 0x3f_ffff;

/// Segments of one discard or write-zeroes request.
pub(super) const MAX_RANGE_SEGMENTS: u32 = 1;

#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    pub(super) writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Where `writeback` is, the one field that a driver may write.
pub(super) const WRITEBACK_OFFSET: u64 = std::mem::offset_of!(ConfigSpace, writeback) as u64;

impl ConfigSpace {
    pub(super) fn new(size: u64, limits: Limits, queues: u16, seg_max: u16) -> Self {
        let logical = limits.logical_block.max(1);
        let ratio = (limits.physical_block / logical).max(1);
        let exponent = u8::try_from(ratio.ilog2()).unwrap_or(0);
        let sector = u32::try_from(SECTOR_SIZE).unwrap_or(512);
        Self {
            capacity: (size / SECTOR_SIZE).into(),
            size_max: 0.into(),
            seg_max: u32::from(seg_max).into(),
            geometry: [0; 4],
            blk_size: limits.logical_block.into(),
            physical_block_exp: exponent,
            alignment_offset: 0,
            min_io_size: u16::try_from(ratio).unwrap_or(1).into(),
            opt_io_size: 0.into(),
            writeback: 1,
            unused0: 0,
            num_queues: queues.into(),
            max_discard_sectors: MAX_RANGE_SECTORS.into(),
            max_discard_seg: MAX_RANGE_SEGMENTS.into(),
            discard_sector_alignment: (limits.discard_granularity / sector).max(1).into(),
            max_write_zeroes_sectors: MAX_RANGE_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGE_SEGMENTS.into(),
            write_zeroes_may_unmap: u8::from(limits.discard_granularity > 0),
            unused1: [0; 3],
        }
    }
}
