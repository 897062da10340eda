//! How many references each cluster of the file has: the refcount table and its blocks.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::cache::{Cache, Found};
use super::damage::{ImageFile, damage};
use super::layout::{Layout, MAX_REFCOUNT_TABLE_BYTES};

/// Where a refcount table entry points.
const OFFSET_MASK: u64 = !0x1ff;

/// The refcounts of an image: those of the file, and what has changed since they were written.
#[derive(Debug)]
pub struct Refcounts {
    file: Arc<ImageFile>,
    layout: Layout,
    /// Where the blocks are.
    table: Vec<u64>,
    /// Where the table is, once what has changed is written.
    place: Range<u64>,
    /// The table is too long for its place.
    outgrown: bool,
    /// The file's header does not point at `place` yet.
    moved: bool,
    /// Pieces of the table, as long as a slice, that have changed.
    dirty_table: BTreeSet<usize>,
    /// Blocks of which the file has nothing yet.
    new_blocks: BTreeSet<usize>,
    cache: Cache,
}

impl Refcounts {
    /// Refcounts whose table, at `offset` in the file, is `table`. They take up to `memory` bytes
    /// for slices of their blocks.
    pub fn new(
        file: Arc<ImageFile>,
        layout: Layout,
        table: Vec<u64>,
        offset: u64,
        memory: usize,
    ) -> Self {
        let start = layout.cluster_of(offset);
        let place = start..start + layout.clusters(table.len() as u64 * 8);
        Self {
            file,
            layout,
            table,
            place,
            outgrown: false,
            moved: false,
            dirty_table: BTreeSet::new(),
            new_blocks: BTreeSet::new(),
            cache: Cache::new(layout.slice_len(), memory),
        }
    }

    /// The clusters that the table is in.
    pub fn place(&self) -> Range<u64> {
        self.place.clone()
    }

