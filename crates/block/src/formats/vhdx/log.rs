//! The log of a VHDX file: changes of its tables that may not have reached their places.
//!
//! A file that was not closed has to be read as if the log's newest sequence of entries had been
//! carried out ("Log Replay" in the specification). The file stays as it is: what the log changes
//! is kept in memory and laid over the tables as they are read. It never changes data.

use std::collections::BTreeMap;
use std::io;

use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::header::{Header, Region, Regions, is_sound};
use crate::formats::range::FileRange;
use crate::formats::refusal::{invalid, unsupported};

/// The unit of everything in a log.
const SECTOR: usize = 4096;
/// Largest log taken, in bytes, as it is read whole. Writers make it of 1 MiB.
const LOG_MAX: u64 = 16 << 20;
/// Most sectors that a log may set to zero, 1 GiB of them, as each costs memory.
const ZEROES_MAX: u64 = 1 << 18;
/// How many times its length may be examined to find what is valid. Sound ones take half of it.
const EFFORT: usize = 6;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct EntryHeader {
    signature: [u8; 4],
    checksum: le::U32,
    len: le::U32,
    tail: le::U32,
    sequence: le::U64,
    descriptors: le::U32,
    reserved: le::U32,
    log_id: [u8; 16],
    flushed_len: le::U64,
    last_len: le::U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    signature: [u8; 4],
    /// The last bytes of the sector, for data.
    trailing: [u8; 4],
    /// The first bytes of the sector, for data; how many bytes become zero otherwise.
    leading: [u8; 8],
    at: le::U64,
    sequence: le::U64,
}

#[derive(Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DataSector {
    signature: [u8; 4],
    sequence_high: le::U32,
    data: [u8; 4084],
    sequence_low: le::U32,
}

/// Sectors of the file as the log has them, by their number; without content they are zeroes.
#[derive(Debug, Default)]
pub struct Patches {
    sectors: BTreeMap<u64, Option<Box<[u8; SECTOR]>>>,
    /// How many sectors were set to zero, each time counted.
    zeroed: u64,
    /// How long the file would be with the log carried out, in bytes, or less.
    pub file_len: u64,
}

