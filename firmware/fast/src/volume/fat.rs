//! FAT12, FAT16 and FAT32 with long names (Microsoft FAT specification, 2005), as an EFI system
//! partition has them. Names are compared without regard to the case of ASCII letters.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::{Content, File, NAMES_MAX, Node};
use crate::decline::{Decline, layout};
use crate::disk::{Disk, DiskError};

const ENTRY_LEN: usize = 32;
/// The specification's end of directories.
const DIRECTORY_MAX: u64 = 65_536 * ENTRY_LEN as u64;
/// Pieces of a file; more fragments has no file that was copied once.
const RUNS_MAX: usize = 65_536;
const ATTRIBUTE_LONG: u8 = 0x0f;
const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const DELETED: u8 = 0xe5;
/// Of a long name: the entry that comes first has the end of the name.
const LONG_LAST: u8 = 0x40;
const LONG_ENTRIES_MAX: usize = 20;
/// Places of a long name's 13 characters in its entry.
const LONG_PLACES: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

/// A FAT file system.
#[derive(Debug)]
pub struct FatVolume {
    disk: Disk,
    width: Width,
    cluster: u64,
    clusters: u32,
    table: u64,
    data: u64,
    root: Root,
    serial: u32,
    label: String,
}

#[derive(Debug, Clone, Copy)]
enum Root {
    /// A place of its own: offset and length.
    Fixed(u64, u64),
    /// A chain of clusters like any other.
    Chain(u32),
}

/// An open file: pieces of the disk in order, (offset, length).
#[derive(Debug)]
pub struct FatFile {
    disk: Disk,
    runs: Vec<(u64, u64)>,
}

/// What a directory's entry says.
#[derive(Debug, Clone)]
struct Entry {
    name: String,
    directory: bool,
    cluster: u32,
    len: u32,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u16::from_le_bytes)
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

fn damaged() -> Decline {
    layout("a FAT file system is damaged")
}

impl FatVolume {
    /// The file system on `disk`; `None` when it is no FAT.
    pub(super) fn open(disk: &Disk) -> Result<Option<Self>, DiskError> {
        let mut boot = [0; 512];
        if disk.len() < boot.len() as u64 {
            return Ok(None);
        }
        disk.read(0, &mut boot)?;
        Ok(Self::parse(disk, &boot))
    }

    fn parse(disk: &Disk, boot: &[u8; 512]) -> Option<Self> {
        let sector = u64::from(word(boot, 11));
        let per_cluster = u64::from(boot[13]);
        let tables = u64::from(boot[16]);
        let sane = boot[510..] == [0x55, 0xaa]
            && matches!(boot[0], 0xeb | 0xe9)
            && sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && per_cluster.is_power_of_two()
            && (1..=2).contains(&tables);
        if !sane {
            return None;
        }
        let or = |short: u16, long: u32| if short == 0 { long } else { u32::from(short) };
        let total = u64::from(or(word(boot, 19), dword(boot, 32)));
        let table_len = u64::from(or(word(boot, 22), dword(boot, 36)));
        let root_len = u64::from(word(boot, 17)) * ENTRY_LEN as u64;
        let root_sectors = root_len.div_ceil(sector);
        let root_start = u64::from(word(boot, 14)) + tables * table_len;
        let data = root_start + root_sectors;
        let clusters = u32::try_from(total.checked_sub(data)? / per_cluster).ok()?;
        let width = match clusters {
            0 => return None,
            1..4085 => Width::Fat12,
            4085..65_525 => Width::Fat16,
            _ => Width::Fat32,
        };
        let (root, more) = match width {
            Width::Fat32 => (Root::Chain(dword(boot, 44)), 67),
            _ => (Root::Fixed(root_start * sector, root_len), 39),
        };
        let label = boot.get(more + 4..more + 15).unwrap_or_default();
        Some(Self {
            disk: disk.clone(),
            width,
            cluster: per_cluster * sector,
            clusters,
            table: u64::from(word(boot, 14)) * sector,
            data: data * sector,
            root,
            serial: dword(boot, more),
            label: String::from_utf8_lossy(label).trim_end().into(),
        })
    }

