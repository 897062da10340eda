//! Where each cluster of the disk is: the L1 table and its L2 tables.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::cache::{Cache, Found};
use super::entry::{COPIED, Entry, OFFSET_MASK, words};
use super::layout::Layout;

/// Where a slice of an L2 table is to be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// There is no such table.
    None,
    /// Nowhere, as it is new and empty.
    Zeroes,
    /// In the file: the table begins here, and the slice within it.
    At(u64, u64),
}

/// The mapping of an image: that of the file, and what has changed since it was written.
#[derive(Debug)]
pub struct Tables {
    layout: Layout,
    l1: Vec<u64>,
    /// Where the L1 table is, once what has changed is written.
    place: Range<u64>,
    /// The file's header does not point at `place` yet.
    moved: bool,
    /// The file's header does not tell the size of the disk.
    resized: bool,
    /// Pieces of the L1 table, as long as a slice, that have changed.
    dirty_l1: BTreeSet<usize>,
    /// Tables of which the file has nothing yet, by L1 index, with what they begin as: a copy of
    /// another table, or empty.
    new: BTreeMap<usize, Option<u64>>,
    cache: Cache,
}

impl Tables {
    /// A mapping whose L1 table, at `offset` in the file, is `l1`. It takes up to `memory` bytes for
    /// slices of L2 tables.
    pub fn new(layout: Layout, l1: Vec<u64>, offset: u64, memory: usize) -> Self {
        let start = layout.cluster_of(offset);
        let place = start..start + layout.clusters(l1.len() as u64 * 8);
        Self {
            layout,
            l1,
            place,
            moved: false,
            resized: false,
            dirty_l1: BTreeSet::new(),
            new: BTreeMap::new(),
            cache: Cache::new(layout.slice_len(), memory),
        }
    }

    /// The clusters that the L1 table is in.
    pub fn place(&self) -> Range<u64> {
        self.place.clone()
    }

    /// Entries of the L1 table.
    pub fn l1_len(&self) -> usize {
        self.l1.len()
    }

    /// Where the L2 tables are, in bytes.
    pub fn tables(&self) -> impl Iterator<Item = u64> {
        let offsets = self.l1.iter().map(|entry| entry & OFFSET_MASK);
        offsets.filter(|offset| *offset != 0)
    }

    /// The slice that describes a cluster of the disk, and which of its entries does.
    pub fn position(&self, cluster: u64) -> (u64, usize) {
        let entries = self.layout.slice_entries();
        let within = usize::try_from(cluster % entries).unwrap_or(0);
        (cluster / entries, within)
    }

    /// The entry of the L1 table that a slice belongs to.
    pub fn l1_index(&self, key: u64) -> usize {
        usize::try_from(key / self.layout.slices_in_cluster()).unwrap_or(usize::MAX)
    }

    /// Where an L2 table is, and whether nothing else uses it.
    pub fn table(&self, index: usize) -> Option<(u64, bool)> {
        let entry = *self.l1.get(index)?;
        let offset = entry & OFFSET_MASK;
        (offset != 0).then_some((offset, entry & COPIED != 0))
    }

    /// Where a slice is to be read from, if it is not in the cache.
    pub fn source(&self, key: u64) -> Source {
        let index = self.l1_index(key);
        let within = key % self.layout.slices_in_cluster() * self.layout.slice_len() as u64;
        match (self.table(index), self.new.get(&index)) {
            (None, _) => Source::None,
            (Some(_), Some(None)) => Source::Zeroes,
            (Some(_), Some(Some(from))) => Source::At(*from, within),
            (Some((offset, _)), None) => Source::At(offset, within),
        }
    }

    /// The slices in memory.
    pub fn cache(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// [`Cache::find`].
    pub fn find(&mut self, key: u64) -> Found {
        self.cache.find(key)
    }

    /// Has a new table, at `offset`, take the place of the one that there was, as a copy of it, or
    /// none. The L1 table is long enough.
    pub fn replace(&mut self, index: usize, offset: u64) {
        // What is new and of which there is nothing in the file yet cannot be shared.
        let old = self.table(index).map(|(old, _)| old);
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = offset | COPIED;
            self.dirty_l1.insert(index * 8 / self.layout.slice_len());
            self.new.insert(index, old);
        }
    }