impl Patches {
    /// Reads the log that `header` tells of.
    ///
    /// # Errors
    /// It is damaged or can't be read, or the file is.
    pub fn read(range: &FileRange, header: &Header) -> io::Result<Self> {
        if header.log_id == [0; 16] {
            return Ok(Self::default());
        }
        let len = header.log_len;
        if len > LOG_MAX || len == 0 || !len.is_multiple_of(SECTOR as u64) {
            return Err(invalid(format!("a log of {len} bytes makes no sense")));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        range.read(&mut bytes, header.log_at)?;
        let mut log = Log {
            effort: bytes.len() * EFFORT,
            bytes,
            id: header.log_id,
        };
        let mut patches = Self::default();
        for at in log.newest_sequence()? {
            let entry = log.entry(at)?.ok_or_else(damaged)?;
            patches.add(&entry, range.len())?;
        }
        Ok(patches)
    }

    /// Lays the log over `buf`, which was read from `at` in the file.
    pub fn apply(&self, buf: &mut [u8], at: u64) {
        let end = at.saturating_add(buf.len() as u64);
        let sector_len = SECTOR as u64;
        for (&number, content) in self
            .sectors
            .range(at / sector_len..end.div_ceil(sector_len))
        {
            let start = number * sector_len;
            let (from, to) = (start.max(at), (start + sector_len).min(end));
            let part = |base: u64| {
                let [from, to] = [from, to].map(|it| usize::try_from(it - base).unwrap_or(0));
                from..to
            };
            let target = &mut buf[part(at)];
            match content {
                Some(content) => target.copy_from_slice(&content[part(start)]),
                None => target.fill(0),
            }
        }
    }

    /// Makes sure that only tables are changed, as data is not read through the log.
    ///
    /// # Errors
    /// It changes something else.
    pub fn check(&self, regions: &Regions) -> io::Result<()> {
        let tables = Region {
            at: 0,
            len: super::header::ALIGN,
        };
        let within = |at: u64, region: Region| at >= region.at && at - region.at < region.len;
        let elsewhere = self.sectors.keys().find(|&&number| {
            let at = number * SECTOR as u64;
            ![tables, regions.bat, regions.metadata]
                .into_iter()
                .any(|region| within(at, region))
        });
        match elsewhere {
            None => Ok(()),
            Some(_) => Err(unsupported(
                "it was not closed, and its log changes more than its tables; have the log \
                 carried out by `qemu-img check -r all`, or by Hyper-V",
            )),
        }
    }

    fn add(&mut self, entry: &[u8], file_len: u64) -> io::Result<()> {
        let (header, rest) = EntryHeader::read_from_prefix(entry).map_err(|_| damaged())?;
        if header.flushed_len.get() > file_len {
            return Err(invalid(format!(
                "it is cut off: it has {file_len} bytes, but had {} when it was in use",
                header.flushed_len
            )));
        }
        self.file_len = self.file_len.max(header.last_len.get());
        let count = header.descriptors.get() as usize;
        let begin =
            (size_of::<EntryHeader>() + count * size_of::<Descriptor>()).next_multiple_of(SECTOR);
        let mut data = entry.get(begin..).unwrap_or_default().chunks_exact(SECTOR);
        for descriptor in rest.chunks_exact(size_of::<Descriptor>()).take(count) {
            let descriptor = Descriptor::read_from_bytes(descriptor).map_err(|_| damaged())?;
            let (sector, odd) = split(descriptor.at.get());
            if odd != 0 || descriptor.sequence != header.sequence {
                return Err(damaged());
            }
            match &descriptor.signature {
                b"desc" => {
                    let content = data.next().ok_or_else(damaged)?;
                    let content = content_of(&descriptor, content)?;
                    self.sectors.insert(sector, Some(content));
                }
                b"zero" => self.add_zeroes(sector, u64::from_le_bytes(descriptor.leading))?,
                _ => return Err(damaged()),
            }
        }
        Ok(())
    }

    fn add_zeroes(&mut self, sector: u64, len: u64) -> io::Result<()> {
        let (count, odd) = split(len);
        let end = sector.checked_add(count).filter(|_| odd == 0);
        let end = end.ok_or_else(damaged)?;
        self.zeroed = self.zeroed.saturating_add(count);
        if self.zeroed > ZEROES_MAX {
            return Err(unsupported(
                "it was not closed, and its log changes too much to be kept in memory; have the \
                 log carried out by `qemu-img check -r all`, or by Hyper-V",
            ));
        }
        self.sectors
            .extend((sector..end).map(|sector| (sector, None)));
        Ok(())
    }
}

/// The sector at a byte, and how far within that is.
fn split(at: u64) -> (u64, u64) {
    (at / SECTOR as u64, at % SECTOR as u64)
}

fn damaged() -> io::Error {
    invalid(
        "it was not closed, and its log is damaged; open it where it was made, or try `qemu-img \
         check -r all` on a copy",
    )
}

/// A sector as it is to be: its data, with the bytes that are kept in the descriptor.
fn content_of(descriptor: &Descriptor, sector: &[u8]) -> io::Result<Box<[u8; SECTOR]>> {
    let sector = DataSector::ref_from_bytes(sector).map_err(|_| damaged())?;
    let sequence =
        u64::from(sector.sequence_high.get()) << 32 | u64::from(sector.sequence_low.get());
    if &sector.signature != b"data" || sequence != descriptor.sequence.get() {
        return Err(damaged());
    }
    let mut content = Box::new([0; SECTOR]);
    content[..8].copy_from_slice(&descriptor.leading);
    content[8..SECTOR - 4].copy_from_slice(&sector.data);
    content[SECTOR - 4..].copy_from_slice(&descriptor.trailing);
    Ok(content)
}

/// The bytes of a log: a ring of entries.
struct Log {
    bytes: Vec<u8>,
    id: [u8; 16],
    /// How many bytes may still be examined.
    effort: usize,
}

impl Log {
    /// Where the entries are that have to be carried out, in order: the sequence that ends with
    /// the newest entry, from the one on that this entry calls the oldest in use.
    fn newest_sequence(&mut self) -> io::Result<Vec<usize>> {
        let mut newest: Option<(u64, Vec<usize>)> = None;
        let mut start = 0;
        while start < self.bytes.len() {
            let (entries, last, len) = self.sequence(start)?;
            start = start.saturating_add(len.max(SECTOR));
            let Some(last) = last else { continue };
            let tail = last.tail.get() as usize;
            let Some(first) = entries.iter().position(|&at| at == tail) else {
                continue;
            };
            let number = last.sequence.get();
            if newest.as_ref().is_none_or(|(newest, _)| number > *newest) {
                newest = Some((number, entries[first..].to_vec()));
            }
        }
        newest.map(|(_, entries)| entries).ok_or_else(damaged)
    }

    /// The entries that follow each other from `start` on: where they are, the last one's header,
    /// and the bytes they take.
    fn sequence(&mut self, start: usize) -> io::Result<(Vec<usize>, Option<EntryHeader>, usize)> {
        let (mut entries, mut last, mut len) = (Vec::new(), None::<EntryHeader>, 0);
        while len < self.bytes.len() {
            let at = (start + len) % self.bytes.len();
            let Some(entry) = self.entry(at)? else { break };
            let (header, _) = EntryHeader::read_from_prefix(&entry).map_err(|_| damaged())?;
            let expected = last.map(|last| last.sequence.get().wrapping_add(1));
            if expected.is_some_and(|expected| expected != header.sequence.get()) {
                break;
            }
            entries.push(at);
            len += entry.len();
            last = Some(header);
        }
        Ok((entries, last, len))
    }

    /// The entry at a byte, if there is a sound one.
    ///
    /// # Errors
    /// Finding that out takes more effort than any sound log needs.
    fn entry(&mut self, at: usize) -> io::Result<Option<Vec<u8>>> {
        let header = self.bytes.get(at..).unwrap_or_default();
        let Ok((header, _)) = EntryHeader::read_from_prefix(header) else {
            return Ok(None);
        };
        let len = header.len.get() as usize;
        let descriptors = header.descriptors.get() as usize;
        let used = size_of::<EntryHeader>() + descriptors * size_of::<Descriptor>();
        if &header.signature != b"loge"
            || header.log_id != self.id
            || header.sequence.get() == 0
            || !len.is_multiple_of(SECTOR)
            || len > self.bytes.len()
            || used > len
        {
            return Ok(None);
        }
        self.effort = self.effort.checked_sub(len).ok_or_else(damaged)?;
        let (before, from) = self.bytes.split_at(at);
        let mut entry = Vec::with_capacity(len);
        entry.extend(from.iter().chain(before).take(len));
        // The checksum counts as zero, and is not needed any more.
        Ok(is_sound(&mut entry).then_some(entry))
    }
}
