//! What a VHDX disk is like: sizes of the disk, its blocks and its sectors.

use std::io;

use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::header::{Region, guid};
use super::log::Patches;
use crate::formats::range::FileRange;
use crate::formats::refusal::{invalid, unsupported};

const TABLE_LEN: usize = 64 << 10;
/// Most entries of the table, by the specification.
const ITEMS_MAX: usize = 2047;
const REQUIRED: u32 = 1 << 2;

const FILE_PARAMETERS: [u8; 16] = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: [u8; 16] = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const DISK_ID: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const SECTOR: [u8; 16] = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: [u8; 16] = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT: [u8; 16] = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

const HAS_PARENT: u32 = 1 << 1;
/// Bounds of a block, by the specification.
const BLOCK_MIN: u64 = 1 << 20;
const BLOCK_MAX: u64 = 256 << 20;
/// Largest disk, by the specification.
const SIZE_MAX: u64 = 64 << 40;

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Item {
    id: [u8; 16],
    at: le::U32,
    len: le::U32,
    flags: le::U32,
    reserved: le::U32,
}

/// Sizes, all in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    /// Of the disk.
    pub size: u64,
    /// Of a block.
    pub block_len: u64,
    /// Of a sector as the guest sees it: 512 or 4096.
    pub sector_len: u64,
}

impl Metadata {
    /// Reads it from its region.
    ///
    /// # Errors
    /// It is damaged, or the disk is of a kind that is not supported.
    pub fn read(range: &FileRange, region: Region, patches: &Patches) -> io::Result<Self> {
        let read = |buf: &mut [u8], at: u64, what: &str| {
            let end = at.checked_add(buf.len() as u64);
            if end.is_none_or(|end| end > region.len) {
                return Err(invalid(format!("its {what} is out of bounds")));
            }
            range.read(buf, region.at + at)?;
            patches.apply(buf, region.at + at);
            Ok(())
        };
        let mut table = vec![0; TABLE_LEN];
        read(&mut table, 0, "metadata table")?;
        let number = |item: &Item, len: usize, what: &str| {
            let mut bytes = [0; 8];
            if item.len.get() as usize != len {
                return Err(invalid(format!("its {what} has a wrong length")));
            }
            read(&mut bytes[..len], item.at.get().into(), what)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let (mut parameters, mut size, mut sector_len) = (None, None, None);
        for item in items(&table)? {
            match item.id {
                FILE_PARAMETERS => parameters = Some(number(&item, 8, "block size")?),
                DISK_SIZE => size = Some(number(&item, 8, "disk size")?),
                SECTOR => sector_len = Some(number(&item, 4, "sector size")?),
                DISK_ID | PHYSICAL_SECTOR | PARENT => {}
                _ if item.flags.get() & REQUIRED == 0 => {}
                _ => return Err(unsupported("it needs metadata of an unknown kind")),
            }
        }
        match (parameters, size, sector_len) {
            (Some(parameters), Some(size), Some(sector_len)) => {
                Self::check(parameters, size, sector_len)
            }
            _ => Err(invalid("its metadata does not tell all sizes")),
        }
    }

    fn check(parameters: u64, size: u64, sector_len: u64) -> io::Result<Self> {
        let (block_len, flags) = (parameters & 0xffff_ffff, parameters >> 32);
        if flags & u64::from(HAS_PARENT) != 0 {
            return Err(unsupported(
                "it holds only what differs from another disk (a checkpoint, .avhdx); merge it \
                 where it was made (Hyper-V: delete the checkpoint, or Merge-VHD)",
            ));
        }
        if !block_len.is_power_of_two() || !(BLOCK_MIN..=BLOCK_MAX).contains(&block_len) {
            return Err(invalid(format!(
                "blocks of {block_len} bytes make no sense"
            )));
        }
        if ![512, 4096].contains(&sector_len) {
            return Err(invalid(format!(
                "sectors of {sector_len} bytes make no sense"
            )));
        }
        if size == 0 || size > SIZE_MAX || !size.is_multiple_of(sector_len) {
            return Err(invalid(format!("a disk of {size} bytes makes no sense")));
        }
        Ok(Self {
            size,
            block_len,
            sector_len,
        })
    }
}

fn items(table: &[u8]) -> io::Result<impl Iterator<Item = Item>> {
    let count = table.get(10..12).and_then(|it| it.try_into().ok());
    let count = usize::from(count.map_or(0, u16::from_le_bytes));
    if !table.starts_with(b"metadata") || count > ITEMS_MAX {
        return Err(invalid("its metadata table is damaged"));
    }
    let entries = table.get(32..).unwrap_or_default();
    Ok(entries
        .chunks_exact(size_of::<Item>())
        .take(count)
        .filter_map(|entry| Item::read_from_bytes(entry).ok()))
}