    pub(super) fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.serial >> 16, self.serial & 0xffff)
    }

    pub(super) fn label(&self) -> String {
        self.label.clone()
    }

    pub(super) fn find(&self, path: &str) -> Result<Option<Node>, Decline> {
        let mut directory = self.root()?;
        let mut names = path.split('/').filter(|name| !name.is_empty()).peekable();
        while let Some(name) = names.next() {
            let entries = self.entries(&directory)?;
            let same = |entry: &&Entry| entry.name.eq_ignore_ascii_case(name);
            let Some(entry) = entries.iter().find(same) else {
                return Ok(None);
            };
            if entry.directory {
                directory = self.directory(entry.cluster)?;
            } else if names.peek().is_none() {
                return self.file(entry).map(Node::File).map(Some);
            } else {
                return Ok(None);
            }
        }
        Ok(Some(Node::Directory))
    }

    pub(super) fn names(&self, path: &str) -> Result<Vec<String>, Decline> {
        let mut directory = self.root()?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entries = self.entries(&directory)?;
            let same = |e: &&Entry| e.directory && e.name.eq_ignore_ascii_case(name);
            let Some(entry) = entries.iter().find(same) else {
                return Ok(Vec::new());
            };
            directory = self.directory(entry.cluster)?;
        }
        let entries = self.entries(&directory)?;
        if entries.len() > NAMES_MAX {
            return Err(layout("a directory has too many files"));
        }
        Ok(entries.into_iter().map(|entry| entry.name).collect())
    }

    fn root(&self) -> Result<FatFile, Decline> {
        match self.root {
            Root::Fixed(offset, len) => Ok(FatFile {
                disk: self.disk.clone(),
                runs: vec![(offset, len)],
            }),
            Root::Chain(cluster) => self.directory(cluster),
        }
    }

    /// A directory. That of cluster 0 is the root, to which ".." points so.
    fn directory(&self, cluster: u32) -> Result<FatFile, Decline> {
        match (cluster, self.root) {
            (0, Root::Fixed(..)) => self.root(),
            (0, Root::Chain(root)) => self.chain(root, DIRECTORY_MAX),
            _ => self.chain(cluster, DIRECTORY_MAX),
        }
    }

    fn file(&self, entry: &Entry) -> Result<File, Decline> {
        let content = if entry.len == 0 {
            let (disk, runs) = (self.disk.clone(), Vec::new());
            FatFile { disk, runs }
        } else {
            self.chain(entry.cluster, u64::from(entry.len))?
        };
        Ok(File {
            len: u64::from(entry.len),
            content: Content::Fat(content),
        })
    }

    /// The chain from `cluster` on, as far as `max` bytes need it.
    fn chain(&self, cluster: u32, max: u64) -> Result<FatFile, Decline> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut len = 0;
        let mut next = Some(cluster);
        while let Some(cluster) = next.filter(|_| len < max) {
            let index = cluster.checked_sub(2).filter(|i| *i < self.clusters);
            let offset = self.data + u64::from(index.ok_or_else(damaged)?) * self.cluster;
            let count = runs.len();
            match runs.last_mut() {
                Some((start, run)) if *start + *run == offset => *run += self.cluster,
                _ if count >= RUNS_MAX => return Err(layout("a file is too fragmented")),
                _ => runs.push((offset, self.cluster)),
            }
            len += self.cluster;
            next = self.next(cluster)?;
        }
        let disk = self.disk.clone();
        Ok(FatFile { disk, runs })
    }

    /// The cluster after `cluster`; `None` at the end of the chain.
    fn next(&self, cluster: u32) -> Result<Option<u32>, Decline> {
        let mut bytes = [0; 4];
        let at = u64::from(cluster);
        let (offset, len) = match self.width {
            Width::Fat12 => (at + at / 2, 2),
            Width::Fat16 => (at * 2, 2),
            Width::Fat32 => (at * 4, 4),
        };
        let place = bytes.get_mut(..len).unwrap_or_default();
        self.disk.read(self.table + offset, place)?;
        let value = u32::from_le_bytes(bytes);
        let (value, end) = match self.width {
            Width::Fat12 if cluster % 2 == 1 => (value >> 4, 0xff8),
            Width::Fat12 => (value & 0xfff, 0xff8),
            Width::Fat16 => (value, 0xfff8),
            Width::Fat32 => (value & 0xfff_ffff, 0xfff_fff8),
        };
        Ok((value < end).then_some(value))
    }

    fn entries(&self, directory: &FatFile) -> Result<Vec<Entry>, Decline> {
        let mut entries = Vec::new();
        let mut long = LongName::default();
        for (offset, len) in &directory.runs {
            let mut bytes = vec![0; usize::try_from(*len).map_err(|_| damaged())?];
            self.disk.read(*offset, &mut bytes)?;
            for entry in bytes.chunks_exact(ENTRY_LEN) {
                match (entry[0], entry[11]) {
                    (0, _) => return Ok(entries),
                    (DELETED, _) => long = LongName::default(),
                    (_, attributes) if attributes & 0x3f == ATTRIBUTE_LONG => long.add(entry),
                    (_, attributes) if attributes & ATTRIBUTE_LABEL != 0 => {
                        long = LongName::default();
                    }
                    (_, attributes) => {
                        let high = match self.width {
                            Width::Fat32 => u32::from(word(entry, 20)) << 16,
                            _ => 0,
                        };
                        let long = core::mem::take(&mut long);
                        entries.push(Entry {
                            name: long.finish(entry).unwrap_or_else(|| short_name(entry)),
                            directory: attributes & ATTRIBUTE_DIRECTORY != 0,
                            cluster: u32::from(word(entry, 26)) | high,
                            len: dword(entry, 28),
                        });
                    }
                }
            }
        }
        Ok(entries)
    }
}

