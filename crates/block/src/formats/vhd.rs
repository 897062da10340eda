//! VHD images (QEMU's "vpc"), read-only.
//!
//! By Microsoft's "Virtual Hard Disk Image Format Specification" 1.0: fixed and dynamic disks.
//! Left out: differencing disks, and the bitmaps of written sectors, which only those need; what a
//! dynamic disk has not written within a block is zero there.
//!
//! A fixed disk is told from a raw one by its end only, which the guest that writes to a raw disk
//! can forge; so it is never detected, and has to be asked for.
//!
//! Memory: at most 16 MiB of tables.

use std::io;

use zerocopy::big_endian as be;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::blocks::{self, Place};
use super::pages::{PageCache, TablePages};
use super::range::FileRange;
use super::refusal::{invalid, unsupported};
use crate::SECTOR_SIZE;
use crate::layer::{Layer, Mapping};

/// What the footer begins with, a copy of which is at the start of a dynamic disk.
pub const COOKIE: &[u8; 8] = b"conectix";
const HEADER_COOKIE: &[u8; 8] = b"cxsparse";
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// The only version there is.
const VERSION: u32 = 0x0001_0000;
/// An entry of the table for a block that is nowhere.
const ABSENT: u32 = u32::MAX;
/// Largest block taken, in bytes. Writers make them of 2 MiB, or half a MiB.
const BLOCK_MAX: u64 = 256 << 20;
/// Largest disk in bytes; the tables allow hardly more than 2 TiB.
const SIZE_MAX: u64 = 64 << 40;
/// Sectors by the largest geometry that can be told; the disk may be larger.
const GEOMETRY_MAX: u64 = 65535 * 16 * 255;
/// Programs whose disks have the size of their geometry: Virtual PC and QEMU.
const BY_GEOMETRY: [&[u8; 4]; 2] = [b"vpc ", b"qemu"];

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Footer {
    cookie: [u8; 8],
    features: be::U32,
    version: be::U32,
    header_at: be::U64,
    time: be::U32,
    creator: [u8; 4],
    creator_version: be::U32,
    creator_system: [u8; 4],
    original_size: be::U64,
    size: be::U64,
    cylinders: be::U16,
    heads: u8,
    sectors: u8,
    kind: be::U32,
    checksum: be::U32,
    id: [u8; 16],
    saved: u8,
    padding: [u8; 427],
}

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    cookie: [u8; 8],
    next: be::U64,
    table_at: be::U64,
    version: be::U32,
    blocks: be::U32,
    block_len: be::U32,
    checksum: be::U32,
    parent_id: [u8; 16],
    parent_time: be::U32,
    reserved: be::U32,
    parent_name: [u8; 512],
    parent_places: [u8; 192],
    padding: [u8; 256],
}

/// A VHD disk.
#[derive(Debug)]
pub enum VhdDisk {
    /// The bytes of the disk as they are.
    Fixed(FileRange),
    /// Blocks and a table of them.
    Dynamic(Dynamic),
}

/// A disk that grows as it is written.
#[derive(Debug)]
pub struct Dynamic {
    tables: TablePages,
    size: u64,
    table_at: u64,
    block_len: u64,
    /// Bytes of the bitmap that stands before each block.
    bitmap_len: u64,
}

impl VhdDisk {
    /// Opens the disk in `range`.
    ///
    /// # Errors
    /// The image breaks the format's rules, or uses what is not supported, or can't be read.
    pub fn open(range: FileRange) -> io::Result<Self> {
        let (footer, footer_at) = read_footer(&range)?;
        let size = size(&footer)?;
        match footer.kind.get() {
            FIXED if footer_at >= size => range.part(0, size).map(Self::Fixed),
            FIXED => Err(invalid(format!(
                "it is cut off: of a disk of {size} bytes it has {footer_at}"
            ))),
            DYNAMIC => Dynamic::open(range, &footer, size).map(Self::Dynamic),
            DIFFERENCING => Err(unsupported(
                "it holds only what differs from another disk; merge it into that one where it \
                 was made (Hyper-V: Merge-VHD)",
            )),
            kind => Err(invalid(format!("its kind of disk, {kind}, is not known"))),
        }
    }
}

