//! Comparing the refcounts of an image with the references that it has.

use std::io;

use super::Checker;
use crate::formats::qcow2::refcounts;

/// Which refcounts are to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// None; differences are told.
    None,
    /// Those that are too low.
    Raise,
    /// Those that are too high.
    Lower,
}

impl Checker<'_> {
    /// Compares all refcounts, or makes those right that `fix` tells.
    ///
    /// # Errors
    /// They can't be read or written.
    pub fn compare(&mut self, fix: Fix) -> io::Result<()> {
        let layout = self.layout;
        let mut block = vec![0; layout.cluster_len()];
        for index in 0..self.table.len() {
            let offset = self.table[index] & !0x1ff;
            if offset == 0 {
                continue;
            }
            self.file.read_buf(&mut block, offset)?;
            let first = index as u64 * layout.block_refcounts();
            let changed = self.compare_block(&mut block, first, fix);
            if changed {
                self.file.write_buf(&block, offset)?;
            }
            if fix == Fix::None {
                self.advance()?;
            }
        }
        if fix == Fix::None {
            self.compare_without_blocks();
        }
        Ok(())
    }

    /// Compares one block, whose first refcount is that of the cluster `first`. Returns whether it
    /// has changed.
    fn compare_block(&mut self, block: &mut [u8], first: u64, fix: Fix) -> bool {
        let order = self.layout.refcount_order;
        let mut changed = false;
        for at in 0..usize::try_from(self.layout.block_refcounts()).unwrap_or(0) {
            let cluster = first + at as u64;
            let stored = refcounts::get(block, order, at);
            let counted = self.counts.get(cluster);
            let right = counted.min(self.layout.max_refcount());
            if stored > 0 || counted > 0 {
                self.end = self.end.max(cluster + 1);
            }
            match fix {
                Fix::None if stored < counted => self.too_low(cluster, stored, counted),
                // It would be taken for something else, which then is what is missing.
                _ if stored > counted && self.dangling.contains(&cluster) => {}
                Fix::None if stored > counted => {
                    self.report.leaks += 1;
                    self.say(format!(
                        "Cluster {cluster} has a refcount of {stored}, but {counted} references \
                         (some space is lost)"
                    ));
                }
                Fix::Raise if stored < right => {
                    refcounts::set(block, order, at, right);
                    changed = true;
                }
                Fix::Lower if stored > counted => {
                    refcounts::set(block, order, at, counted);
                    changed = true;
                }
                _ => {}
            }
        }
        changed
    }

    /// Tells of clusters with references for whose refcounts there is no block.
    fn compare_without_blocks(&mut self) {
        let refcounts = self.layout.block_refcounts();
        let table = &self.table;
        let lacks = |cluster: &u64| {
            let index = usize::try_from(cluster / refcounts).unwrap_or(usize::MAX);
            table.get(index).is_none_or(|entry| entry & !0x1ff == 0)
        };
        let mut without: Vec<_> = self.counts.clusters().filter(lacks).collect();
        without.sort_unstable();
        self.refcounts_unusable |= !without.is_empty();
        for cluster in without {
            self.end = self.end.max(cluster + 1);
            self.too_low(cluster, 0, self.counts.get(cluster));
        }
    }

    fn too_low(&mut self, cluster: u64, stored: u64, counted: u64) {
        self.corrupt(format!(
            "Cluster {cluster} has a refcount of {stored}, but {counted} references"
        ));
    }
}
