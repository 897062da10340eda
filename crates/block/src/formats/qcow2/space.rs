//! Which clusters of the file are taken next.
//!
//! New clusters come from behind everything that was ever in use, so that runs are long, or from
//! gaps that are wide enough. What gaps an image has from before is found out bit by bit, so that
//! neither opening it nor any single write has to look through all refcounts.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::damage::damage;
use super::layout::Layout;
use super::places::{Places, Use};
use super::refcounts::Refcounts;

/// Slices of refcounts that one allocation looks through for gaps, at most.
const GAP_SLICES: usize = 4;
/// Slices of refcounts not seen before that one allocation looks at, at most.
const EXPLORED_SLICES: u64 = 2;
/// Offsets in an L1 or L2 table have this many bits.
const OFFSET_BITS: u32 = 56;

/// Clusters that were free and now have one reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The clusters; at least one.
    pub clusters: Range<u64>,
    /// Nothing was ever written there, so that they read as zeroes.
    pub fresh: bool,
}

/// The space of an image's file.
#[derive(Debug)]
pub struct Space {
    layout: Layout,
    /// The refcounts.
    pub refcounts: Refcounts,
    /// Where the metadata is.
    pub places: Places,
    /// All gaps are before this cluster, or not known yet.
    frontier: u64,
    /// Slices of refcounts with a gap before the frontier, with where the first one may begin.
    gaps: BTreeMap<u64, u64>,
    /// The gap that the next search begins with.
    next_gap: u64,
    /// Slices of refcounts that have not been looked at for gaps.
    unexplored: Range<u64>,
    /// Clusters from here on were never written.
    fresh_from: u64,
    /// The first cluster that cannot be used.
    end: u64,
}

impl Space {
    /// The space of a file of `file_len` bytes, which is as long as it can be if `fixed`.
    pub fn new(
        layout: Layout,
        refcounts: Refcounts,
        places: Places,
        file_len: u64,
        fixed: bool,
    ) -> Self {
        let most = refcounts
            .end()
            .min(1 << (OFFSET_BITS - layout.cluster_bits));
        let (frontier, end) = if fixed {
            (0, layout.cluster_of(file_len).min(most))
        } else {
            (layout.clusters(file_len), most)
        };
        Self {
            layout,
            refcounts,
            places,
            frontier,
            gaps: BTreeMap::new(),
            next_gap: 0,
            unexplored: 0..frontier.div_ceil(layout.slice_refcounts()),
            fresh_from: if fixed { u64::MAX } else { frontier },
            end,
        }
    }

