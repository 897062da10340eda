//! Telling which parts of a disk are where.

use edgevmm_block::{DiskPaths, MapEntry, MapKind};
use serde::Serialize;

use crate::disk::Disk;
use crate::{ImageError, Job};

/// A range of a disk, all of it stored in one way. Written as JSON it is as `qemu-img map` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapRange {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Bytes in it.
    pub length: u64,
    /// Which image of the chain has it: 0 is the topmost. 0 too if none has it.
    pub depth: usize,
    /// Some image says what it reads as.
    pub present: bool,
    /// It reads as zeroes without anything being read.
    pub zero: bool,
    /// It has to be read.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// Where in the image's file it is, in bytes, if it is there as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl MapRange {
    fn new(start: u64, entry: &MapEntry) -> Self {
        let present = entry.kind != MapKind::Unallocated;
        Self {
            start,
            length: entry.len,
            depth: if present { entry.depth } else { 0 },
            present,
            zero: matches!(entry.kind, MapKind::Zero | MapKind::Unallocated),
            data: matches!(entry.kind, MapKind::Data | MapKind::Compressed),
            compressed: entry.kind == MapKind::Compressed,
            offset: entry.host_offset,
        }
    }

    /// Takes `next`, which follows, into this range if it is stored in the same way.
    fn extend(&mut self, next: &Self) -> bool {
        let follows = Self {
            start: self.start + self.length,
            length: next.length,
            offset: self.offset.map(|offset| offset + self.length),
            ..*self
        };
        if follows != *next {
            return false;
        }
        self.length += next.length;
        true
    }
}

/// Tells `range` of all parts of a disk, in order, each as long as can be.
///
/// # Errors
///
/// The image can't be read, or `range` fails.
pub fn map(
    disk: &DiskPaths,
    job: &Job<'_>,
    mut range: impl FnMut(&MapRange) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let disk = Disk::open(disk.open(false)?)?;
    let size = disk.size();
    let mut pending: Option<MapRange> = None;
    let mut at = 0;
    while at < size {
        job.check("nothing was changed")?;
        job.report(at, size);
        let next = MapRange::new(at, &disk.map(at, size - at)?);
        at += next.length;
        if pending.as_mut().is_some_and(|last| last.extend(&next)) {
            continue;
        }
        if let Some(last) = pending.replace(next) {
            range(&last)?;
        }
    }
    job.report(size, size);
    pending.map_or(Ok(()), |last| range(&last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, kind: MapKind, host_offset: Option<u64>) -> MapRange {
        let entry = MapEntry {
            kind,
            len: 10,
            depth: 1,
            host_offset,
        };
        MapRange::new(start, &entry)
    }

    #[test]
    fn ranges_grow_as_long_as_they_stay_the_same() {
        let mut first = range(0, MapKind::Data, Some(100));
        assert!(!first.extend(&range(10, MapKind::Data, Some(120))));
        assert!(!first.extend(&range(10, MapKind::Zero, None)));
        assert!(first.extend(&range(10, MapKind::Data, Some(110))));
        assert!(first.extend(&range(20, MapKind::Data, Some(120))));
        assert_eq!((first.start, first.length), (0, 30));
        let mut zero = range(0, MapKind::Zero, None);
        assert!(!zero.extend(&range(10, MapKind::Unallocated, None)));
        assert!(zero.extend(&range(10, MapKind::Zero, None)));
    }
}
