//! VDI images, read-only.
//!
//! By the header that VirtualBox writes as version 1.1: dynamic and fixed disks. Left out:
//! differencing disks and older versions.
//!
//! Memory: at most 16 MiB of tables.

use std::io;

use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::blocks::{self, Place};
use super::pages::{PageCache, TablePages};
use super::range::FileRange;
use super::refusal::{invalid, unsupported};
use crate::SECTOR_SIZE;
use crate::layer::{Layer, Mapping};

/// What stands behind the 64 bytes of text at the start.
pub const MAGIC: [u8; 4] = [0x7f, 0x10, 0xda, 0xbe];
/// Where that is.
pub const MAGIC_AT: usize = 64;
const VERSION: u32 = 0x0001_0001;
const DYNAMIC: u32 = 1;
const FIXED: u32 = 2;
/// Entries of the table for blocks that are nowhere: never written, and discarded.
const ABSENT: u32 = u32::MAX;
const DISCARDED: u32 = u32::MAX - 1;
/// Largest block taken, in bytes. Writers make them of 1 MiB.
const BLOCK_MAX: u64 = 256 << 20;
/// Largest disk in bytes.
const SIZE_MAX: u64 = 1 << 50;

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    text: [u8; 64],
    magic: [u8; 4],
    version: le::U32,
    header_len: le::U32,
    kind: le::U32,
    flags: le::U32,
    description: [u8; 256],
    table_at: le::U32,
    data_at: le::U32,
    geometry: [le::U32; 3],
    sector_len: le::U32,
    unused: le::U32,
    size: le::U64,
    block_len: le::U32,
    block_extra: le::U32,
    blocks: le::U32,
    blocks_present: le::U32,
    id: [u8; 16],
    snapshot_id: [u8; 16],
    link_id: [u8; 16],
    parent_id: [u8; 16],
}

/// A VDI disk.
#[derive(Debug)]
pub struct VdiDisk {
    tables: TablePages,
    size: u64,
    table_at: u64,
    data_at: u64,
    block_len: u64,
}

impl VdiDisk {
    /// Opens the disk in `range`.
    ///
    /// # Errors
    /// The image breaks the format's rules, or uses what is not supported, or can't be read.
    pub fn open(range: FileRange) -> io::Result<Self> {
        let header: Header = range.read_struct(0)?;
        let size = check(&header)?;
        let (table_at, data_at) = (header.table_at.get(), header.data_at.get());
        let table_len = u64::from(header.blocks.get()) * 4;
        range.part(table_at.into(), table_len)?;
        Ok(Self {
            tables: TablePages::new(range, 0, PageCache::new(table_len)),
            size,
            table_at: table_at.into(),
            data_at: data_at.into(),
            block_len: header.block_len.get().into(),
        })
    }

    fn place(&self, block: u64) -> io::Result<Place> {
        let entry = u32::from_le_bytes(self.tables.read(self.table_at + block * 4)?);
        Ok(match entry {
            ABSENT | DISCARDED => Place::Zero,
            // Below 2^61, as blocks have at most 2^28 bytes.
            number => Place::At(self.data_at + u64::from(number) * self.block_len),
        })
    }
}

/// Refuses what makes no sense or is not supported; returns the size of the disk in bytes.
fn check(header: &Header) -> io::Result<u64> {
    if header.magic != MAGIC {
        return Err(invalid("it does not begin as a VDI image does"));
    }
    if header.version.get() != VERSION {
        let (major, minor) = (header.version.get() >> 16, header.version.get() & 0xffff);
        return Err(unsupported(format!(
            "version {major}.{minor} is not known, only 1.1 is; convert it with `VBoxManage \
             clonemedium`"
        )));
    }
    let alone = [header.link_id, header.parent_id] == [[0; 16]; 2];
    if !alone || ![DYNAMIC, FIXED].contains(&header.kind.get()) {
        return Err(unsupported(
            "it holds only what differs from another disk, such as a snapshot; merge it where it \
             was made (VirtualBox: delete the snapshots, or `VBoxManage clonemedium`)",
        ));
    }
    if u64::from(header.sector_len.get()) != SECTOR_SIZE {
        return Err(unsupported("its sectors are not of 512 bytes"));
    }
    let block_len = u64::from(header.block_len.get());
    if !block_len.is_power_of_two() || !(SECTOR_SIZE..=BLOCK_MAX).contains(&block_len) {
        return Err(invalid(format!(
            "blocks of {block_len} bytes make no sense"
        )));
    }
    if header.block_extra.get() != 0 {
        return Err(unsupported("its blocks have bytes beyond the disk's"));
    }
    // Some writers end the disk within a sector.
    let size = header.size.get().checked_next_multiple_of(SECTOR_SIZE);
    let size = size
        .filter(|&size| size > 0 && size <= SIZE_MAX)
        .ok_or_else(|| invalid("its size makes no sense"))?;
    if size.div_ceil(block_len) > u64::from(header.blocks.get()) {
        let blocks = header.blocks;
        return Err(invalid(format!(
            "its table of {blocks} blocks is too small for the disk"
        )));
    }
    Ok(size)
}

impl Layer for VdiDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let range = self.tables.range();
        blocks::map(range, self.block_len, offset, len, |block| {
            self.place(block)
        })
    }
}
