//! The qcow2 header and its two top tables, checked before imago sees them.
//!
//! Follows the QEMU project's qcow2 specification (`docs/interop/qcow2.rst`) for versions 2 and 3.
//! imago checks what it needs to stay memory-safe; these checks are stricter, so that an image
//! that is broken, truncated or hostile is refused in one clear line, and so that what it can make
//! this process allocate or search is bounded before anything is allocated.

use std::ops::Range;

/// Longest part of the file the header can take up: one cluster of the largest size.
pub const MAX_HEADER_LEN: usize = 2 << 20;

const MAGIC: &[u8; 4] = b"QFI\xfb";
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Cluster sizes from 512 bytes to 2 MiB, as in QEMU.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Longest L1 table in bytes, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table in bytes, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Longest refcount table in bytes that imago makes.
const MAX_GROWN_REFCOUNT_TABLE_BYTES: u64 = 32 << 20;
/// L2 tables and refcount blocks imago keeps in memory, each one cluster long.
const CACHED_L2_TABLES: u64 = 128;
const CACHED_REFCOUNT_BLOCKS: u64 = 32;
/// Most memory the metadata of one image may take.
const MAX_METADATA_BYTES: u64 = 192 << 20;
const MAX_BACKING_NAME: usize = 1023;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Bytes of one entry of the feature name table.
const FEATURE_NAME_LEN: usize = 48;

/// Incompatible feature bits that make writing unsafe, but not reading.
pub const FEATURE_DIRTY: u8 = 1 << 0;
/// See [`FEATURE_DIRTY`].
pub const FEATURE_CORRUPT: u8 = 1 << 1;
const FEATURE_DATA_FILE: u64 = 1 << 2;
const FEATURE_COMPRESSION: u64 = 1 << 3;
const FEATURE_EXTENDED_L2: u64 = 1 << 4;

/// What this crate needs to know of a qcow2 header that passed all checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Binary logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Where the L1 table begins, and how many entries it has.
    pub l1_offset: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the refcount table begins.
    pub refcount_offset: u64,
    /// Entries of the refcount table.
    pub refcount_entries: u32,
    /// Bits of one refcount: a power of two up to 64.
    pub refcount_bits: u32,
    /// The file the image asks for as its backing file.
    pub backing: Option<String>,
    /// The format the image says that file has.
    pub backing_format: Option<String>,
    /// [`FEATURE_DIRTY`] and [`FEATURE_CORRUPT`], as far as set.
    pub unsafe_to_write: u8,
}

impl Header {
    /// Checks a header: `head` is the file's first bytes, as many as a cluster has or the file,
    /// `file_len` the whole file's length. The error says what is wrong.
    pub fn parse(head: &[u8], file_len: u64) -> Result<Self, String> {
        let version = check_magic(head)?;
        let cluster_bits = u32_at(head, 20)?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(format!(
                "its clusters would be 2^{cluster_bits} bytes, outside of 512 bytes to 2 MiB"
            ));
        }
        // Only the cluster the header is in counts, however much was read.
        let head = head
            .get(..1 << cluster_bits)
            .ok_or_else(|| format!("it is truncated: the file has {file_len} bytes"))?;
        match u32_at(head, 32)? {
            0 => {}
            1 => return Err(encrypted("AES")),
            2 => return Err(encrypted("LUKS")),
            other => return Err(format!("its encryption method {other} is unknown")),
        }
        let (unsafe_to_write, refcount_bits) = if version == 2 {
            (0, 16)
        } else {
            (check_features(head)?, refcount_bits(head)?)
        };
        let backing = backing_name(head)?;
        let backing_format = extensions(head, version)?;
        let header = Self {
            version,
            size: u64_at(head, 24)?,
            cluster_bits,
            l1_offset: u64_at(head, 40)?,
            l1_entries: u32_at(head, 36)?,
            refcount_offset: u64_at(head, 48)?,
            refcount_entries: check_refcount_table(u32_at(head, 56)?, cluster_bits)?,
            refcount_bits,
            backing,
            backing_format,
            unsafe_to_write,
        };
        header.check_tables(file_len)?;
        Ok(header)
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where the refcount table is according to `head`, the first bytes of a newer header of the
    /// same image; none if they are anything else.
    pub fn refcounts_if_moved(&self, head: &[u8]) -> Option<Range<u64>> {
        let same = head.starts_with(MAGIC)
            && u32_at(head, 4).ok()? == self.version
            && u32_at(head, 20).ok()? == self.cluster_bits
            && u64_at(head, 24).ok()? == self.size
            && u32_at(head, 36).ok()? == self.l1_entries
            && u64_at(head, 40).ok()? == self.l1_offset;
        let start = u64_at(head, 48).ok()?;
        let len = u64::from(u32_at(head, 56).ok()?) << self.cluster_bits;
        let possible = start >= self.cluster_size() && len <= MAX_GROWN_REFCOUNT_TABLE_BYTES;
        (same && possible).then(|| start..start.saturating_add(len))
    }