    /// The entry at `at` of the slice in `slot`.
    ///
    /// # Errors
    /// Why the entry makes no sense.
    pub fn entry(&self, slot: usize, at: usize) -> Result<Entry, &'static str> {
        Entry::decode(self.layout, words(self.layout, self.cache.data(slot), at))
    }

    /// Changes an entry.
    pub fn set_entry(&mut self, slot: usize, at: usize, entry: Entry) {
        let len = self.layout.entry_len();
        let [word, bitmap] = entry.encode(self.layout);
        let bytes = (u128::from(word) << 64 | u128::from(bitmap)).to_be_bytes();
        let place = self.cache.data_mut(slot).get_mut(at * len..(at + 1) * len);
        if let (Some(to), Some(from)) = (place, bytes.get(..len)) {
            to.copy_from_slice(from);
        }
    }

    /// Has the header tell the size of the disk anew, and makes the L1 table longer if `place` is
    /// where it will be then. Returns where it was if so.
    pub fn grow(&mut self, longer: Option<(usize, Range<u64>)>) -> Option<Range<u64>> {
        self.resized = true;
        let (entries, place) = longer?;
        self.l1.resize(entries.max(self.l1.len()), 0);
        self.moved = true;
        Some(std::mem::replace(&mut self.place, place))
    }

    /// Whether something is to be written.
    pub fn is_dirty(&self) -> bool {
        self.cache.is_dirty() || !self.dirty_l1.is_empty() || !self.new.is_empty() || self.resized
    }

    /// Whether so much is to be written that it is time to.
    pub fn is_crowded(&self) -> bool {
        self.cache.is_crowded()
    }

    /// Hands out what has changed, and counts it as on its way to the file.
    pub fn take(&mut self, mut put: impl FnMut(Change<'_>)) -> Taken {
        let (layout, l1, new) = (self.layout, &self.l1, &self.new);
        let slices = layout.slices_in_cluster();
        self.cache.take_dirty(|key, data| {
            let index = usize::try_from(key / slices).unwrap_or(usize::MAX);
            let table = l1.get(index).unwrap_or(&0) & OFFSET_MASK;
            let offset = table + key % slices * data.len() as u64;
            if new.contains_key(&index) {
                put(Change::NewSlice(offset, data));
            } else {
                put(Change::Slice(offset, data));
            }
        });
        for (index, from) in &self.new {
            put(Change::NewTable(
                l1.get(*index).unwrap_or(&0) & OFFSET_MASK,
                *from,
            ));
        }
        let taken = Taken {
            new: self.new.keys().copied().collect(),
            dirty_l1: std::mem::take(&mut self.dirty_l1),
            moved: std::mem::take(&mut self.moved),
            resized: std::mem::take(&mut self.resized),
        };
        let start = self.place.start << layout.cluster_bits;
        let in_piece = layout.slice_len() / 8;
        let mut bytes = Vec::new();
        let mut put_piece = |piece: usize| {
            let entries = l1.iter().skip(piece * in_piece).take(in_piece);
            bytes.clear();
            bytes.extend(entries.flat_map(|entry| entry.to_be_bytes()));
            let offset = start + (piece * layout.slice_len()) as u64;
            put(if taken.moved {
                Change::NewL1(offset, &bytes)
            } else {
                Change::L1(offset, &bytes)
            });
        };
        if taken.moved {
            (0..l1.len().div_ceil(in_piece)).for_each(&mut put_piece);
        } else {
            taken.dirty_l1.iter().copied().for_each(&mut put_piece);
        }
        taken
    }

    /// Tells that the new tables which were handed out are in the file. Slices that were changed
    /// since are written as those of any other table.
    pub fn tables_written(&mut self, taken: &mut Taken) {
        for index in std::mem::take(&mut taken.new) {
            self.new.remove(&index);
        }
    }

    /// Ends what [`Self::take`] began; without success all of it counts as changed again, but for
    /// [`Self::tables_written`].
    pub fn written(&mut self, mut taken: Taken, success: bool) {
        self.cache.written(success);
        if !success {
            self.dirty_l1.append(&mut taken.dirty_l1);
            self.moved |= taken.moved;
            self.resized |= taken.resized;
        }
    }
}

/// Something that has changed: where it goes in the file, and its bytes.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// A slice of an L2 table.
    Slice(u64, &'a [u8]),
    /// A slice of a table of which the file has nothing yet.
    NewSlice(u64, &'a [u8]),
    /// A table of which the file has nothing yet; the slices that are not told of are those of
    /// another table, or zero.
    NewTable(u64, Option<u64>),
    /// A piece of the L1 table, which may refer to new tables.
    L1(u64, &'a [u8]),
    /// A piece of the L1 table where it will be.
    NewL1(u64, &'a [u8]),
}

/// What [`Tables::take`] handed out.
#[derive(Debug, Default)]
pub struct Taken {
    new: Vec<usize>,
    dirty_l1: BTreeSet<usize>,
    moved: bool,
    /// The header has to tell where the L1 table is, how long it is, and the size of the disk.
    pub resized: bool,
}
