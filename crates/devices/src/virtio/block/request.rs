//! What a chain asks for: header, data and status byte (virtio 1.2, 5.2.6).

use edgevmm_block::SECTOR_SIZE;
use edgevmm_block::engine::{Operation, Request};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::config::MAX_RANGE_SECTORS;
use crate::disk::jobs::FLUSH;
use crate::virtio::DriverError;
use crate::virtio::ring::Chain;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RangeSegment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// What a chain asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Something of the disk.
    Disk(Request),
    /// The serial number.
    GetId,
    /// Nothing at all, such as a discard of no sectors.
    Nothing,
    /// What the device never said it could do.
    Unsupported,
    /// What makes no sense, such as a length that is no multiple of a sector.
    Invalid(&'static str),
}

/// What the driver may ask for, and of which disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Sectors of the disk.
    pub(super) sectors: u64,
    /// The driver accepted discard.
    pub(super) discard: bool,
    /// The driver accepted write zeroes.
    pub(super) write_zeroes: bool,
}

impl Command {
    /// Reads a chain's header and detaches its status byte. What is left of it is the data.
    ///
    /// # Errors
    /// The chain is no block request at all.
    pub(super) fn read(chain: &mut Chain, terms: &Terms) -> Result<Self, DriverError> {
        let mut header = Header::new_zeroed();
        if chain.readable.copy_out(header.as_mut_bytes()) < size_of::<Header>() {
            return Err(DriverError::Chain("the request header is too short"));
        }
        chain.detach_status()?;
        let sector = header.sector.get();
        let transfer = |operation, len| match offset_of(sector, len, terms) {
            Ok(offset) => Self::Disk(Request {
                operation,
                offset,
                len,
            }),
            Err(reason) => Self::Invalid(reason),
        };
        Ok(match header.kind.get() {
            VIRTIO_BLK_T_IN => transfer(Operation::Read, chain.writable.bytes()),
            VIRTIO_BLK_T_OUT => transfer(Operation::Write, chain.readable.bytes()),
            VIRTIO_BLK_T_FLUSH => Self::Disk(FLUSH),
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD if terms.discard => range(chain, terms, 0, |_| Operation::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES if terms.write_zeroes => {
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                range(chain, terms, unmap, |flags| Operation::WriteZeroes {
                    may_unmap: flags & unmap != 0,
                })
            }
            _ => Self::Unsupported,
        })
    }

    /// Whether it changes what is on the disk.
    pub(super) fn is_change(self) -> bool {
        matches!(
            self,
            Self::Disk(Request {
                operation: Operation::Write | Operation::Discard | Operation::WriteZeroes { .. },
                ..
            })
        )
    }
}

/// Takes the one segment of a discard or write-zeroes request.
fn range(
    chain: &mut Chain,
    terms: &Terms,
    known_flags: u32,
    operation: impl FnOnce(u32) -> Operation,
) -> Command {
    let mut segment = RangeSegment::new_zeroed();
    let expected = size_of::<RangeSegment>();
    if chain.readable.bytes() != expected as u64
        || chain.readable.copy_out(segment.as_mut_bytes()) != expected
    {
        return Command::Invalid("it has not exactly one segment");
    }
    let sectors = segment.num_sectors.get();
    if sectors > MAX_RANGE_SECTORS {
        return Command::Invalid("its range is too long");
    }
    let len = u64::from(sectors) * SECTOR_SIZE;
    match offset_of(segment.sector.get(), len, terms) {
        Err(reason) => Command::Invalid(reason),
        Ok(_) if segment.flags.get() & !known_flags != 0 => Command::Unsupported,
        Ok(_) if len == 0 => Command::Nothing,
        Ok(offset) => Command::Disk(Request {
            operation: operation(segment.flags.get()),
            offset,
            len,
        }),
    }
}

/// The byte offset of `sector`, provided that `len` bytes from there are on the disk.
fn offset_of(sector: u64, len: u64, terms: &Terms) -> Result<u64, &'static str> {
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err("its length is no multiple of a sector");
    }
    match sector.checked_add(len / SECTOR_SIZE) {
        Some(end) if end <= terms.sectors => Ok(sector * SECTOR_SIZE),
        _ => Err("it reaches past the end of the disk"),
    }
}
