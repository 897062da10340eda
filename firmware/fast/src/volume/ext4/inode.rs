//! Inodes, and where their bytes are: extents, or the older maps of blocks.

use alloc::vec;
use alloc::vec::Vec;

use super::{Ext4, damaged, dword, word};
use crate::decline::{Decline, layout};

/// As much of an inode as is read.
pub(super) const LEN: usize = 128;

const KIND: u16 = 0xf000;
const KIND_DIRECTORY: u16 = 0x4000;
const KIND_FILE: u16 = 0x8000;
const KIND_LINK: u16 = 0xa000;
const MAP_AT: usize = 40;
const MAP_LEN: usize = 60;
const FLAG_COMPRESSED: u32 = 0x4;
const FLAG_ENCRYPTED: u32 = 0x800;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE: u32 = 0x1000_0000;
const FLAG_CASEFOLD: u32 = 0x4000_0000;
const FLAGS_LEFT_OUT: u32 = FLAG_COMPRESSED | FLAG_ENCRYPTED | FLAG_INLINE | FLAG_CASEFOLD;

const EXTENTS_MAGIC: u16 = 0xf30a;
const EXTENT_LEN: usize = 12;
const EXTENT_DEPTH_MAX: u16 = 5;
/// Lengths above this are of extents that were never written: zeroes.
const EXTENT_WRITTEN_MAX: u16 = 32768;
/// Pieces of a file, and blocks of its map.
const PIECES_MAX: usize = 65_536;
/// Longer files are no kernels.
const BLOCKS_MAX: u64 = 1 << 22;
const DIRECT: usize = 12;

/// An inode.
#[derive(Debug)]
pub(super) struct Inode {
    kind: u16,
    flags: u32,
    /// Length in bytes.
    pub(super) len: u64,
    has_blocks: bool,
    map: [u8; MAP_LEN],
}

/// Where a file's blocks are.
#[derive(Debug, Default)]
pub struct Runs(Vec<Run>);

#[derive(Debug, Clone, Copy)]
struct Run {
    /// The first block in the file.
    first: u64,
    /// The first block on the disk.
    place: u64,
    count: u64,
}

impl Inode {
    pub(super) fn parse(bytes: &[u8; LEN]) -> Result<Self, Decline> {
        let map = bytes
            .get(MAP_AT..MAP_AT + MAP_LEN)
            .and_then(|b| b.try_into().ok());
        let inode = Self {
            kind: word(bytes, 0) & KIND,
            flags: dword(bytes, 32),
            len: u64::from(dword(bytes, 4)) | u64::from(dword(bytes, 108)) << 32,
            has_blocks: dword(bytes, 28) != 0,
            map: map.unwrap_or([0; MAP_LEN]),
        };
        if inode.flags & FLAGS_LEFT_OUT != 0 {
            return Err(layout("ext4: a file is kept in a way that is left out"));
        }
        Ok(inode)
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind == KIND_DIRECTORY
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind == KIND_FILE
    }

    pub(super) fn is_link(&self) -> bool {
        self.kind == KIND_LINK
    }

    /// The target of a symbolic link that is short enough to be in its inode.
    pub(super) fn short_link(&self) -> Option<&[u8]> {
        let len = usize::try_from(self.len).ok()?;
        let inside = self.flags & FLAG_EXTENTS == 0 && len < MAP_LEN && !self.has_blocks;
        self.map.get(..len).filter(|_| inside)
    }

    /// Where its blocks are.
    pub(super) fn runs(&self, fs: &Ext4) -> Result<Runs, Decline> {
        let blocks = self.len.div_ceil(fs.block_len);
        if blocks > BLOCKS_MAX {
            return Err(layout("ext4: a file is too long"));
        }
        let mut map = Map {
            fs,
            blocks,
            runs: Runs::default(),
            nodes: 0,
        };
        if self.flags & FLAG_EXTENTS == 0 {
            map.add_block_map(&self.map)?;
        } else {
            map.add_extents(&self.map, EXTENT_DEPTH_MAX + 1)?;
        }
        Ok(map.runs)
    }
}

impl Runs {
    /// Where block `index` of the file is; `None` in a hole.
    pub(super) fn block(&self, index: u64) -> Option<u64> {
        self.from(index).0
    }

