//! Where an image's metadata is, so that nothing else is put there.
//!
//! A damaged image may call clusters free that its tables are in, or have data point at them. A
//! guest's write there would destroy the tables, or let the guest make its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The image's header.
    Header,
    /// The active L1 table, or that of a snapshot.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The table of snapshots.
    Snapshots,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::L1 => "L1 table",
            Self::L2 => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::Snapshots => "snapshot table",
        })
    }
}

/// The clusters that an image's metadata is in.
#[derive(Debug, Default)]
pub struct Places {
    /// Runs of clusters, by their first; none overlaps another.
    runs: BTreeMap<u64, (u64, Use)>,
    /// Single clusters known from the start, in order: twice the cluster, plus one for a refcount
    /// block. There are as many as the L1 table has entries.
    old: Vec<u64>,
    /// Single clusters that came later.
    new: BTreeMap<u64, Use>,
    /// Those of `old` that are no longer used for that.
    gone: BTreeSet<u64>,
}

impl Places {
    /// Takes all places of an image, and finds out whether any two are the same: `tables` are the
    /// clusters of L2 tables, `blocks` those of refcount blocks.
    ///
    /// # Errors
    /// What is in the same place, and where that is.
    pub fn new(
        runs: Vec<(Range<u64>, Use)>,
        tables: impl Iterator<Item = u64>,
        blocks: impl Iterator<Item = u64>,
    ) -> Result<Self, (Use, Use, u64)> {
        let tables = tables.map(|cluster| cluster << 1);
        let mut old: Vec<u64> = tables
            .chain(blocks.map(|cluster| cluster << 1 | 1))
            .collect();
        old.sort_unstable();
        let pairs = old.iter().zip(old.iter().skip(1));
        if let Some((a, b)) = pairs.into_iter().find(|(a, b)| **a >> 1 == **b >> 1) {
            return Err((single(*a), single(*b), a >> 1));
        }
        let mut places = Self {
            old,
            ..Self::default()
        };
        for (run, what) in runs {
            if let Some((other, cluster)) = places.find(&run) {
                return Err((what, other, cluster));
            }
            places.add_run(run, what);
        }
        Ok(places)
    }

    /// What is in any of these clusters, and in which.
    pub fn find(&self, clusters: &Range<u64>) -> Option<(Use, u64)> {
        let at = self
            .old
            .partition_point(|known| known >> 1 < clusters.start);
        let old = self.old.get(at..).unwrap_or_default();
        let mut old = old.iter().take_while(|known| *known >> 1 < clusters.end);
        if let Some(known) = old.find(|known| !self.gone.contains(&(*known >> 1))) {
            return Some((single(*known), known >> 1));
        }
        if let Some((cluster, what)) = self.new.range(clusters.clone()).next() {
            return Some((*what, *cluster));
        }
        let (start, (end, what)) = self.runs.range(..clusters.end).next_back()?;
        let first = *start.max(&clusters.start);
        (first < *end && first < clusters.end).then_some((*what, first))
    }

    /// Adds a cluster.
    pub fn add(&mut self, cluster: u64, what: Use) {
        self.new.insert(cluster, what);
    }

    /// Drops a cluster, which is free now, if it was there.
    pub fn remove(&mut self, cluster: u64) {
        if self.new.remove(&cluster).is_none() && self.find(&(cluster..cluster + 1)).is_some() {
            self.gone.insert(cluster);
        }
    }

    /// Adds a run of clusters.
    pub fn add_run(&mut self, clusters: Range<u64>, what: Use) {
        self.runs.insert(clusters.start, (clusters.end, what));
    }

    /// Drops a run that was added as it is here.
    pub fn remove_run(&mut self, clusters: &Range<u64>) {
        if self
            .runs
            .get(&clusters.start)
            .is_some_and(|(end, _)| *end == clusters.end)
        {
            self.runs.remove(&clusters.start);
        }
    }
}

fn single(known: u64) -> Use {
    if known & 1 == 0 {
        Use::L2
    } else {
        Use::RefcountBlock
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn finds_what_is_in_the_way() {
        let runs = vec![(0..1, Use::Header), (4..6, Use::L1)];
        let mut places = Places::new(runs, [9, 7].into_iter(), [2].into_iter()).unwrap();
        assert_eq!(places.find(&(0..100)), Some((Use::RefcountBlock, 2)));
        assert_eq!(places.find(&(3..100)), Some((Use::L2, 7)));
        assert_eq!(places.find(&(3..6)), Some((Use::L1, 4)));
        assert_eq!(places.find(&(5..6)), Some((Use::L1, 5)));
        assert_eq!(places.find(&(6..7)), None);
        assert_eq!(places.find(&(0..1)), Some((Use::Header, 0)));
        assert_eq!(places.find(&(10..100)), None);
        assert_eq!(places.find(&(7..7)), None);
        places.add(10, Use::L2);
        places.add_run(20..22, Use::RefcountTable);
        assert_eq!(places.find(&(10..11)), Some((Use::L2, 10)));
        assert_eq!(places.find(&(21..100)), Some((Use::RefcountTable, 21)));
        places.remove_run(&(20..22));
        assert_eq!(places.find(&(11..100)), None);
        for cluster in [7, 8, 10] {
            places.remove(cluster);
        }
        assert_eq!(places.find(&(7..9)), None);
        assert_eq!(places.find(&(7..100)), Some((Use::L2, 9)));
        places.add(7, Use::RefcountBlock);
        assert_eq!(places.find(&(7..8)), Some((Use::RefcountBlock, 7)));
    }

    #[test]
    fn nothing_is_in_the_same_place() {
        let new = |runs, tables: &[u64], blocks: &[u64]| {
            Places::new(runs, tables.iter().copied(), blocks.iter().copied()).unwrap_err()
        };
        assert_eq!(new(vec![], &[5, 5], &[]), (Use::L2, Use::L2, 5));
        assert_eq!(new(vec![], &[5, 6], &[6]), (Use::L2, Use::RefcountBlock, 6));
        let runs = vec![(0..1, Use::Header), (0..2, Use::L1)];
        assert_eq!(new(runs, &[], &[]), (Use::L1, Use::Header, 0));
    }
}
