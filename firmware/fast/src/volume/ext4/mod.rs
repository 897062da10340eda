//! ext2, ext3 and ext4 (Linux, Documentation/filesystems/ext4).
//!
//! Directories are read from end to end, whether they are hashed or not. Left out: meta block
//! groups, file data inside of inodes, compression, encryption, folded case and journals on other
//! disks; checksums are not looked at. What is only in the journal yet is read from there
//! (`journal`).

mod inode;
mod journal;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::{Content, File, NAMES_MAX, Node};
use crate::decline::{Decline, layout};
use crate::disk::{Disk, DiskError};
use inode::Inode;
pub use inode::Runs;

const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_LEN: usize = 1024;
const MAGIC: u16 = 0xef53;
const MAGIC_AT: usize = 0x38;
const ROOT: u32 = 2;
const LINKS_MAX: u32 = 32;
/// Longer directories are no boot loader's.
const DIRECTORY_MAX: u64 = 8 << 20;
const LINK_MAX: u64 = 4096;

/// Incompatible features that are no matter to a reader, or are read.
const RECOVER: u32 = 0x4;
const KNOWN: u32 =
    0x2 | RECOVER | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000;
const HAS_64BIT: u32 = 0x80;
const COMPATIBLE_JOURNAL: u32 = 0x4;

fn word(bytes: &[u8], at: usize) -> u16 {
    let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u16::from_le_bytes)
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

fn damaged(what: &str) -> Decline {
    layout(format!("ext4: {what} is damaged"))
}

/// Whether `disk` has such a file system.
pub(super) fn is_ext4(disk: &Disk) -> Result<bool, DiskError> {
    let mut magic = [0; 2];
    let at = SUPERBLOCK + MAGIC_AT as u64;
    if disk.len() < at + 2 {
        return Ok(false);
    }
    disk.read(at, &mut magic)?;
    Ok(u16::from_le_bytes(magic) == MAGIC)
}

/// An ext4 file system.
#[derive(Debug)]
pub struct Ext4Volume(Rc<Ext4>);

/// An open file.
#[derive(Debug)]
pub struct Ext4File {
    fs: Rc<Ext4>,
    runs: Runs,
}

#[derive(Debug)]
struct Ext4 {
    disk: Disk,
    block_len: u64,
    blocks: u64,
    first_block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_len: u64,
    descriptor_len: u64,
    uuid: [u8; 16],
    label: String,
    /// Blocks that are newer in the journal: where they belong, and where they are.
    newer: BTreeMap<u64, u64>,
}

impl Ext4 {
    fn open(disk: &Disk) -> Result<Self, Decline> {
        let mut superblock = [0; SUPERBLOCK_LEN];
        disk.read(SUPERBLOCK, &mut superblock)?;
        let mut fs = Self::parse(disk, &superblock)?;
        let [compatible, incompatible] = [0x5c, 0x60].map(|at| dword(&superblock, at));
        if compatible & COMPATIBLE_JOURNAL != 0 && incompatible & RECOVER != 0 {
            let journal = fs.inode(dword(&superblock, 0xe0))?;
            fs.newer = journal::newer_blocks(&fs, &journal)?;
            // The journal has the superblock too, but what was read of it does not change.
        }
        Ok(fs)
    }