    /// Where block `index` is, and how many blocks from there are in a row, or in the hole.
    pub(super) fn from(&self, index: u64) -> (Option<u64>, u64) {
        let next = self.0.partition_point(|run| run.first <= index);
        if let Some(run) = next.checked_sub(1).and_then(|last| self.0.get(last)) {
            let within = index - run.first;
            if within < run.count {
                return (Some(run.place + within), run.count - within);
            }
        }
        let end = self.0.get(next).map_or(BLOCKS_MAX, |run| run.first);
        (None, end.saturating_sub(index).max(1))
    }
}

struct Map<'a> {
    fs: &'a Ext4,
    /// Blocks of the file.
    blocks: u64,
    runs: Runs,
    nodes: usize,
}

impl Map<'_> {
    /// Adds blocks, which must come in the file's order.
    fn add(&mut self, first: u64, place: u64, count: u64) -> Result<(), Decline> {
        if let Some(last) = self.runs.0.last_mut() {
            if first < last.first + last.count {
                return Err(damaged("the order of a file"));
            }
            if first == last.first + last.count && place == last.place + last.count {
                last.count += count;
                return Ok(());
            }
        }
        if self.runs.0.len() >= PIECES_MAX {
            return Err(layout("ext4: a file is too fragmented"));
        }
        self.runs.0.push(Run {
            first,
            place,
            count,
        });
        Ok(())
    }

    fn node(&mut self, block: u64) -> Result<Vec<u8>, Decline> {
        self.nodes += 1;
        if self.nodes > PIECES_MAX {
            return Err(damaged("the map of a file"));
        }
        let mut node = vec![0; usize::try_from(self.fs.block_len).unwrap_or(0)];
        self.fs.read(block, 0, &mut node)?;
        Ok(node)
    }

    /// Adds the extents of a node of the tree, which must be less deep than `above`.
    fn add_extents(&mut self, node: &[u8], above: u16) -> Result<(), Decline> {
        let (count, depth) = (usize::from(word(node, 2)), word(node, 6));
        let entries = node.get(EXTENT_LEN..).unwrap_or_default();
        let entries = entries.get(..count * EXTENT_LEN);
        let sane = word(node, 0) == EXTENTS_MAGIC && depth < above;
        let entries = entries
            .filter(|_| sane)
            .ok_or_else(|| damaged("the map of a file"))?;
        for entry in entries.chunks_exact(EXTENT_LEN) {
            if depth > 0 {
                let block = u64::from(dword(entry, 4)) | u64::from(word(entry, 8)) << 32;
                let child = self.node(block)?;
                self.add_extents(&child, depth)?;
                continue;
            }
            let len = word(entry, 4);
            let place = u64::from(dword(entry, 8)) | u64::from(word(entry, 6)) << 32;
            if (1..=EXTENT_WRITTEN_MAX).contains(&len) {
                self.add(u64::from(dword(entry, 0)), place, u64::from(len))?;
            }
        }
        Ok(())
    }

    fn add_block_map(&mut self, map: &[u8]) -> Result<(), Decline> {
        let mut next = 0;
        for index in 0..DIRECT {
            self.add_mapped(dword(map, index * 4), 0, &mut next)?;
        }
        for (level, index) in (1..=3).zip(DIRECT..) {
            self.add_mapped(dword(map, index * 4), level, &mut next)?;
        }
        Ok(())
    }

    /// Adds what a pointer leads to: a block at level 0, else a block of pointers.
    fn add_mapped(&mut self, pointer: u32, level: u32, next: &mut u64) -> Result<(), Decline> {
        let per_block = self.fs.block_len / 4;
        if *next >= self.blocks {
            return Ok(());
        }
        if pointer == 0 {
            *next += per_block.pow(level);
            return Ok(());
        }
        if level == 0 {
            self.add(*next, u64::from(pointer), 1)?;
            *next += 1;
            return Ok(());
        }
        let node = self.node(u64::from(pointer))?;
        for pointer in node.chunks_exact(4) {
            self.add_mapped(dword(pointer, 0), level - 1, next)?;
        }
        Ok(())
    }
}