    fn check_tables(&self, file_len: u64) -> Result<(), String> {
        let entries_per_l2 = self.cluster_size() / 8;
        let needed = self
            .size
            .div_ceil(self.cluster_size())
            .div_ceil(entries_per_l2);
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if needed * 8 > MAX_L1_BYTES || l1_bytes > MAX_L1_BYTES || self.size > i64::MAX as u64 {
            return Err(format!(
                "a disk of {} bytes with clusters of {} bytes is larger than qcow2 allows",
                self.size,
                self.cluster_size()
            ));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(format!(
                "its L1 table has {} entries, but a disk of {} bytes needs {needed}",
                self.l1_entries, self.size
            ));
        }
        let cached = CACHED_L2_TABLES.min(needed) + CACHED_REFCOUNT_BLOCKS;
        if cached * self.cluster_size() + l1_bytes > MAX_METADATA_BYTES {
            return Err(format!(
                "a disk of {} bytes with clusters of {} bytes needs too much memory for its \
                 tables; convert it to clusters of 64 KiB",
                self.size,
                self.cluster_size()
            ));
        }
        self.check_place("L1 table", self.l1_offset, l1_bytes, file_len)?;
        let refcount_bytes = u64::from(self.refcount_entries) * 8;
        self.check_place(
            "refcount table",
            self.refcount_offset,
            refcount_bytes,
            file_len,
        )
    }

    /// Checks that a table starts at a cluster, not in the header's, and ends inside the file.
    fn check_place(&self, what: &str, offset: u64, len: u64, file_len: u64) -> Result<(), String> {
        if len == 0 {
            return Ok(());
        }
        if offset == 0 || !offset.is_multiple_of(self.cluster_size()) {
            return Err(format!(
                "its {what} at offset {offset} does not start at a cluster"
            ));
        }
        match offset.checked_add(len) {
            Some(end) if end <= file_len => Ok(()),
            _ => Err(truncated(what, offset, file_len)),
        }
    }
}

/// Message for an image that refers to something past its end.
pub fn truncated(what: &str, offset: u64, file_len: u64) -> String {
    format!(
        "it is truncated: its {what} at offset {offset} is past the end of the file at \
         {file_len}; copy the image again"
    )
}

fn encrypted(how: &str) -> String {
    format!("it is encrypted ({how}), which is not supported; decrypt it with `qemu-img convert`")
}

fn check_magic(head: &[u8]) -> Result<u32, String> {
    if !head.starts_with(MAGIC) {
        return Err("it does not begin as a qcow2 image does".into());
    }
    let version = u32_at(head, 4)?;
    let needed = match version {
        2 => V2_LEN,
        3 => V3_LEN,
        _ => {
            return Err(format!(
                "version {version} of the format is not supported, only 2 and 3"
            ));
        }
    };
    if head.len() < needed {
        return Err(format!(
            "it is truncated: the file has {} bytes",
            head.len()
        ));
    }
    Ok(version)
}