    fn parse(disk: &Disk, superblock: &[u8]) -> Result<Self, Decline> {
        let field = |at| dword(superblock, at);
        let incompatible = field(0x60);
        if incompatible & !KNOWN != 0 {
            let unknown = incompatible & !KNOWN;
            return Err(layout(format!("ext4: feature {unknown:#x} is left out")));
        }
        let wide = incompatible & HAS_64BIT != 0;
        let modern = field(0x4c) > 0;
        let (inode_len, descriptor_len) = (word(superblock, 0x58), word(superblock, 0xfe));
        let label = superblock.get(0x78..0x88).unwrap_or_default();
        let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
        let uuid = superblock.get(0x68..0x78).and_then(|b| b.try_into().ok());
        let fs = Self {
            disk: disk.clone(),
            block_len: 1024 << field(0x18).min(32),
            blocks: u64::from(field(0x04))
                | if wide {
                    u64::from(field(0x150)) << 32
                } else {
                    0
                },
            first_block: u64::from(field(0x14)),
            inodes: field(0x00),
            inodes_per_group: field(0x28),
            inode_len: if modern { u64::from(inode_len) } else { 128 },
            descriptor_len: if wide { u64::from(descriptor_len) } else { 32 },
            uuid: uuid.unwrap_or_default(),
            label: String::from_utf8_lossy(label).into_owned(),
            newer: BTreeMap::new(),
        };
        let sane = fs.block_len <= 64 << 10
            && (128..=fs.block_len).contains(&fs.inode_len)
            && fs.inode_len.is_power_of_two()
            && (32..=1024).contains(&fs.descriptor_len)
            && fs.descriptor_len.is_power_of_two()
            && fs.inodes_per_group > 0
            && fs.blocks <= disk.len() / fs.block_len;
        if sane {
            Ok(fs)
        } else {
            Err(damaged("the superblock"))
        }
    }

    /// Reads metadata: bytes of one block, wherever the newest are.
    fn read(&self, block: u64, offset: u64, into: &mut [u8]) -> Result<(), Decline> {
        let place = self.newer.get(&block).copied().unwrap_or(block);
        self.read_raw(place, offset, into)
    }

    /// Reads bytes of one block or several in a row, as they are on the disk.
    fn read_raw(&self, block: u64, offset: u64, into: &mut [u8]) -> Result<(), Decline> {
        if block == 0 || block >= self.blocks {
            return Err(damaged("a block's number"));
        }
        Ok(self.disk.read(block * self.block_len + offset, into)?)
    }

    fn inode(&self, number: u32) -> Result<Inode, Decline> {
        let index = number.checked_sub(1).filter(|_| number <= self.inodes);
        let index = index.ok_or_else(|| damaged("an inode's number"))?;
        let group = u64::from(index / self.inodes_per_group);
        let index = u64::from(index % self.inodes_per_group);
        let at = group * self.descriptor_len;
        let mut descriptor = [0; 64];
        let len = usize::try_from(self.descriptor_len.min(64)).unwrap_or(0);
        let descriptor = descriptor.get_mut(..len).unwrap_or_default();
        let block = self.first_block + 1 + at / self.block_len;
        self.read(block, at % self.block_len, descriptor)?;
        let table = u64::from(dword(descriptor, 0x08)) | u64::from(dword(descriptor, 0x28)) << 32;
        let at = index * self.inode_len;
        let mut bytes = [0; inode::LEN];
        let block = table.saturating_add(at / self.block_len);
        self.read(block, at % self.block_len, &mut bytes)?;
        Inode::parse(&bytes)
    }

    /// All of a directory or a symbolic link.
    fn content(&self, inode: &Inode, max: u64) -> Result<Vec<u8>, Decline> {
        if inode.len > max {
            return Err(layout("ext4: a directory or a link is too long"));
        }
        let mut content = alloc::vec![0; usize::try_from(inode.len).unwrap_or(0)];
        let runs = inode.runs(self)?;
        let block_len = usize::try_from(self.block_len).unwrap_or(usize::MAX);
        for (index, place) in (0..).zip(content.chunks_mut(block_len)) {
            if let Some(block) = runs.block(index) {
                self.read(block, 0, place)?;
            }
        }
        Ok(content)
    }

    fn link(&self, inode: &Inode) -> Result<String, Decline> {
        let bytes = match inode.short_link() {
            Some(bytes) => bytes.to_vec(),
            None => self.content(inode, LINK_MAX)?,
        };
        String::from_utf8(bytes).map_err(|_| damaged("a symbolic link"))
    }