/// The footer and where it should be. A dynamic disk has a copy of it at the start, so one of them
/// may be damaged; in a fixed disk that is what the guest wrote, so the one at the end counts.
fn read_footer(range: &FileRange) -> io::Result<(Footer, u64)> {
    let last = range
        .len()
        .checked_sub(size_of::<Footer>() as u64)
        .ok_or_else(|| invalid("it is shorter than its footer"))?;
    let mut problem = invalid("it has no VHD footer; if it is a raw disk, give format=raw");
    for at in [last, 0] {
        let footer: Footer = range.read_struct(at)?;
        if &footer.cookie != COOKIE {
            continue;
        }
        if !is_sound(footer.as_bytes(), footer.checksum) {
            problem = invalid("its footer is damaged (wrong checksum)");
        } else if footer.version.get() != VERSION {
            problem = unsupported(format!("version {:#x} is not known", footer.version));
        } else {
            return Ok((footer, last));
        }
    }
    Err(problem)
}

/// Whether `checksum` is that of the bytes of the structure that it is a part of: the sum of all
/// other bytes, inverted.
fn is_sound(bytes: &[u8], checksum: be::U32) -> bool {
    let sum = |bytes: &[u8]| -> u32 { bytes.iter().map(|&byte| u32::from(byte)).sum() };
    // A structure has no more than 1024 bytes, so neither overflows.
    !(sum(bytes) - sum(checksum.as_bytes())) == checksum.get()
}

/// Size of the disk in bytes.
///
/// Virtual PC showed a guest the disk that the geometry tells of, and QEMU makes disks for that
/// unless told otherwise; other programs take the size for what it is. The largest geometry stands
/// for disks beyond it. QEMU 10 decides the same.
fn size(footer: &Footer) -> io::Result<u64> {
    let geometry =
        u64::from(footer.cylinders.get()) * u64::from(footer.heads) * u64::from(footer.sectors);
    let size = if BY_GEOMETRY.contains(&&footer.creator) && geometry != GEOMETRY_MAX {
        geometry * SECTOR_SIZE
    } else {
        footer.size.get() / SECTOR_SIZE * SECTOR_SIZE
    };
    if size == 0 || size > SIZE_MAX {
        return Err(invalid("its size makes no sense"));
    }
    Ok(size)
}

impl Dynamic {
    fn open(range: FileRange, footer: &Footer, size: u64) -> io::Result<Self> {
        let header: Header = range.read_struct(footer.header_at.get())?;
        if &header.cookie != HEADER_COOKIE {
            return Err(invalid("it has no header where its footer says it is"));
        }
        if !is_sound(header.as_bytes(), header.checksum) {
            return Err(invalid("its header is damaged (wrong checksum)"));
        }
        let block_len = u64::from(header.block_len.get());
        if !block_len.is_power_of_two() || !(SECTOR_SIZE..=BLOCK_MAX).contains(&block_len) {
            return Err(invalid(format!(
                "blocks of {block_len} bytes make no sense"
            )));
        }
        let blocks = u64::from(header.blocks.get());
        if size.div_ceil(block_len) > blocks {
            return Err(invalid(format!(
                "its table of {blocks} blocks is too small for the disk"
            )));
        }
        let (table_at, table_len) = (header.table_at.get(), blocks * 4);
        // So that adding to its offset never overflows.
        range.part(table_at, table_len)?;
        Ok(Self {
            tables: TablePages::new(range, 0, PageCache::new(table_len)),
            size,
            table_at,
            block_len,
            bitmap_len: (block_len / SECTOR_SIZE)
                .div_ceil(8)
                .next_multiple_of(SECTOR_SIZE),
        })
    }

    fn place(&self, block: u64) -> io::Result<Place> {
        let entry = u32::from_be_bytes(self.tables.read(self.table_at + block * 4)?);
        Ok(match entry {
            ABSENT => Place::Zero,
            sector => Place::At(u64::from(sector) * SECTOR_SIZE + self.bitmap_len),
        })
    }
}

impl Layer for VhdDisk {
    fn size(&self) -> u64 {
        match self {
            Self::Fixed(range) => range.len(),
            Self::Dynamic(disk) => disk.size,
        }
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        match self {
            Self::Fixed(range) => range.map(offset, len),
            Self::Dynamic(disk) => {
                let range = disk.tables.range();
                blocks::map(range, disk.block_len, offset, len, |block| {
                    disk.place(block)
                })
            }
        }
    }
}
