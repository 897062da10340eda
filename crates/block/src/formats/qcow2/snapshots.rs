//! The table of internal snapshots.

use std::io;
use std::time::Duration;

use super::describe::Snapshot;
use super::header::{Header, truncated, u32_at, u64_at};
use super::layout::MAX_L1_BYTES;
use crate::host::HostFile;

/// Longest table in bytes that is read.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Most extra data of a snapshot in bytes, as in QEMU.
const MAX_EXTRA: usize = 1024;
/// Bytes of an entry before its extra data.
const FIXED_LEN: usize = 40;
/// Bytes read at a time.
const CHUNK: usize = 64 << 10;

/// A snapshot and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What users see of it.
    pub snapshot: Snapshot,
    /// Where its L1 table begins.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
}

/// The snapshots of an image, and how many bytes the table of them has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// The snapshots, in the order of the table.
    pub records: Vec<Record>,
    /// Bytes of the table.
    pub len: u64,
}

impl Directory {
    /// Reads the table.
    ///
    /// # Errors
    /// It cannot be read ([`io::ErrorKind::InvalidData`] if it makes no sense).
    pub fn read(file: &HostFile, header: &Header) -> io::Result<Self> {
        if header.snapshots == 0 {
            return Ok(Self::default());
        }
        let file_len = file.len()?;
        header
            .check_place("snapshot table", header.snapshots_offset, 1, file_len)
            .map_err(invalid)?;
        let mut reader = Reader {
            file,
            file_len,
            start: header.snapshots_offset,
            buf: Vec::new(),
        };
        let mut directory = Self::default();
        for _ in 0..header.snapshots {
            directory
                .records
                .push(reader.record(&mut directory.len, header)?);
        }
        for record in &directory.records {
            let bytes = u64::from(record.l1_entries) * 8;
            if bytes > MAX_L1_BYTES {
                return Err(invalid(format!("a snapshot's L1 table has {bytes} bytes")));
            }
        }
        Ok(directory)
    }

    /// The snapshot with this ID, or else the first with this name.
    pub fn find(&self, wanted: &str) -> Option<&Record> {
        let by = |key: fn(&Snapshot) -> &str| {
            self.records
                .iter()
                .find(|record| key(&record.snapshot) == wanted)
        };
        by(|it| &it.id).or_else(|| by(|it| &it.name))
    }
}

/// Reads the table bit by bit, as nothing says how long it is.
struct Reader<'a> {
    file: &'a HostFile,
    file_len: u64,
    start: u64,
    buf: Vec<u8>,
}

impl Reader<'_> {
    /// The `len` bytes from `at` bytes into the table.
    fn bytes(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let end = at.saturating_add(len as u64);
        let in_file = self
            .start
            .checked_add(end)
            .is_some_and(|end| end <= self.file_len);
        if end > MAX_TABLE_BYTES || !in_file {
            return Err(invalid(truncated(
                "snapshot table",
                self.start,
                self.file_len,
            )));
        }
        let (at, end) = (to_len(at)?, to_len(end)?);
        while self.buf.len() < end {
            let old = self.buf.len();
            let left = self.file_len - self.start - old as u64;
            let more = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            self.buf.resize(old + more, 0);
            self.file
                .read_buf(&mut self.buf[old..], self.start + old as u64)?;
        }
        Ok(&self.buf[at..end])
    }

    /// The entry at `at`, which is moved to the next one.
    fn record(&mut self, at: &mut u64, header: &Header) -> io::Result<Record> {
        let fixed: [u8; FIXED_LEN] = *self
            .bytes(*at, FIXED_LEN)?
            .first_chunk()
            .ok_or(io::ErrorKind::InvalidData)?;
        let short = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let word = |at| u32_at(&fixed, at).map_err(invalid);
        let (id_len, name_len, extra_len) = (short(12), short(14), word(36)? as usize);
        if extra_len > MAX_EXTRA {
            return Err(invalid("a snapshot has too much extra data"));
        }
        let rest = self.bytes(*at + FIXED_LEN as u64, extra_len + id_len + name_len)?;
        let (extra, names) = rest.split_at(extra_len);
        let (id, name) = names.split_at(id_len);
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let clock = u64_at(&fixed, 24).map_err(invalid)?;
        let snapshot = Snapshot {
            id: text(id),
            name: text(name),
            size: u64_at(extra, 8).unwrap_or(header.size),
            vm_state: u64_at(extra, 0).unwrap_or(word(32)?.into()),
            taken: Duration::from_secs(word(16)?.into()) + Duration::from_nanos(word(20)?.into()),
            vm_clock: Duration::from_nanos(clock),
        };
        let len = FIXED_LEN + rest.len();
        *at += len.next_multiple_of(8) as u64;
        Ok(Record {
            snapshot,
            l1_offset: u64_at(&fixed, 0).map_err(invalid)?,
            l1_entries: word(8)?,
        })
    }
}

fn to_len(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}