    /// Has `each` look at the names of a directory with their inodes until it says true.
    fn search(
        &self,
        directory: &Inode,
        mut each: impl FnMut(&[u8], u32) -> Result<bool, Decline>,
    ) -> Result<(), Decline> {
        let content = self.content(directory, DIRECTORY_MAX)?;
        let block_len = usize::try_from(self.block_len).unwrap_or(usize::MAX);
        for mut block in content.chunks(block_len) {
            while !block.is_empty() {
                let (number, len) = (dword(block, 0), usize::from(word(block, 4)));
                // A whole block of 64 KiB does not fit the field.
                let len = if len == 0 || len == 0xffff {
                    block.len()
                } else {
                    len
                };
                let name_len = usize::from(*block.get(6).unwrap_or(&0));
                let name = block.get(8..8 + name_len);
                let entry = name.filter(|_| len >= 8 + name_len && len <= block.len());
                let name = entry.ok_or_else(|| damaged("a directory"))?;
                if number != 0 && each(name, number)? {
                    return Ok(());
                }
                block = block.get(len..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// The inode that a path leads to.
    fn find(&self, path: &str) -> Result<Option<Inode>, Decline> {
        let mut current = self.inode(ROOT)?;
        let names = |path: &str| -> Vec<String> {
            let names = path.split('/').filter(|name| !name.is_empty());
            names.map(ToString::to_string).collect()
        };
        let mut left = VecDeque::from(names(path));
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            if !current.is_directory() {
                return Ok(None);
            }
            let mut found = None;
            self.search(&current, |entry, number| {
                if entry == name.as_bytes() {
                    found = Some(number);
                }
                Ok(found.is_some())
            })?;
            let Some(number) = found else {
                return Ok(None);
            };
            let inode = self.inode(number)?;
            if !inode.is_link() {
                current = inode;
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return Err(layout("ext4: a path has too many symbolic links"));
            }
            let target = self.link(&inode)?;
            if target.starts_with('/') {
                current = self.inode(ROOT)?;
            }
            for name in names(&target).into_iter().rev() {
                left.push_front(name);
            }
        }
        Ok(Some(current))
    }
}

impl Ext4Volume {
    pub(super) fn open(disk: &Disk) -> Result<Self, Decline> {
        Ext4::open(disk).map(Rc::new).map(Self)
    }

    pub(super) fn uuid(&self) -> String {
        let mut text = String::new();
        for (index, byte) in self.0.uuid.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }

    pub(super) fn label(&self) -> String {
        self.0.label.clone()
    }

    pub(super) fn find(&self, path: &str) -> Result<Option<Node>, Decline> {
        let Some(inode) = self.0.find(path)? else {
            return Ok(None);
        };
        if inode.is_directory() {
            return Ok(Some(Node::Directory));
        }
        if !inode.is_file() {
            return Err(layout("ext4: a special file is where a file should be"));
        }
        let file = Ext4File {
            runs: inode.runs(&self.0)?,
            fs: Rc::clone(&self.0),
        };
        Ok(Some(Node::File(File {
            len: inode.len,
            content: Content::Ext4(file),
        })))
    }

    pub(super) fn names(&self, path: &str) -> Result<Vec<String>, Decline> {
        let mut names = Vec::new();
        let directory = self.0.find(path)?.filter(Inode::is_directory);
        let Some(directory) = directory else {
            return Ok(names);
        };
        self.0.search(&directory, |name, _| {
            if names.len() >= NAMES_MAX {
                return Err(layout("a directory has too many files"));
            }
            names.extend(String::from_utf8(name.to_vec()));
            Ok(false)
        })?;
        Ok(names)
    }
}

impl Ext4File {
    /// Fills `into` with the bytes from `offset` on; holes are zeroes.
    pub(super) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), Decline> {
        let block_len = self.fs.block_len;
        let (mut offset, mut into) = (offset, into);
        while !into.is_empty() {
            let (block, within) = (offset / block_len, offset % block_len);
            let (place, count) = self.runs.from(block);
            let len = count.saturating_mul(block_len) - within;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(into.len());
            let (part, rest) = into.split_at_mut(len);
            match place {
                Some(place) if place.saturating_add(count) <= self.fs.blocks => {
                    self.fs.read_raw(place, within, part)?;
                }
                Some(_) => return Err(damaged("a file")),
                None => part.fill(0),
            }
            offset += len as u64;
            into = rest;
        }
        Ok(())
    }
}
