//! Metadata that shares its place with something else.
//!
//! Reference counts do not tell of it: two references to a cluster are right for data that a
//! snapshot has as well, but a table that is another table, or a guest's data, is overwritten by the
//! next change of either. Everything but the refcounts, which are built anew, gets a place of its
//! own by being copied, so that the disk reads as before.

use std::collections::HashSet;
use std::io;

use super::walk::Root;
use super::{Checker, patch_header};
use crate::formats::qcow2::entry::{COPIED, Entry, OFFSET_MASK, Packed, Place, words};
use crate::formats::qcow2::header::CORRUPT;
use crate::formats::qcow2::open::read_table;
use crate::formats::qcow2::places::Use;

/// Most clusters of metadata that are kept in mind.
const MAX_OWNERS: usize = 1 << 24;
/// Most bytes that are copied: damage is of a few tables, and an image made to do harm may have any
/// number of them in one place.
const MAX_COPIED: u64 = 1 << 30;
/// What is copied may itself refer to what shares its place, but that then refers to nothing.
const MAX_ROUNDS: usize = 8;

/// The metadata that is in a cluster: how often, by kind.
#[derive(Clone, Copy, Debug)]
pub struct Owners {
    /// One of them, to be named.
    what: Use,
    /// The header, L1 tables, and the table of snapshots.
    fixed: u16,
    /// The refcount table and its blocks.
    refcounts: u16,
    /// L2 tables of the disk.
    tables: u16,
    /// L2 tables of snapshots, which may be those of the disk.
    snapshots: u16,
}

impl Owners {
    /// Whether it shares its place with any more of `references`, other than refcounts.
    fn is_shared(&self, references: u64) -> bool {
        let [fixed, refcounts] = [self.fixed, self.refcounts].map(u64::from);
        let [tables, snapshots] = [self.tables, self.snapshots].map(u64::from);
        let references = references.saturating_sub(refcounts);
        (fixed > 0 && references > 1)
            || tables > 1
            || (tables == 1 && references > tables + snapshots)
    }
}