    /// Takes a run of up to `most` clusters (at least 1).
    ///
    /// # Errors
    /// There is no space, the refcounts can't be read, or the image calls something free that is
    /// not.
    pub fn allocate(&mut self, most: u64) -> io::Result<Allocated> {
        self.explore()?;
        if let Some(clusters) = self.find_in_gaps(most)? {
            return self.take(clusters);
        }
        if let Some(clusters) = self.find_behind(most, 1)? {
            return self.take(clusters);
        }
        // The end is reached: any gap is welcome now.
        self.unexplored_to_gaps();
        match self.find_any_gap(most)? {
            Some(clusters) => self.take(clusters),
            None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Takes a run of `count` clusters, no less.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn allocate_run(&mut self, count: u64) -> io::Result<Allocated> {
        let mut found = self.find_behind(count, count)?;
        if found.is_none() {
            found = self.find_in_gaps(count)?;
        }
        match found {
            Some(clusters) => self.take(clusters),
            None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Frees a cluster that has one reference, or none.
    ///
    /// # Errors
    /// Its refcount can't be read.
    pub fn free(&mut self, cluster: u64) -> io::Result<()> {
        self.refcounts.set(cluster, 0)?;
        self.note_gap(cluster);
        Ok(())
    }

    /// Finds a new place for the refcount table if it needs one, and returns the clusters that it
    /// leaves, as they are in use until that is written.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn place_table(&mut self) -> io::Result<Vec<Range<u64>>> {
        let mut left: Vec<Range<u64>> = Vec::new();
        // Taking clusters may make the table grow again.
        while let Some(count) = self.refcounts.outgrown() {
            let place = match self.allocate_run(count) {
                Ok(place) => place.clusters,
                Err(error) => {
                    left.into_iter()
                        .flatten()
                        .try_for_each(|it| self.free(it))?;
                    return Err(error);
                }
            };
            if self.refcounts.outgrown() == Some(count) {
                self.places.add_run(place.clone(), Use::RefcountTable);
                let old = self.refcounts.move_table(place);
                self.places.remove_run(&old);
                left.push(old);
            } else {
                left.push(place);
            }
        }
        Ok(left)
    }

    fn take(&mut self, clusters: Range<u64>) -> io::Result<Allocated> {
        if let Some((what, cluster)) = self.places.find(&clusters) {
            return Err(damage(format!(
                "its {what} at offset {} counts as free space",
                cluster << self.layout.cluster_bits
            )));
        }
        for cluster in clusters.clone() {
            if let Err(error) = self.refcounts.set(cluster, 1) {
                // Those are still in memory, as they were just changed.
                (clusters.start..cluster).try_for_each(|taken| self.free(taken))?;
                return Err(error);
            }
        }
        Ok(self.taken(clusters))
    }

    fn taken(&mut self, clusters: Range<u64>) -> Allocated {
        let fresh = clusters.start >= self.fresh_from;
        if self.fresh_from != u64::MAX {
            self.fresh_from = self.fresh_from.max(clusters.end);
        }
        Allocated { clusters, fresh }
    }

    /// Looks at some slices of refcounts that were not looked at yet.
    fn explore(&mut self) -> io::Result<()> {
        if !self.gaps.is_empty() {
            return Ok(());
        }
        let until = self
            .unexplored
            .end
            .min(self.unexplored.start + EXPLORED_SLICES);
        while self.unexplored.start < until {
            let slice = self.unexplored.start;
            if let Some(gap) =
                self.find_in_slice(slice, slice * self.layout.slice_refcounts(), 1)?
            {
                self.gaps.insert(slice, gap.start);
            }
            self.unexplored.start += 1;
        }
        Ok(())
    }

    fn unexplored_to_gaps(&mut self) {
        let refcounts = self.layout.slice_refcounts();
        for slice in std::mem::replace(&mut self.unexplored, 0..0) {
            self.gaps.insert(slice, slice * refcounts);
        }
    }

    fn note_gap(&mut self, cluster: u64) {
        let slice = cluster / self.layout.slice_refcounts();
        if cluster < self.frontier && !self.unexplored.contains(&slice) {
            let first = self.gaps.entry(slice).or_insert(cluster);
            *first = cluster.min(*first);
        }
    }

    /// A gap of `count` clusters, if one is found soon.
    fn find_in_gaps(&mut self, count: u64) -> io::Result<Option<Range<u64>>> {
        for _ in 0..GAP_SLICES {
            let mut following = self.gaps.range(self.next_gap..);
            let Some((&slice, &first)) = following.next().or_else(|| self.gaps.iter().next())
            else {
                return Ok(None);
            };
            if let Some(gap) = self.find_in_slice(slice, first, count)? {
                if gap.start == first {
                    self.gaps.insert(slice, gap.end);
                }
                return Ok(Some(gap));
            }
            if count == 1
                || first
                    >= self
                        .frontier
                        .min((slice + 1) * self.layout.slice_refcounts())
            {
                self.gaps.remove(&slice);
            }
            self.next_gap = slice + 1;
        }
        Ok(None)
    }

    /// Some gap, however long it takes to find one.
    fn find_any_gap(&mut self, most: u64) -> io::Result<Option<Range<u64>>> {
        while let Some((&slice, &first)) = self.gaps.iter().next() {
            if let Some(gap) = self.find_in_slice(slice, first, 1)? {
                let (_, count) = self.refcounts.alike(gap.start, most)?;
                let end = self.frontier.min(gap.start + count);
                self.gaps.insert(slice, end);
                return Ok(Some(gap.start..end));
            }
            self.gaps.remove(&slice);
        }
        Ok(None)
    }

    /// The first gap of `count` clusters in a slice of refcounts, from the cluster `first` on.
    fn find_in_slice(
        &mut self,
        slice: u64,
        first: u64,
        count: u64,
    ) -> io::Result<Option<Range<u64>>> {
        let refcounts = self.layout.slice_refcounts();
        let end = self.frontier.min((slice + 1) * refcounts);
        let mut at = first;
        while at < end {
            // What no block is there for is left to the frontier.
            if self.refcounts.lacks_block(at) {
                return Ok(None);
            }
            let (free, alike) = self.refcounts.alike(at, end - at)?;
            if free && alike >= count {
                return Ok(Some(at..at + count));
            }
            at += alike;
        }
        Ok(None)
    }

    /// A run of `least` to `most` free clusters from the frontier on, with blocks for their
    /// refcounts. The frontier moves behind it.
    fn find_behind(&mut self, most: u64, least: u64) -> io::Result<Option<Range<u64>>> {
        let mut start = self.frontier;
        let mut at = start;
        loop {
            let missing = most - (at - start);
            let enough = at - start >= least;
            if missing == 0 || (at >= self.end && enough) {
                self.frontier = at;
                return Ok(Some(start..at));
            }
            if at >= self.end {
                return Ok(None);
            }
            if self.refcounts.lacks_block(at) {
                if enough {
                    self.frontier = at;
                    return Ok(Some(start..at));
                }
                self.add_block(at, start)?;
                start += 1;
                self.frontier = start;
                at = start;
                continue;
            }
            let (free, alike) = self.refcounts.alike(at, missing.min(self.end - at))?;
            if free {
                at += alike;
            } else if enough {
                self.frontier = at;
                return Ok(Some(start..at));
            } else {
                // Whatever is too short here is a gap for others.
                self.frontier = at + alike;
                (start..at).for_each(|cluster| self.note_gap(cluster));
                start = self.frontier;
                at = start;
            }
        }
    }

    /// Adds a block for the refcount of `of` at the free cluster `at`.
    fn add_block(&mut self, of: u64, at: u64) -> io::Result<()> {
        if let Some((what, _)) = self.places.find(&(at..at + 1)) {
            return Err(damage(format!(
                "its {what} at offset {} counts as free space",
                at << self.layout.cluster_bits
            )));
        }
        if !self.refcounts.lacks_block(at) {
            // Now rather than with the block half there.
            self.refcounts.get(at)?;
        }
        self.refcounts.add_block(of, at)?;
        self.refcounts.set(at, 1)?;
        self.places.add(at, Use::RefcountBlock);
        self.taken(at..at + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::formats::qcow2::damage::ImageFile;
    use crate::host::HostFile;

    const LAYOUT: Layout = Layout {
        version: 3,
        cluster_bits: 9,
        refcount_order: 4,
        extended: false,
        external: false,
    };
    /// Refcounts in a block, and so in a slice.
    const BLOCK: u64 = 256;

    /// A file of `clusters` clusters. The first three have a header and the refcounts, and those
    /// that `used` tells are in use as well.
    fn space(clusters: u64, fixed: bool, used: impl Fn(u64) -> bool) -> Space {
        let file = tempfile::tempfile().unwrap();
        file.set_len(clusters << 9).unwrap();
        let host = HostFile::new(file, "test", false).unwrap();
        let file = Arc::new(ImageFile::new(Arc::new(host)).unwrap());
        let mut refcounts = Refcounts::new(file, LAYOUT, vec![0; 64], 512, 1 << 20);
        let mut places = Places::default();
        places.add_run(0..1, Use::Header);
        places.add_run(1..2, Use::RefcountTable);
        for (block, at) in (0..clusters.div_ceil(BLOCK)).zip(2..) {
            refcounts.add_block(block * BLOCK, at).unwrap();
            places.add(at, Use::RefcountBlock);
        }
        let first = 2 + clusters.div_ceil(BLOCK);
        for cluster in (0..clusters).filter(|it| *it < first || used(*it)) {
            refcounts.set(cluster, 1).unwrap();
        }
        Space::new(LAYOUT, refcounts, places, clusters << 9, fixed)
    }

    fn take(space: &mut Space, most: u64) -> (Range<u64>, bool) {
        let found = space.allocate(most).unwrap();
        (found.clusters, found.fresh)
    }

    #[test]
    fn gaps_are_used_if_they_are_wide_enough() {
        let gaps = [10..12, 20..25, 300..400];
        let mut space = space(600, false, |it| !gaps.iter().any(|gap| gap.contains(&it)));
        assert_eq!(take(&mut space, 1), (10..11, false));
        assert_eq!(take(&mut space, 5), (20..25, false));
        assert_eq!(take(&mut space, 1), (11..12, false));
        assert_eq!(take(&mut space, 50), (300..350, false));
        // There is nothing as wide.
        assert_eq!(take(&mut space, 70), (600..670, true));
        let mut seen = Vec::new();
        for _ in 0..51 {
            seen.push(take(&mut space, 1).0.start);
        }
        seen.sort_unstable();
        let expected: Vec<u64> = (350..400).chain([670]).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_is_freed_is_taken_again() {
        let mut space = space(20, false, |_| true);
        assert_eq!(take(&mut space, 30), (20..50, true));
        for cluster in [25, 26, 27, 40] {
            space.free(cluster).unwrap();
        }
        assert_eq!(take(&mut space, 3), (25..28, false));
        assert_eq!(take(&mut space, 3), (50..53, true));
        assert_eq!(take(&mut space, 1), (40..41, false));
    }

    #[test]
    fn blocks_are_added_and_the_table_moves() {
        let mut space = space(20, false, |_| true);
        let mut taken = 0;
        // The table of one cluster has 64 blocks of 256 refcounts.
        while space.refcounts.outgrown().is_none() {
            let found = space.allocate(100).unwrap().clusters;
            assert!(space.places.find(&found).is_none());
            for cluster in found.clone() {
                assert_eq!(space.refcounts.get(cluster).unwrap(), 1);
            }
            taken += found.end - found.start;
        }
        assert!(taken > 63 * BLOCK);
        let old = space.place_table().unwrap();
        assert!(old.len() == 1 && old[0] == (1..2));
        let new = space.refcounts.place();
        assert!(new.end - new.start > 1);
        assert_eq!(
            space.places.find(&new),
            Some((Use::RefcountTable, new.start))
        );
        assert!(space.place_table().unwrap().is_empty());
    }

    #[test]
    fn a_block_device_has_an_end() {
        let mut space = space(700, true, |it| it % 100 == 0);
        let mut taken = Vec::new();
        while let Ok(found) = space.allocate(150) {
            assert!(!found.fresh, "it may hold anything");
            taken.extend(found.clusters);
        }
        assert!(taken.len() == 700 - 5 - 6, "{}", taken.len());
        assert!(
            taken
                .iter()
                .all(|cluster| *cluster < 700 && cluster % 100 != 0)
        );
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 700 - 5 - 6);
        space.free(123).unwrap();
        assert_eq!(take(&mut space, 9), (123..124, false));
        assert_eq!(
            space.allocate(1).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        assert_eq!(
            space.allocate_run(2).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
    }
}