    /// The clusters that the blocks are in, as the table says.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.table
            .iter()
            .filter(|entry| *entry & OFFSET_MASK != 0)
            .map(|entry| self.layout.cluster_of(entry & OFFSET_MASK))
    }

    /// Checks where the blocks are said to be.
    ///
    /// # Errors
    /// One of them can't be there.
    pub fn check_blocks(&self) -> io::Result<()> {
        (0..self.table.len()).try_for_each(|index| self.block(index).map(drop))
    }

    /// Where a block begins, in bytes, if there is one.
    fn block(&self, index: usize) -> io::Result<Option<u64>> {
        let offset = self.table.get(index).unwrap_or(&0) & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if !self.new_blocks.contains(&index) {
            if self.layout.within_cluster(offset) != 0 {
                return Err(damage(format!(
                    "its refcount block at offset {offset} does not start at a cluster"
                )));
            }
            self.file.check("refcount block", offset)?;
        }
        Ok(Some(offset))
    }

    fn block_index(&self, cluster: u64) -> usize {
        usize::try_from(cluster / self.layout.block_refcounts()).unwrap_or(usize::MAX)
    }

    /// Whether no block has the refcount of this cluster.
    pub fn lacks_block(&self, cluster: u64) -> bool {
        let entry = self.table.get(self.block_index(cluster)).unwrap_or(&0);
        entry & OFFSET_MASK == 0
    }

    /// The first cluster that cannot have a refcount, as the table can't be that long.
    pub fn end(&self) -> u64 {
        (MAX_REFCOUNT_TABLE_BYTES / 8).saturating_mul(self.layout.block_refcounts())
    }

    /// The slot of a slice, which is read if need be. None if its block does not exist.
    fn slice(&mut self, key: u64) -> io::Result<Option<usize>> {
        // The caller holds the image's lock all the time, so nobody else can be reading it.
        if let Found::Ready(slot) = self.cache.find(key) {
            return Ok(Some(slot));
        }
        let slices = self.layout.slices_in_cluster();
        let index = usize::try_from(key / slices).unwrap_or(usize::MAX);
        let Some(block) = self.block(index)? else {
            return Ok(None);
        };
        let (slot, mut data) = self.cache.reserve(key);
        let done = if self.new_blocks.contains(&index) {
            data.fill(0);
            Ok(())
        } else {
            let at = block + key % slices * data.len() as u64;
            self.file.host().read_buf(&mut data, at)
        };
        match done {
            Ok(()) => self.cache.fill(slot, data),
            Err(_) => self.cache.give_up(slot, data),
        }
        done.map(|()| Some(slot))
    }

    /// Where the refcount of a cluster is: its slice, and its place in there.
    fn position(&self, cluster: u64) -> (u64, usize) {
        let refcounts = self.layout.slice_refcounts();
        let within = usize::try_from(cluster % refcounts).unwrap_or(0);
        (cluster / refcounts, within)
    }

    /// The refcount of a cluster.
    ///
    /// # Errors
    /// It can't be read.
    pub fn get(&mut self, cluster: u64) -> io::Result<u64> {
        let (key, at) = self.position(cluster);
        Ok(match self.slice(key)? {
            Some(slot) => get(self.cache.data(slot), self.layout.refcount_order, at),
            None => 0,
        })
    }

    /// Sets the refcount of a cluster, for which there is a block.
    ///
    /// # Errors
    /// It can't be read.
    pub fn set(&mut self, cluster: u64, refcount: u64) -> io::Result<()> {
        let (key, at) = self.position(cluster);
        let Some(slot) = self.slice(key)? else {
            return Err(damage(format!("cluster {cluster} has no refcount")));
        };
        let order = self.layout.refcount_order;
        set(self.cache.data_mut(slot), order, at, refcount);
        Ok(())
    }

    /// Whether a cluster is free, and how many of the next `most` clusters (at least 1) are too,
    /// or are not either. It may be less, so as not to look far.
    ///
    /// # Errors
    /// The refcounts can't be read.
    pub fn alike(&mut self, cluster: u64, most: u64) -> io::Result<(bool, u64)> {
        let (key, at) = self.position(cluster);
        let left = self.layout.slice_refcounts() - at as u64;
        let most = usize::try_from(most.min(left)).unwrap_or(usize::MAX);
        let Some(slot) = self.slice(key)? else {
            return Ok((true, most as u64));
        };
        let data = self.cache.data(slot);
        let order = self.layout.refcount_order;
        let free = get(data, order, at) == 0;
        let alike = (at..at + most).take_while(|at| (get(data, order, *at) == 0) == free);
        Ok((free, alike.count() as u64))
    }

    /// Whether any cluster from this one on has a refcount, as far as `slices` slices tell.
    ///
    /// # Errors
    /// They can't be read.
    pub fn any_from(&mut self, cluster: u64, slices: u64) -> io::Result<bool> {
        let (mut cluster, mut left) = (cluster, slices);
        let block = self.layout.block_refcounts();
        let end = (self.table.len() as u64).saturating_mul(block);
        while cluster < end && left > 0 {
            if self.lacks_block(cluster) {
                cluster = (cluster / block + 1) * block;
                continue;
            }
            let (free, count) = self.alike(cluster, u64::MAX)?;
            if !free {
                return Ok(true);
            }
            cluster += count;
            left -= 1;
        }
        Ok(false)
    }

    /// Has a new block at `cluster` hold the refcount of `of`.
    ///
    /// # Errors
    /// The table can't become that long.
    pub fn add_block(&mut self, of: u64, cluster: u64) -> io::Result<()> {
        let index = self.block_index(of);
        if index >= self.table.len() {
            self.grow(index)?;
        }
        let Some(entry) = self.table.get_mut(index) else {
            return Err(io::ErrorKind::FileTooLarge.into());
        };
        *entry = cluster << self.layout.cluster_bits;
        self.new_blocks.insert(index);
        self.dirty_table.insert(index * 8 / self.layout.slice_len());
        Ok(())
    }

    fn grow(&mut self, index: usize) -> io::Result<()> {
        let in_cluster = self.layout.cluster_len() / 8;
        let len = (index + 1).max(self.table.len() / 2 * 3);
        let most = usize::try_from(MAX_REFCOUNT_TABLE_BYTES / 8).unwrap_or(usize::MAX);
        let len = len.next_multiple_of(in_cluster).min(most);
        if index >= len {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.table.resize(len, 0);
        self.outgrown = true;
        Ok(())
    }

    /// Clusters that the table needs, if it has outgrown its place.
    pub fn outgrown(&self) -> Option<u64> {
        let needed = self.layout.clusters(self.table.len() as u64 * 8);
        self.outgrown.then_some(needed)
    }

    /// Moves the table, and returns where it was.
    pub fn move_table(&mut self, place: Range<u64>) -> Range<u64> {
        self.outgrown = false;
        self.moved = true;
        std::mem::replace(&mut self.place, place)
    }

    /// Whether something is to be written.
    pub fn is_dirty(&self) -> bool {
        self.cache.is_dirty() || !self.dirty_table.is_empty() || !self.new_blocks.is_empty()
    }

    /// Whether so much is to be written that it is time to.
    pub fn is_crowded(&self) -> bool {
        self.cache.is_crowded()
    }

    /// Hands out what has changed, and counts it as on its way to the file.
    pub fn take(&mut self, mut put: impl FnMut(Change<'_>)) -> Taken {
        let (layout, table) = (self.layout, &self.table);
        let new_blocks = std::mem::take(&mut self.new_blocks);
        let slices = layout.slices_in_cluster();
        self.cache.take_dirty(|key, data| {
            let index = usize::try_from(key / slices).unwrap_or(usize::MAX);
            let block = table.get(index).unwrap_or(&0) & OFFSET_MASK;
            let offset = block + key % slices * data.len() as u64;
            if new_blocks.contains(&index) {
                put(Change::NewSlice(offset, data));
            } else {
                put(Change::Slice(offset, data));
            }
        });
        for index in &new_blocks {
            put(Change::NewBlock(
                table.get(*index).unwrap_or(&0) & OFFSET_MASK,
            ));
        }
        let taken = Taken {
            new_blocks,
            dirty_table: std::mem::take(&mut self.dirty_table),
            moved: std::mem::take(&mut self.moved),
        };
        let start = self.place.start << layout.cluster_bits;
        let in_piece = layout.slice_len() / 8;
        let mut bytes = Vec::new();
        let mut put_piece = |piece: usize| {
            let entries = table.iter().skip(piece * in_piece).take(in_piece);
            bytes.clear();
            bytes.extend(entries.flat_map(|entry| entry.to_be_bytes()));
            put(Change::Table(
                start + (piece * layout.slice_len()) as u64,
                &bytes,
            ));
        };
        if taken.moved {
            (0..table.len().div_ceil(in_piece)).for_each(&mut put_piece);
        } else {
            taken.dirty_table.iter().copied().for_each(&mut put_piece);
        }
        taken
    }

    /// Ends what [`Self::take`] began; without success all of it counts as changed again.
    pub fn written(&mut self, mut taken: Taken, success: bool) {
        self.cache.written(success);
        if !success {
            self.new_blocks.append(&mut taken.new_blocks);
            self.dirty_table.append(&mut taken.dirty_table);
            self.moved |= taken.moved;
        }
    }
}

/// Something that has changed: where it goes in the file, and its bytes.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// A slice of a block.
    Slice(u64, &'a [u8]),
    /// A slice of a block of which the file has nothing yet.
    NewSlice(u64, &'a [u8]),
    /// A block of which the file has nothing yet; all its slices that are not told of are zero.
    NewBlock(u64),
    /// A piece of the table, which may refer to new blocks.
    Table(u64, &'a [u8]),
}

/// What [`Refcounts::take`] handed out.
#[derive(Debug, Default)]
pub struct Taken {
    new_blocks: BTreeSet<usize>,
    dirty_table: BTreeSet<usize>,
    /// The header has to point at the table's new place.
    pub moved: bool,
}

/// The refcount at `at` of a slice. `order` is the binary logarithm of its bits.
pub fn get(slice: &[u8], order: u32, at: usize) -> u64 {
    if order < 3 {
        let (byte, shift) = (at >> (3 - order), (at << order) & 7);
        let byte = slice.get(byte).copied().unwrap_or(0);
        return u64::from(byte) >> shift & ((1 << (1 << order)) - 1);
    }
    let len = 1 << (order - 3);
    let bytes = slice.get(at * len..(at + 1) * len).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Sets the refcount at `at` of a slice.
pub fn set(slice: &mut [u8], order: u32, at: usize, refcount: u64) {
    if order < 3 {
        let (byte, shift) = (at >> (3 - order), (at << order) & 7);
        let mask = ((1u16 << (1 << order)) - 1).to_le_bytes()[0];
        if let Some(byte) = slice.get_mut(byte) {
            *byte = *byte & !(mask << shift) | (refcount.to_le_bytes()[0] & mask) << shift;
        }
        return;
    }
    let len = 1 << (order - 3);
    if let Some(to) = slice.get_mut(at * len..(at + 1) * len) {
        to.copy_from_slice(&refcount.to_be_bytes()[8 - len..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width() {
        for order in 0..=6 {
            let mut slice = vec![0; 512];
            let count = (512 * 8) >> order;
            let most = u64::MAX >> (64 - (1 << order));
            let value = |at: usize| (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & most;
            for at in 0..count {
                set(&mut slice, order, at, most);
                set(&mut slice, order, at, value(at));
            }
            for at in 0..count {
                assert_eq!(get(&slice, order, at), value(at), "order {order}, {at}");
            }
        }
        // As the specification has them: the least significant bits come first, or the most
        // significant byte.
        assert_eq!(get(&[0b0000_0010], 0, 1), 1);
        assert_eq!(get(&[0x21], 2, 1), 2);
        assert_eq!(get(&[0, 0, 1, 2], 4, 1), 0x102);
    }
}
