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
            None => Err(io::ErrorKind::StorageFull.into()),
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
            None => Err(io::ErrorKind::StorageFull.into()),
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
