//! VHDX images, read-only.
//!
//! By Microsoft's "VHDX Format Specification" (MS-VHDX): fixed and dynamic disks. The log of a file
//! that was not closed is read as if it had been carried out; the file stays as it is. Left out:
//! differencing disks.
//!
//! Memory: at most 16 MiB of tables, and for a file that was not closed the sectors that its log
//! changes, less than the log has, which is at most 16 MiB. While such a file is opened, the log
//! itself and an entry of it, so as much twice more.

mod header;
mod log;
mod metadata;

use std::io;

pub use header::MAGIC;

use self::header::{Header, Regions};
use self::log::Patches;
use self::metadata::Metadata;
use super::blocks::{self, Place};
use super::pages::{PageCache, TablePages};
use super::range::FileRange;
use super::refusal::invalid;
use crate::layer::{Layer, Mapping};

/// What an entry of the table says of its block.
mod state {
    pub const NOT_PRESENT: u64 = 0;
    pub const UNDEFINED: u64 = 1;
    pub const ZERO: u64 = 2;
    pub const UNMAPPED: u64 = 3;
    /// Unmapped, as drafts of the specification had it.
    pub const UNMAPPED_DRAFT: u64 = 5;
    pub const FULLY_PRESENT: u64 = 6;
}

/// A VHDX disk.
#[derive(Debug)]
pub struct VhdxDisk {
    tables: TablePages,
    patches: Patches,
    bat_at: u64,
    size: u64,
    sector_len: u64,
    block_len: u64,
    /// After so many entries of blocks the table has one that is of no use here.
    chunk: u64,
}

impl VhdxDisk {
    /// Opens the disk in `range`.
    ///
    /// # Errors
    /// The image breaks the format's rules, or uses what is not supported, or can't be read.
    pub fn open(mut range: FileRange) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        range.read(&mut magic, 0)?;
        if &magic != MAGIC {
            return Err(invalid("it does not begin as a VHDX image does"));
        }
        let patches = Patches::read(&range, &Header::read(&range)?)?;
        range.grow(patches.file_len);
        let regions = Regions::read(&range, &patches)?;
        patches.check(&regions)?;
        let metadata = Metadata::read(&range, regions.metadata, &patches)?;
        let Metadata {
            size,
            block_len,
            sector_len,
        } = metadata;
        // A bitmap block has one bit for each sector, and is of 1 MiB.
        let chunk = (sector_len << 23) / block_len;
        let blocks = size.div_ceil(block_len);
        let table_len = (blocks + (blocks - 1) / chunk) * 8;
        if table_len > regions.bat.len {
            return Err(invalid("its table of blocks is too small for the disk"));
        }
        Ok(Self {
            tables: TablePages::new(range, 0, PageCache::new(table_len)),
            patches,
            bat_at: regions.bat.at,
            size,
            sector_len,
            block_len,
            chunk,
        })
    }

    fn place(&self, block: u64) -> io::Result<Place> {
        let at = self.bat_at + (block + block / self.chunk) * 8;
        let mut entry = self.tables.read(at)?;
        self.patches.apply(&mut entry, at);
        let entry = u64::from_le_bytes(entry);
        match entry & 7 {
            state::NOT_PRESENT
            | state::UNDEFINED
            | state::ZERO
            | state::UNMAPPED
            | state::UNMAPPED_DRAFT => Ok(Place::Zero),
            state::FULLY_PRESENT => Ok(Place::At(entry >> 20 << 20)),
            state => Err(invalid(format!(
                "state {state} of block {block} makes no sense"
            ))),
        }
    }
}

impl Layer for VhdxDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_block(&self) -> u32 {
        u32::try_from(self.sector_len).unwrap_or(512)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let range = self.tables.range();
        blocks::map(range, self.block_len, offset, len, |block| {
            self.place(block)
        })
    }
}