/// Checks the feature bits, which only version 3 has, and returns those that are set.
fn check_features(head: &[u8]) -> Result<u8, String> {
    let features = u64_at(head, 72)?;
    let readable = u64::from(FEATURE_DIRTY | FEATURE_CORRUPT);
    for (bit, what) in [
        (FEATURE_DATA_FILE, "keeps its data in an external file"),
        (FEATURE_COMPRESSION, "is compressed with zstd"),
        (FEATURE_EXTENDED_L2, "uses extended L2 entries"),
    ] {
        if features & bit != 0 {
            return Err(format!(
                "it {what}, which is not supported; convert it with `qemu-img convert -O qcow2`"
            ));
        }
    }
    let unknown = features & !readable;
    if unknown != 0 {
        return Err(format!(
            "it uses unknown incompatible features ({unknown:#x})"
        ));
    }
    Ok(u8::try_from(features & readable).unwrap_or(0))
}

fn refcount_bits(head: &[u8]) -> Result<u32, String> {
    match u32_at(head, 96)? {
        order @ 0..=6 => Ok(1 << order),
        order => Err(format!(
            "its refcounts would be 2^{order} bits wide; 64 is the most"
        )),
    }
}

/// Number of entries in a refcount table of `clusters` clusters.
fn check_refcount_table(clusters: u32, cluster_bits: u32) -> Result<u32, String> {
    let bytes = u64::from(clusters) << cluster_bits;
    if bytes == 0 || bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Err(format!("its refcount table would be {bytes} bytes long"));
    }
    u32::try_from(bytes / 8).map_err(|err| err.to_string())
}

fn backing_name(head: &[u8]) -> Result<Option<String>, String> {
    let offset = u64_at(head, 8)?;
    let len = u32_at(head, 16)? as usize;
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .filter(|_| len <= MAX_BACKING_NAME)
        .and_then(|start| head.get(start..start.checked_add(len)?))
        .ok_or("the name of its backing file is outside of the header")?;
    String::from_utf8(name.to_vec())
        .map(Some)
        .map_err(|_| "the name of its backing file is not UTF-8".into())
}

/// Checks the list of header extensions and returns the backing file's format, if one names it.
fn extensions(head: &[u8], version: u32) -> Result<Option<String>, String> {
    let mut at = if version == 2 {
        V2_LEN
    } else {
        u32_at(head, 100)? as usize
    };
    if version == 3 && (at < V3_LEN || at % 8 != 0 || at > head.len()) {
        return Err(format!("its header length of {at} bytes is impossible"));
    }
    // As in QEMU the list may also end where the backing file's name begins.
    let end = match u64_at(head, 8)?.try_into() {
        Ok(name) if name >= at => head.len().min(name),
        _ => head.len(),
    };
    let list = head.get(..end).unwrap_or(head);
    let mut format = None;
    while let (Ok(kind), Ok(len)) = (u32_at(list, at), u32_at(list, at + 4)) {
        if kind == EXT_END {
            break;
        }
        let start = at + 8;
        let data = start
            .checked_add(len as usize)
            .and_then(|end| list.get(start..end))
            .ok_or_else(|| format!("its header extension {kind:#x} reaches out of the header"))?;
        // imago panics at the rest of an entry.
        if kind == EXT_FEATURE_NAMES && !data.len().is_multiple_of(FEATURE_NAME_LEN) {
            return Err(format!(
                "its feature name table of {} bytes is not made of whole entries",
                data.len()
            ));
        }
        if kind == EXT_BACKING_FORMAT {
            let name = String::from_utf8_lossy(data).into_owned();
            if format.as_ref().is_some_and(|known| *known != name) {
                return Err("it names two formats for its backing file".into());
            }
            format = Some(name);
        }
        at = start + data.len().next_multiple_of(8);
    }
    Ok(format)
}

/// The big-endian number of 4 bytes at `at`.
pub fn u32_at(head: &[u8], at: usize) -> Result<u32, String> {
    head.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or_else(|| "it is truncated: its header is incomplete".into())
}

/// The big-endian number of 8 bytes at `at`.
pub fn u64_at(head: &[u8], at: usize) -> Result<u64, String> {
    head.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|bytes| u64::from_be_bytes(*bytes))
        .ok_or_else(|| "it is truncated: its header is incomplete".into())
}