impl FatFile {
    pub(super) fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> Result<(), Decline> {
        for (start, len) in &self.runs {
            if offset >= *len {
                offset -= *len;
                continue;
            }
            let here = usize::try_from(*len - offset).unwrap_or(usize::MAX);
            let (part, rest) = into.split_at_mut(here.min(into.len()));
            self.disk.read(*start + offset, part)?;
            into = rest;
            offset = 0;
            if into.is_empty() {
                break;
            }
        }
        if into.is_empty() {
            Ok(())
        } else {
            Err(damaged())
        }
    }
}

/// A long name as its entries come, the last part first.
#[derive(Debug, Default)]
struct LongName {
    parts: Vec<[u16; 13]>,
    checksum: u8,
    expected: usize,
}

impl LongName {
    fn add(&mut self, entry: &[u8]) {
        let order = entry[0];
        let number = usize::from(order & !LONG_LAST);
        if order & LONG_LAST != 0 {
            self.parts.clear();
            self.checksum = entry[13];
            self.expected = number;
        }
        let fits = number == self.expected && entry[13] == self.checksum;
        if !fits || !(1..=LONG_ENTRIES_MAX).contains(&number) {
            *self = Self::default();
            return;
        }
        self.parts.push(LONG_PLACES.map(|place| word(entry, place)));
        self.expected = number - 1;
    }

    /// The name, if it is whole and that of the short entry.
    fn finish(self, short: &[u8]) -> Option<String> {
        let sum = short.iter().take(11);
        let sum = sum.fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.parts.is_empty() || self.expected != 0 || sum != self.checksum {
            return None;
        }
        let units = self.parts.iter().rev().flatten().copied();
        let units = units.take_while(|unit| *unit != 0);
        char::decode_utf16(units).collect::<Result<_, _>>().ok()
    }
}

/// A name of the form 8.3. Two bits say that a part of it is in lower case.
fn short_name(entry: &[u8]) -> String {
    let part = |range: core::ops::Range<usize>, lower: bool| {
        let text = String::from_utf8_lossy(entry.get(range).unwrap_or_default()).into_owned();
        let text = text.trim_end();
        if lower {
            text.to_ascii_lowercase()
        } else {
            text.into()
        }
    };
    let base = part(0..8, entry[12] & 8 != 0);
    let extension = part(8..11, entry[12] & 16 != 0);
    if extension.is_empty() {
        base
    } else {
        format!("{base}.{extension}")
    }
}
