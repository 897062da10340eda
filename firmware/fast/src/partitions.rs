//! Partition tables: GPT (UEFI 2.10, 5.3) and MBR with logical partitions.
//!
//! Left out: GPT on sectors other than 512 bytes, its backup (whoever mends a table should do so
//! first), and BSD labels.

use alloc::vec;
use alloc::vec::Vec;

use crc::{CRC_32_ISO_HDLC, Crc};

use crate::decline::{Decline, layout};
use crate::disk::{Disk, SECTOR, SECTOR_LEN};

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

const GPT_HEADER_LEN: usize = 92;
const GPT_ENTRY_LEN: usize = 128;
/// More entries than any tool makes; 128 is usual.
const GPT_ENTRIES_MAX: u32 = 1024;
/// More logical partitions than Linux knew on old disks.
const LOGICAL_MAX: u32 = 64;

const ESP: [u8; 16] = guid(
    0xc12a_7328,
    0xf81f,
    0x11d2,
    [0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b],
);
const XBOOTLDR: [u8; 16] = guid(
    0xbc13_c2ff,
    0x59e6,
    0x4262,
    [0xa3, 0x52, 0xb2, 0x75, 0xfd, 0x6f, 0x71, 0x72],
);

const MBR_GPT: u8 = 0xee;
const MBR_ESP: u8 = 0xef;
const MBR_XBOOTLDR: u8 = 0xea;
const MBR_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// The bytes of a GUID on disk.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6],
        d[7],
    ]
}

/// The kind of table a partition is of, as GRUB's names have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
}

/// What the Boot Loader Specification uses a partition for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// EFI system partition.
    Esp,
    /// Extended boot loader partition.
    Xbootldr,
    /// Anything else.
    Other,
}

/// A partition.
#[derive(Debug, Clone)]
pub struct Partition {
    /// The table it is in.
    pub table: Table,
    /// Its number, from 1.
    pub number: u32,
    /// What it is for.
    pub role: Role,
    /// Its bytes.
    pub disk: Disk,
}

/// The partitions of `disk` that lie within it; `None` when it has no table.
///
/// # Errors
/// The table is damaged, or the disk can't be read.
pub fn read(disk: &Disk) -> Result<Option<Vec<Partition>>, Decline> {
    let mut sector = [0; SECTOR_LEN];
    disk.read(0, &mut sector)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(None);
    }
    let entries: Vec<_> = sector[446..510]
        .chunks_exact(16)
        .map(MbrEntry::read)
        .collect();
    if entries.iter().any(|entry| entry.kind == MBR_GPT) {
        return read_gpt(disk).map(Some);
    }
    // A file system's own boot sector ends in the same mark; what follows from here is no table.
    let flags_valid = sector[446..510].chunks_exact(16).all(|e| e[0] & 0x7f == 0);
    if !flags_valid || entries.iter().all(|entry| entry.kind == 0) {
        return Ok(None);
    }
    read_mbr(disk, &entries).map(Some)
}

#[derive(Debug, Clone, Copy)]
struct MbrEntry {
    kind: u8,
    start: u64,
    sectors: u64,
}

impl MbrEntry {
    fn read(bytes: &[u8]) -> Self {
        let dword = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            u64::from(bytes.map_or(0, u32::from_le_bytes))
        };
        Self {
            kind: bytes.get(4).copied().unwrap_or(0),
            start: dword(8),
            sectors: dword(12),
        }
    }

    fn partition(&self, disk: &Disk, base: u64, number: u32) -> Option<Partition> {
        let start = base.checked_add(self.start)?;
        let disk = disk.part(start.checked_mul(SECTOR)?, self.sectors * SECTOR)?;
        let role = match self.kind {
            MBR_ESP => Role::Esp,
            MBR_XBOOTLDR => Role::Xbootldr,
            _ => Role::Other,
        };
        (self.kind != 0 && !disk.is_empty()).then_some(Partition {
            table: Table::Mbr,
            number,
            role,
            disk,
        })
    }
}

fn read_mbr(disk: &Disk, entries: &[MbrEntry]) -> Result<Vec<Partition>, Decline> {
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        if MBR_EXTENDED.contains(&entry.kind) {
            continue;
        }
        partitions.extend(entry.partition(disk, 0, number));
    }
    let extended = entries.iter().find(|e| MBR_EXTENDED.contains(&e.kind));
    if let Some(extended) = extended {
        read_logical(disk, extended.start, &mut partitions)?;
    }
    Ok(partitions)
}

/// Follows the chain of tables in the extended partition at sector `base`.
fn read_logical(disk: &Disk, base: u64, found: &mut Vec<Partition>) -> Result<(), Decline> {
    let mut at = base;
    for number in 5..5 + LOGICAL_MAX {
        let mut sector = [0; SECTOR_LEN];
        disk.read(at * SECTOR, &mut sector)?;
        if sector[510..] != [0x55, 0xaa] {
            return Err(layout("the table of logical partitions is damaged"));
        }
        let entry = MbrEntry::read(&sector[446..462]);
        found.extend(entry.partition(disk, at, number));
        let next = MbrEntry::read(&sector[462..478]);
        if !MBR_EXTENDED.contains(&next.kind) {
            return Ok(());
        }
        at = base + next.start;
    }
    Err(layout("the table of logical partitions has no end"))
}

fn read_gpt(disk: &Disk) -> Result<Vec<Partition>, Decline> {
    let damaged = || layout("the GPT is damaged");
    let mut header = [0; SECTOR_LEN];
    disk.read(SECTOR, &mut header)?;
    let dword = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let qword = |at: usize| u64::from(dword(at)) | u64::from(dword(at + 4)) << 32;
    let len = usize::try_from(dword(12)).map_err(|_| damaged())?;
    if !header.starts_with(b"EFI PART") || !(GPT_HEADER_LEN..=header.len()).contains(&len) {
        return Err(damaged());
    }
    let mut summed = header;
    summed[16..20].fill(0);
    if CRC.checksum(summed.get(..len).unwrap_or_default()) != dword(16) {
        return Err(damaged());
    }
    let (first, count, size) = (qword(72), dword(80), dword(84));
    let size = usize::try_from(size).map_err(|_| damaged())?;
    if count > GPT_ENTRIES_MAX || !(GPT_ENTRY_LEN..=4096).contains(&size) {
        return Err(layout("the GPT has an unusual form"));
    }
    let mut entries = vec![0; size * usize::try_from(count).map_err(|_| damaged())?];
    disk.read(first.checked_mul(SECTOR).ok_or_else(damaged)?, &mut entries)?;
    if CRC.checksum(&entries) != dword(88) {
        return Err(damaged());
    }
    let partition = |(number, entry)| gpt_partition(disk, number, entry);
    let entries = entries.chunks_exact(size);
    Ok((1..).zip(entries).filter_map(partition).collect())
}

fn gpt_partition(disk: &Disk, number: u32, entry: &[u8]) -> Option<Partition> {
    let qword = |at: usize| Some(u64::from_le_bytes(entry.get(at..at + 8)?.try_into().ok()?));
    let kind = entry.get(..16)?;
    let (first, last) = (qword(32)?, qword(40)?);
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let role = match kind {
        _ if kind.iter().all(|byte| *byte == 0) => return None,
        _ if kind == ESP => Role::Esp,
        _ if kind == XBOOTLDR => Role::Xbootldr,
        _ => Role::Other,
    };
    Some(Partition {
        table: Table::Gpt,
        number,
        role,
        disk: disk.part(first.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?)?,
    })
}

#[cfg(test)]
mod tests;
