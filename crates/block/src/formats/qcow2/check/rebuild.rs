//! New refcounts for an image whose own are beyond use.
//!
//! They are put where nothing is, and the header points there only once they are durable.

use std::io;
use std::ops::Range;

use super::{Checker, patch_header};
use crate::formats::qcow2::layout::MAX_REFCOUNT_TABLE_BYTES;
use crate::formats::qcow2::refcounts;

impl Checker<'_> {
    /// Replaces all refcounts by what was counted.
    ///
    /// # Errors
    /// They can't be written, or there is no room.
    pub fn rebuild(&mut self) -> io::Result<()> {
        if self.lost {
            self.keep_stored()?;
        }
        self.forget_old();
        let layout = self.layout;
        let refcounts = layout.block_refcounts();
        let (mut blocks, mut place) = (Vec::new(), 0..0);
        let mut table = 1;
        // Where the new ones are depends on how many there are, and the other way round.
        loop {
            let wanted = table + blocks.len() as u64;
            if place.end - place.start < wanted {
                place = match self.find_room(wanted) {
                    Err(_) if self.lost || !self.dangling.is_empty() => return self.give_up(),
                    found => found?,
                };
            }
            let end = self.counts.end().max(place.end);
            let last = end.div_ceil(refcounts);
            let needed = layout.clusters(last.saturating_mul(8));
            if needed << layout.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let used: Vec<u64> = (0..last)
                .filter(|index| {
                    let range = index * refcounts..(index + 1) * refcounts;
                    let own = place.start < range.end && range.start < place.end;
                    own || self.counts.any(range)
                })
                .collect();
            if used.len() <= blocks.len() && needed <= table {
                break;
            }
            blocks = used;
            table = needed.max(table);
        }
        self.write_new(&blocks, table, &place)
    }

    /// Counts a reference to each cluster that has none, but a refcount.
    fn keep_stored(&mut self) -> io::Result<()> {
        let layout = self.layout;
        let mut block = vec![0; layout.cluster_len()];
        for index in 0..self.table.len() {
            let offset = self.table[index] & !0x1ff;
            if offset == 0 {
                continue;
            }
            self.file.read_buf(&mut block, offset)?;
            let first = index as u64 * layout.block_refcounts();
            for at in 0..usize::try_from(layout.block_refcounts()).unwrap_or(0) {
                let cluster = first + at as u64;
                let stored = refcounts::get(&block, layout.refcount_order, at);
                let inside = cluster < layout.clusters(self.file_len);
                if stored > 0 && inside && self.counts.get(cluster) == 0 {
                    self.counts.add(cluster)?;
                }
            }
        }
        Ok(())
    }

    /// The refcounts that there are have no references any more.
    fn forget_old(&mut self) {
        let start = self.layout.cluster_of(self.header.refcount_offset);
        if !self.table_unusable {
            let clusters = start..start + u64::from(self.header.refcount_clusters);
            clusters.for_each(|cluster| self.counts.remove(cluster));
        }
        for entry in &self.table {
            if entry & !0x1ff != 0 {
                self.counts.remove(self.layout.cluster_of(*entry));
            }
        }
    }

    /// A run of clusters that neither anything refers to nor the old refcounts are in.
    pub(super) fn find_room(&self, count: u64) -> io::Result<Range<u64>> {
        let layout = self.layout;
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        if !self.file.is_device() {
            // What is missing must stay past the end of the file, or it would read as zeroes.
            let start = layout.clusters(self.file_len).max(self.counts.end());
            let first = self.dangling.range(start..).next();
            if first.is_none_or(|first| start.saturating_add(count) <= *first) {
                return Ok(start..start.saturating_add(count));
            }
        }
        if self.lost {
            return Err(full);
        }
        let table = layout.cluster_of(self.header.refcount_offset);
        let table = table..table + u64::from(self.header.refcount_clusters);
        let old: std::collections::HashSet<u64> = self
            .table
            .iter()
            .map(|entry| layout.cluster_of(*entry))
            .collect();
        let mut start = 1;
        let mut at = 1;
        while at < layout.cluster_of(self.file_len) {
            let used = self.counts.get(at) > 0 || table.contains(&at) || old.contains(&at);
            at += 1;
            if used {
                start = at;
            } else if at - start == count {
                return Ok(start..at);
            }
        }
        Err(full)
    }

    fn give_up(&mut self) -> io::Result<()> {
        let what = "There is no room for new refcounts before where the missing end of the file \
                    was; copy the image again, or save what is left by `edgevmm image convert`";
        self.say(what.into());
        // The old ones stay where they are, but are no longer counted.
        self.lost = true;
        Ok(())
    }

    /// Writes new refcounts: those of the blocks with these numbers, and a table of `table`
    /// clusters, from the start of `place` on.
    fn write_new(&mut self, numbers: &[u64], table: u64, place: &Range<u64>) -> io::Result<()> {
        let layout = self.layout;
        let bits = layout.cluster_bits;
        let used = place.start..place.start + table + numbers.len() as u64;
        let mut entries = vec![0_u64; usize::try_from((table << bits) / 8).unwrap_or(0)];
        let mut block = vec![0; layout.cluster_len()];
        for (number, cluster) in numbers.iter().zip(used.start + table..) {
            block.fill(0);
            let first = number * layout.block_refcounts();
            for at in 0..usize::try_from(layout.block_refcounts()).unwrap_or(0) {
                let of = first + at as u64;
                let counted = self.counts.get(of) + u64::from(used.contains(&of));
                let refcount = counted.min(layout.max_refcount());
                refcounts::set(&mut block, layout.refcount_order, at, refcount);
            }
            self.file.write_buf(&block, cluster << bits)?;
            let index = usize::try_from(*number).unwrap_or(usize::MAX);
            if let Some(entry) = entries.get_mut(index) {
                *entry = cluster << bits;
            }
        }
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.file.write_buf(&bytes, used.start << bits)?;
        self.file.sync()?;
        let clusters = u32::try_from(table).map_err(|_| io::ErrorKind::FileTooLarge)?;
        patch_header(
            self.file,
            &[
                (48, &(used.start << bits).to_be_bytes()),
                (56, &clusters.to_be_bytes()),
            ],
        )?;
        self.header.refcount_offset = used.start << bits;
        self.header.refcount_clusters = clusters;
        for cluster in used.clone() {
            self.counts.add(cluster)?;
        }
        self.end = self.end.max(used.end);
        self.table = entries;
        self.table_unusable = false;
        Ok(())
    }
}
