//! Counting references: everything that an image's metadata points at.

use std::io;

use super::Checker;
use crate::formats::qcow2::entry::{COMPRESSED, COPIED, Entry, OFFSET_MASK, Place, words};
use crate::formats::qcow2::header::{BITMAPS, u32_at, u64_at};
use crate::formats::qcow2::open::read_table;
use crate::formats::qcow2::places::Use;
use crate::formats::qcow2::snapshots::Directory;

/// Bits of an entry of an L1 table that have no meaning, and of one of an L2 table.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of an entry of a bitmap table that have no meaning if it has an offset.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01ff;
/// Clusters past the end of the file that are kept in mind: those of 64 GiB with the usual size.
const MAX_DANGLING: usize = 1 << 20;
/// Longest directory and table of a bitmap that are looked at, in bytes; as in QEMU.
const MAX_BITMAP_BYTES: u64 = 64 << 20;

/// An L1 table.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    pub offset: u64,
    pub entries: u64,
    /// It is that of the disk, not of a snapshot.
    pub active: bool,
}

impl Checker<'_> {
    /// Counts all references.
    ///
    /// # Errors
    /// Metadata can't be read.
    pub fn walk(&mut self) -> io::Result<()> {
        let header = self.header.clone();
        self.count("header", 0, 1)?;
        self.own(Use::Header, 0, 1, true)?;
        let directory = match Directory::read(self.file, &header) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.corrupt(format!("The table of snapshots is damaged: {error}"));
                self.lost = true;
                Directory::default()
            }
            Err(error) => return Err(error),
        };
        let (offset, len) = (header.snapshots_offset, directory.len);
        if self.count("snapshot table", offset, len)? && len > 0 {
            self.own(Use::Snapshots, offset, len, true)?;
        }
        let mut roots = vec![Root {
            offset: header.l1_offset,
            entries: header.l1_entries.into(),
            active: true,
        }];
        roots.extend(directory.records.iter().map(|record| Root {
            offset: record.l1_offset,
            entries: record.l1_entries.into(),
            active: false,
        }));
        self.plan(roots.len())?;
        for root in roots {
            self.walk_l1(root)?;
        }
        self.walk_bitmaps()?;
        if let Some((offset, len)) = header.encryption_header() {
            self.count("encryption header", offset, len)?;
        }
        self.walk_refcounts()?;
        self.find_shared();
        Ok(())
    }

    /// Counts the clusters that `len` bytes at `offset` touch. Returns whether they are in the
    /// file.
    fn count(&mut self, what: &str, offset: u64, len: u64) -> io::Result<bool> {
        let inside = self.count_inside(what, offset, len)?;
        if !inside {
            if self.dangling.len() >= MAX_DANGLING {
                return Err(io::Error::other(
                    "there is too much that is past the end of the file; copy the image again",
                ));
            }
            let end = self.layout.clusters(offset.saturating_add(len));
            self.dangling
                .extend((self.layout.cluster_of(offset)..end).take(2));
        }
        Ok(inside)
    }

    /// [`Self::count`], but does not keep in mind what is past the end of the file.
    fn count_inside(&mut self, what: &str, offset: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let end = offset.saturating_add(len);
        let clusters = self.layout.cluster_of(offset)..self.layout.clusters(end);
        // The last cluster of a file need not be whole.
        if clusters.end > self.layout.clusters(self.file_len) {
            self.corrupt(format!(
                "The {what} at offset {offset} reaches past the end of the file at {}",
                self.file_len
            ));
            return Ok(false);
        }
        for cluster in clusters {
            self.counts.add(cluster)?;
        }
        Ok(true)
    }

    fn walk_l1(&mut self, root: Root) -> io::Result<()> {
        let what = if root.active {
            "L1 table"
        } else {
            "snapshot's L1 table"
        };
        if self.layout.within_cluster(root.offset) != 0 {
            self.corrupt(format!(
                "The {what} at offset {} does not start at a cluster",
                root.offset
            ));
            self.lost = true;
            return Ok(());
        }
        if !self.count(what, root.offset, root.entries * 8)? {
            self.lost = true;
            return Ok(());
        }
        if root.entries > 0 {
            self.own(Use::L1, root.offset, root.entries * 8, root.active)?;
            self.roots.push(root);
        }
        let l1 = read_table(self.file, root.offset, root.entries)?;
        let mut table = vec![0; self.layout.cluster_len()];
        for (index, entry) in l1.into_iter().enumerate() {
            let offset = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 {
                self.corrupt(format!("Entry {index} of the {what} has reserved bits set"));
            }
            if offset == 0 {
                if entry & COPIED != 0 {
                    self.corrupt(format!("Entry {index} of the {what} calls nothing its own"));
                }
                continue;
            }
            if self.layout.within_cluster(offset) != 0 {
                self.lost = true;
                self.corrupt(format!(
                    "Entry {index} of the {what} points at offset {offset}, where no cluster begins"
                ));
                self.count("L2 table", offset, self.layout.cluster_size())?;
                continue;
            }
            if self.count("L2 table", offset, 1)? {
                self.own(Use::L2, offset, 1, root.active)?;
                self.file.read_buf(&mut table, offset)?;
                let first = (index as u64).saturating_mul(self.layout.table_entries());
                self.walk_l2(&table, offset, first, root.active)?;
            } else {
                self.lost = true;
            }
            self.advance()?;
        }
        Ok(())
    }

    /// Counts what the L2 table `table`, which is at `offset`, points at; its first entry is that
    /// of the disk's cluster `first`.
    fn walk_l2(&mut self, table: &[u8], offset: u64, first: u64, active: bool) -> io::Result<()> {
        let layout = self.layout;
        let mut expected = None;
        for at in 0..usize::try_from(layout.table_entries()).unwrap_or(0) {
            let words = words(layout, table, at);
            if words == [0, 0] {
                continue;
            }
            if words[0] & COMPRESSED == 0 && words[0] & L2_RESERVED != 0 {
                self.corrupt(format!(
                    "Entry {at} of the L2 table at offset {offset} has reserved bits set"
                ));
            }
            let entry = match Entry::decode(layout, words) {
                Ok(entry) => entry,
                Err(reason) => {
                    self.corrupt(format!(
                        "Entry {at} of the L2 table at offset {offset} {reason}"
                    ));
                    // Nothing that may be meant is called free.
                    let offset = words[0] & OFFSET_MASK;
                    if words[0] & COMPRESSED == 0 && offset != 0 && !layout.external {
                        self.count("data", offset, layout.cluster_size())?;
                    }
                    continue;
                }
            };
            match entry.place {
                Place::None => {}
                Place::At { offset, .. } if layout.external => {
                    self.check_external(first + at as u64, offset);
                    self.note_data(active, offset, &mut expected);
                }
                Place::At { offset, .. } => {
                    if !self.count("data", offset, 1)? {
                        self.missing.note(offset, layout.cluster_size());
                    }
                    self.note_data(active, offset, &mut expected);
                }
                Place::Packed(packed) => {
                    if words[1] != 0 {
                        self.corrupt(format!(
                            "Entry {at} of the L2 table at offset {offset} tells of subclusters of \
                             compressed data"
                        ));
                    }
                    if words[0] & COPIED != 0 {
                        self.corrupt(format!(
                            "Entry {at} of the L2 table at offset {offset} calls compressed data \
                             its own"
                        ));
                    }
                    self.count("compressed data", packed.offset, packed.len)?;
                    if active {
                        self.report.allocated_clusters += 1;
                        self.report.compressed_clusters += 1;
                        self.report.fragmented_clusters += 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_external(&mut self, cluster: u64, offset: u64) {
        if offset != cluster << self.layout.cluster_bits {
            self.corrupt(format!(
                "The data of cluster {cluster} is said to be at offset {offset} of the data file"
            ));
        }
    }

    fn note_data(&mut self, active: bool, offset: u64, expected: &mut Option<u64>) {
        if !active {
            return;
        }
        self.report.allocated_clusters += 1;
        if expected.is_some_and(|expected| expected != offset) {
            self.report.fragmented_clusters += 1;
        }
        *expected = Some(offset + self.layout.cluster_size());
    }

    /// Counts the clusters of persistent bitmaps, as long as those are valid.
    fn walk_bitmaps(&mut self) -> io::Result<()> {
        if self.header.autoclear & BITMAPS == 0 {
            return Ok(());
        }
        let Some((len, offset)) = self.header.bitmap_directory() else {
            self.corrupt("The header says that there are bitmaps, but not where".into());
            return Ok(());
        };
        if len > MAX_BITMAP_BYTES || !self.count("bitmap directory", offset, len)? {
            return Ok(());
        }
        let mut directory = vec![0; usize::try_from(len).unwrap_or(0)];
        self.file.read_buf(&mut directory, offset)?;
        let mut at = 0;
        while let Some(entry) = directory.get(at..)
            && let (Ok(table), Ok(entries), Ok(extra)) =
                (u64_at(entry, 0), u32_at(entry, 8), u32_at(entry, 20))
            && let Some(name) = entry.get(18..20)
        {
            let table_len = u64::from(entries) * 8;
            if table_len <= MAX_BITMAP_BYTES && self.count("bitmap table", table, table_len)? {
                for entry in read_table(self.file, table, entries.into())? {
                    let offset = entry & OFFSET_MASK;
                    if offset != 0 && entry & BITMAP_RESERVED != 0 {
                        self.corrupt("An entry of a bitmap table has reserved bits set".into());
                    }
                    if offset != 0 {
                        self.count("bitmap", offset, 1)?;
                    }
                }
            }
            let name_len = usize::from(u16::from_be_bytes([name[0], name[1]]));
            let len = 24 + name_len + usize::try_from(extra).unwrap_or(usize::MAX / 2);
            at = at.saturating_add(len.next_multiple_of(8));
        }
        Ok(())
    }

    /// Counts the clusters of the refcounts themselves.
    fn walk_refcounts(&mut self) -> io::Result<()> {
        let header = &self.header;
        let len = u64::from(header.refcount_clusters) << header.cluster_bits;
        let offset = header.refcount_offset;
        if self.layout.within_cluster(offset) != 0 {
            self.corrupt(format!(
                "The refcount table at offset {offset} does not start at a cluster"
            ));
            self.table_unusable = true;
        } else {
            self.table_unusable = !self.count_inside("refcount table", offset, len)?;
        }
        if self.table_unusable {
            self.refcounts_unusable = true;
            return Ok(());
        }
        if len > 0 {
            self.own(Use::RefcountTable, offset, len, true)?;
        }
        self.table = read_table(self.file, offset, len / 8)?;
        for index in 0..self.table.len() {
            let entry = self.table[index];
            let offset = entry & !0x1ff;
            if entry & 0x1ff != 0 {
                self.corrupt(format!(
                    "Entry {index} of the refcount table has reserved bits set"
                ));
                self.refcounts_unusable = true;
            }
            if offset == 0 {
                continue;
            }
            if self.layout.within_cluster(offset) != 0 {
                self.corrupt(format!(
                    "Entry {index} of the refcount table points at offset {offset}, where no \
                     cluster begins"
                ));
            } else if self.count_inside("refcount block", offset, 1)? {
                self.own(Use::RefcountBlock, offset, 1, true)?;
                continue;
            }
            self.refcounts_unusable = true;
            self.table[index] = 0;
        }
        Ok(())
    }
}
