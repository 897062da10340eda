//! A disk as bytes, over one that reads whole sectors: reads ahead, and ends in time.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;

use crate::decline::{Decline, Reason};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// The same as the length of a buffer.
pub const SECTOR_LEN: usize = 512;

/// What is read at a time where nothing is known of what comes next.
const WINDOW_MIN: usize = 32 << 10;
/// The most that is read ahead.
const WINDOW_MAX: usize = 2 << 20;
/// What all of a boot may read of one disk. Kernels and RAM disks of distributions have 20 to
/// 200 MiB.
const BYTES_MAX: u64 = 2 << 30;
/// How often all of a boot may turn to one disk.
const READS_MAX: u32 = 20_000;

/// A disk's sectors.
pub trait Sectors {
    /// Sectors of the disk.
    fn count(&self) -> u64;

    /// Fills `into`, whole sectors, from sector `first` on. False when the disk can't.
    fn read(&mut self, first: u64, into: &mut [u8]) -> bool;
}

/// Why bytes of a disk can't be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskError {
    /// They are beyond its end.
    Range,
    /// The disk failed.
    Failed,
    /// More was read than any boot needs.
    Budget,
}

impl core::fmt::Display for DiskError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Range => "something lies beyond the end of the disk",
            Self::Failed => "the disk can't be read",
            Self::Budget => "the disk has the firmware read without end",
        })
    }
}

impl core::error::Error for DiskError {}

impl From<DiskError> for Decline {
    fn from(error: DiskError) -> Self {
        Decline::new(Reason::Disk, alloc::format!("{error}"))
    }
}

/// A disk, or a part of one. Clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    cache: Rc<RefCell<Cache>>,
    start: u64,
    len: u64,
}

impl core::fmt::Debug for Disk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Disk")
            .field("start", &self.start)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// All of a disk.
    #[must_use]
    pub fn new(sectors: Box<dyn Sectors>) -> Self {
        let len = sectors.count().saturating_mul(SECTOR);
        let cache = Cache {
            sectors,
            window: Vec::new(),
            start: 0,
            ahead: WINDOW_MIN,
            end: 0,
            bytes: 0,
            reads: 0,
        };
        Self {
            cache: Rc::new(RefCell::new(cache)),
            start: 0,
            len,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part from `start` on of `len` bytes, if there is so much.
    #[must_use]
    pub fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= self.len).then(|| Self {
            cache: Rc::clone(&self.cache),
            start: self.start + start,
            len,
        })
    }

    /// Fills `into` from byte `offset` on.
    ///
    /// # Errors
    /// The bytes are beyond the end, the disk fails, or too much was read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(DiskError::Range);
        }
        self.cache.borrow_mut().read(self.start + offset, into)
    }
}

struct Cache {
    sectors: Box<dyn Sectors>,
    window: Vec<u8>,
    /// Where on the disk the window begins.
    start: u64,
    /// How much the last window took, grown while reads go on where the last one ended.
    ahead: usize,
    /// Where on the disk the last read ended.
    end: u64,
    bytes: u64,
    reads: u32,
}

impl Cache {
    fn read(&mut self, mut offset: u64, mut into: &mut [u8]) -> Result<(), DiskError> {
        while !into.is_empty() {
            let taken = self.take(offset, into);
            if taken > 0 {
                into = into.get_mut(taken..).unwrap_or_default();
                offset += taken as u64;
                continue;
            }
            self.ahead = if self.end == offset / SECTOR * SECTOR {
                (self.ahead * 2).min(WINDOW_MAX)
            } else {
                WINDOW_MIN
            };
            let whole = into.len() / SECTOR_LEN * SECTOR_LEN;
            if whole >= self.ahead && offset.is_multiple_of(SECTOR) {
                let (direct, rest) = into.split_at_mut(whole);
                self.fetch(offset, direct)?;
                into = rest;
                offset += whole as u64;
            } else {
                self.turn(offset)?;
            }
        }
        Ok(())
    }

    /// Copies what the window has; gives how much.
    fn take(&self, offset: u64, into: &mut [u8]) -> usize {
        let at = offset.checked_sub(self.start).map(usize::try_from);
        let Some(Ok(at)) = at else { return 0 };
        let Some(there) = self.window.get(at..) else {
            return 0;
        };
        let len = there.len().min(into.len());
        if let (Some(into), Some(there)) = (into.get_mut(..len), there.get(..len)) {
            into.copy_from_slice(there);
        }
        len
    }

    /// Moves the window to where `offset` is.
    fn turn(&mut self, offset: u64) -> Result<(), DiskError> {
        let start = offset / SECTOR * SECTOR;
        let left = self.sectors.count().saturating_mul(SECTOR) - start;
        let len = usize::try_from(left).map_or(self.ahead, |left| self.ahead.min(left));
        let mut window = core::mem::take(&mut self.window);
        window.resize(len, 0);
        self.fetch(start, &mut window)?;
        self.window = window;
        self.start = start;
        Ok(())
    }

    fn fetch(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.bytes += into.len() as u64;
        self.reads += 1;
        if self.bytes > BYTES_MAX || self.reads > READS_MAX {
            return Err(DiskError::Budget);
        }
        self.end = offset + into.len() as u64;
        if self.sectors.read(offset / SECTOR, into) {
            Ok(())
        } else {
            Err(DiskError::Failed)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Counted, disk_of};

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i ^ (i >> 8)) as u8).collect()
    }

    proptest! {
        #[test]
        fn any_order_of_reads_gives_the_bytes(reads in prop::collection::vec((0..400_000_u64, 0..200_000_usize), 1..20)) {
            let bytes = pattern(300 * 1024);
            let disk = disk_of(bytes.clone());
            for (offset, len) in reads {
                let mut into = vec![0; len];
                let expected = bytes.get(offset as usize..offset as usize + len);
                match disk.read(offset, &mut into) {
                    Ok(()) => prop_assert_eq!(Some(&into[..]), expected),
                    Err(error) => {
                        prop_assert_eq!(error, DiskError::Range);
                        prop_assert!(expected.is_none());
                    }
                }
            }
        }
    }

    #[test]
    fn a_file_read_in_blocks_takes_few_reads() {
        let (sectors, count) = Counted::sectors(pattern(16 << 20));
        let disk = Disk::new(sectors);
        let mut block = vec![0; 32 << 10];
        for offset in (0..16 << 20).step_by(block.len()) {
            disk.read(offset, &mut block).unwrap();
        }
        assert!(count.get() < 16, "{} reads", count.get());
    }

    #[test]
    fn reading_without_end_ends() {
        let disk = disk_of(pattern(1 << 20));
        let mut byte = [0];
        let result = (0..).find_map(|i| disk.read(i % 2 * 700_000, &mut byte).err());
        assert_eq!(result, Some(DiskError::Budget));
    }

    #[test]
    fn parts_end_where_they_end() {
        let disk = disk_of(pattern(4096));
        let part = disk.part(1024, 1024).unwrap();
        let mut two = [0; 2];
        part.read(1022, &mut two).unwrap();
        assert_eq!(two[..], pattern(4096)[2046..2048]);
        assert_eq!(part.read(1023, &mut two), Err(DiskError::Range));
        assert_eq!(part.read(u64::MAX, &mut two), Err(DiskError::Range));
        assert!(disk.part(4000, 97).is_none());
        assert!(disk.part(u64::MAX, 2).is_none());
    }
}