impl Checker<'_> {
    /// Notes what metadata is in these clusters.
    ///
    /// # Errors
    /// It would take too much memory.
    pub fn own(&mut self, what: Use, offset: u64, len: u64, active: bool) -> io::Result<()> {
        let end = self.layout.clusters(offset.saturating_add(len));
        for cluster in self.layout.cluster_of(offset)..end {
            if self.owners.len() >= MAX_OWNERS {
                return Err(io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    "the image has too many tables to be checked",
                ));
            }
            let owners = self.owners.entry(cluster).or_insert(Owners {
                what,
                fixed: 0,
                refcounts: 0,
                tables: 0,
                snapshots: 0,
            });
            let count = match what {
                Use::Header | Use::L1 | Use::Snapshots => &mut owners.fixed,
                Use::RefcountTable | Use::RefcountBlock => &mut owners.refcounts,
                Use::L2 if active => &mut owners.tables,
                Use::L2 => &mut owners.snapshots,
            };
            *count = count.saturating_add(1);
        }
        Ok(())
    }

    /// Tells of metadata that shares its place.
    pub fn find_shared(&mut self) {
        let mut found = Vec::new();
        for (cluster, owners) in &self.owners {
            let references = self.counts.get(*cluster);
            let of_refcounts = owners.refcounts > 0 && references > 1;
            self.refcounts_unusable |= of_refcounts;
            if of_refcounts || owners.is_shared(references) {
                found.push((*cluster, owners.what));
            }
        }
        // Other damage follows from this, so it comes first.
        let others = std::mem::take(&mut self.report.messages);
        for (cluster, what) in found {
            self.corrupt(format!(
                "The {what} at cluster {cluster} shares its place with something else"
            ));
        }
        others.into_iter().for_each(|text| self.say(text));
    }

    /// Gives everything a place of its own that is in one with metadata other than refcounts.
    ///
    /// # Errors
    /// The host can't read or write the image.
    pub fn separate(&mut self) -> io::Result<()> {
        for _ in 0..MAX_ROUNDS {
            if !self.owners.keys().any(|cluster| self.is_shared(*cluster)) {
                return Ok(());
            }
            if self.lost || !self.dangling.is_empty() {
                break;
            }
            // Until all is done nobody may use the copies' places, whose refcounts are not yet
            // right. Version 2 can't say so.
            if self.header.version >= 3 && self.header.incompatible & CORRUPT == 0 {
                self.header.incompatible |= CORRUPT;
                let bits = self.header.incompatible.to_be_bytes();
                patch_header(self.file, &[(72, &bits)])?;
            }
            if !self.separate_once()? {
                break;
            }
            self.recount()?;
        }
        let what = "Not all that shares a place can be given one of its own; save what can be read \
                    by `edgevmm image convert`";
        self.say(what.into());
        Ok(())
    }

    fn is_shared(&self, cluster: u64) -> bool {
        let owners = self.owners.get(&cluster);
        owners.is_some_and(|owners| owners.is_shared(self.counts.get(cluster)))
    }

    /// Counts everything once more, as it is now. What is found is known already.
    fn recount(&mut self) -> io::Result<()> {
        let report = std::mem::take(&mut self.report);
        self.forget();
        self.walk()?;
        self.compare(super::Fix::None)?;
        self.report = report;
        Ok(())
    }

    /// Copies what is in the way, and what refers to it. Returns whether anything has changed.
    fn separate_once(&mut self) -> io::Result<bool> {
        let roots = self.roots.clone();
        let mut changed = false;
        let mut kept = HashSet::new();
        for root in roots {
            let own = self.separate_l1(root)?;
            changed |= own != root.offset;
            changed |= self.separate_tables(
                Root {
                    offset: own,
                    ..root
                },
                &mut kept,
            )?;
        }
        Ok(changed)
    }

    /// Returns where the L1 table is then.
    fn separate_l1(&mut self, root: Root) -> io::Result<u64> {
        let layout = self.layout;
        let start = layout.cluster_of(root.offset);
        let count = layout.clusters(root.entries * 8);
        let crowded = |cluster| matches!(self.owners.get(&cluster), Some(it) if it.fixed > 1);
        // Where the L1 table of a snapshot is, is written in a table that may be the damaged one.
        if !root.active || !(start..start + count).any(crowded) {
            return Ok(root.offset);
        }
        let Some(offset) = self.copy(root.offset, count)? else {
            return Ok(root.offset);
        };
        self.file.sync()?;
        patch_header(self.file, &[(40, &offset.to_be_bytes())])?;
        self.header.l1_offset = offset;
        Ok(offset)
    }

    /// Copies the L2 tables of an L1 table, and data, that are in the way.
    fn separate_tables(&mut self, root: Root, kept: &mut HashSet<u64>) -> io::Result<bool> {
        let layout = self.layout;
        let mut l1 = read_table(self.file, root.offset, root.entries)?;
        let mut table = vec![0; layout.cluster_len()];
        let mut changed = (false, false);
        for entry in &mut l1 {
            let offset = *entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let cluster = layout.cluster_of(offset);
            let Some(owners) = self.owners.get(&cluster).copied() else {
                // A copy, made for another root that has the same L1 table.
                continue;
            };
            let others = self.is_shared(cluster) && owners.fixed > 0;
            let moves = others || (root.active && owners.tables > 1 && !kept.insert(cluster));
            self.file.read_buf(&mut table, offset)?;
            let written = self.separate_data(&mut table)?;
            let to = if moves {
                let Some(to) = self.take(1)? else { continue };
                *entry = to;
                changed.0 = true;
                to
            } else {
                offset
            };
            if moves || written {
                self.file.sync()?;
                self.write(&table, to)?;
                changed.1 = true;
            }
        }
        if changed.0 {
            self.file.sync()?;
            let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.file.write_buf(&bytes, root.offset)?;
        }
        self.file.sync()?;
        Ok(changed.0 || changed.1)
    }

    /// Copies the data of an L2 table that is in the way. Returns whether the table has changed.
    fn separate_data(&mut self, table: &mut [u8]) -> io::Result<bool> {
        let layout = self.layout;
        let mut changed = false;
        if layout.external {
            return Ok(false);
        }
        for at in 0..usize::try_from(layout.table_entries()).unwrap_or(0) {
            let words = words(layout, table, at);
            let word = match Entry::decode(layout, words).map(|entry| (entry, entry.place)) {
                Ok((_, Place::At { offset, .. })) if self.is_shared(layout.cluster_of(offset)) => {
                    let Some(to) = self.copy(offset, 1)? else {
                        continue;
                    };
                    words[0] & !(OFFSET_MASK | COPIED) | to
                }
                Ok((entry, Place::Packed(packed)))
                    if packed.clusters(layout).any(|at| self.is_shared(at)) =>
                {
                    let Some(packed) = self.copy_packed(packed)? else {
                        continue;
                    };
                    let place = Place::Packed(packed);
                    Entry { place, ..entry }.encode(layout)[0]
                }
                _ => continue,
            };
            let start = at * layout.entry_len();
            if let Some(to) = table.get_mut(start..start + 8) {
                to.copy_from_slice(&word.to_be_bytes());
            }
            changed = true;
        }
        Ok(changed)
    }

    fn copy_packed(&mut self, packed: Packed) -> io::Result<Option<Packed>> {
        let layout = self.layout;
        let clusters = packed.clusters(layout);
        let from = clusters.start << layout.cluster_bits;
        let Some(to) = self.copy(from, clusters.end - clusters.start)? else {
            return Ok(None);
        };
        let offset = to + layout.within_cluster(packed.offset);
        let fits = Packed::fits(layout, offset, packed.len.min(layout.cluster_size()));
        Ok(fits.then_some(Packed { offset, ..packed }))
    }

    /// Copies so many clusters. Returns where to, unless it is too much.
    fn copy(&mut self, offset: u64, count: u64) -> io::Result<Option<u64>> {
        let Some(to) = self.take(count)? else {
            return Ok(None);
        };
        let mut buf = vec![0; self.layout.cluster_len()];
        for at in 0..count {
            let at = at << self.layout.cluster_bits;
            self.file.read_buf(&mut buf, offset + at)?;
            self.write(&buf, to + at)?;
        }
        Ok(Some(to))
    }

    /// Takes so many clusters that are used for nothing. Returns where they are, unless too many
    /// have been taken.
    fn take(&mut self, count: u64) -> io::Result<Option<u64>> {
        let bits = self.layout.cluster_bits;
        if count > (MAX_COPIED >> bits).saturating_sub(self.copied) {
            return Ok(None);
        }
        let place = self.find_room(count)?;
        self.copied += count;
        let start = place.start;
        place.into_iter().try_for_each(|at| self.counts.add(at))?;
        Ok(Some(start << bits))
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_buf(bytes, offset)?;
        self.file_len = self.file_len.max(offset + bytes.len() as u64);
        Ok(())
    }
}
