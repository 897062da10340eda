//! The header of an image: reading and checking it.
//!
//! What a header can make this process allocate or search is bounded before anything is allocated.

use super::create::{Compression, Extension};
use super::layout::{
    CLUSTER_BITS, Layout, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MIN_EXTENDED_CLUSTER_BITS,
};
use crate::formats::Backing;
use crate::host::HostFile;
use crate::{BlockError, ImageFormat};

pub const MAGIC: &[u8; 4] = b"QFI\xfb";
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Bytes of a header with a compression type, and its padding.
pub(super) const FULL_LEN: usize = 112;
/// Longest part of the file that a header can take up: one cluster of the largest size.
const MAX_LEN: usize = 2 << 20;
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// Most snapshots and bitmaps an image can have, as in QEMU.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest disk in bytes that offsets in a file allow.
const MAX_SIZE: u64 = i64::MAX as u64;

/// Incompatible features.
pub const DIRTY: u64 = 1 << 0;
/// See [`DIRTY`].
pub const CORRUPT: u64 = 1 << 1;
/// See [`DIRTY`].
pub const EXTERNAL: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL | COMPRESSION | EXTENDED_L2;
/// A compatible feature.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Features that are void once somebody writes who does not know them.
pub const BITMAPS: u64 = 1 << 0;
/// See [`BITMAPS`].
pub const RAW_EXTERNAL: u64 = 1 << 1;

pub(super) const EXT_END: u32 = 0;
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
pub(super) const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Bytes of one entry of the feature name table.
pub(super) const FEATURE_NAME_LEN: usize = 48;

/// A header whose fields make sense by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Binary logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// How the data is encrypted; 0 if it is not.
    pub crypt_method: u32,
    /// Where the L1 table begins.
    pub l1_offset: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the refcount table begins.
    pub refcount_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the table of them begins.
    pub snapshots_offset: u64,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits.
    pub compatible: u64,
    /// Feature bits.
    pub autoclear: u64,
    /// Binary logarithm of the bits in a refcount.
    pub refcount_order: u32,
    /// How clusters are compressed where they are.
    pub compression: Compression,
    /// Fields after the known ones, which are kept as they are.
    pub more_fields: Vec<u8>,
    /// What lies below the image.
    pub backing: Option<Backing>,
    /// What is recorded as the name of the external data file.
    pub data_file: Option<String>,
    /// All other header extensions, in order.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Reads the header of an image.
    ///
    /// # Errors
    /// [`BlockError::BadImage`] if it breaks the format's rules, else what the host says.
    pub fn read(file: &HostFile) -> Result<Self, BlockError> {
        let failed = |source| BlockError::File {
            op: "read",
            path: file.name().to_owned(),
            source,
        };
        let file_len = file.len().map_err(failed)?;
        let read = |len: usize| {
            let mut head = vec![0; usize::try_from(file_len).unwrap_or(len).min(len)];
            file.read_buf(&mut head, 0).map(|()| head).map_err(failed)
        };
        // A first look, to read no more than the cluster that the header is in.
        let first = read(512)?;
        let cluster = u32_at(&first, 20)
            .ok()
            .and_then(|bits| 1usize.checked_shl(bits))
            .map_or(512, |len| len.clamp(512, MAX_LEN));
        Self::parse(&read(cluster)?).map_err(|reason| bad_image(file, reason))
    }

    /// Takes a header apart: `head` is the file's first cluster, or what there is of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(head: &[u8]) -> Result<Self, String> {
        let version = version(head)?;
        let cluster_bits = u32_at(head, 20)?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(format!(
                "its clusters would be 2^{cluster_bits} bytes, outside of 512 bytes to 2 MiB"
            ));
        }
        // Only the cluster the header is in counts, however much was read.
        let head = head
            .get(..1 << cluster_bits)
            .ok_or_else(|| format!("it is truncated: the file has {} bytes", head.len()))?;
        let mut header = Self {
            version,
            cluster_bits,
            size: u64_at(head, 24)?,
            crypt_method: u32_at(head, 32)?,
            l1_offset: u64_at(head, 40)?,
            l1_entries: u32_at(head, 36)?,
            refcount_offset: u64_at(head, 48)?,
            refcount_clusters: u32_at(head, 56)?,
            snapshots: u32_at(head, 60)?,
            snapshots_offset: u64_at(head, 64)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            more_fields: Vec::new(),
            backing: None,
            data_file: None,
            extensions: Vec::new(),
        };
        let len = if version == 2 {
            V2_LEN
        } else {
            header.parse_version_3(head)?
        };
        header.parse_extensions(head, len)?;
        if let Some(name) = backing_name(head)? {
            header.backing.get_or_insert_default().name = name;
        } else {
            header.backing = None;
        }
        header.check_unknown_features()?;
        header.check_fields()?;
        Ok(header)
    }

    /// Takes the fields that version 2 does not have; returns the header's length.
    fn parse_version_3(&mut self, head: &[u8]) -> Result<usize, String> {
        self.incompatible = u64_at(head, 72)?;
        self.compatible = u64_at(head, 80)?;
        self.autoclear = u64_at(head, 88)?;
        self.refcount_order = u32_at(head, 96)?;
        let len = u32_at(head, 100)? as usize;
        if len < V3_LEN || !len.is_multiple_of(8) || len > head.len() {
            return Err(format!("its header length of {len} bytes is impossible"));
        }
        let compression = if len > V3_LEN { head[V3_LEN] } else { 0 };
        self.compression = match compression {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => return Err(format!("its compression method {other} is unknown")),
        };
        if (compression != 0) != (self.incompatible & COMPRESSION != 0) {
            return Err("its feature bits contradict its compression method".into());
        }
        self.more_fields = head.get(FULL_LEN..len).unwrap_or_default().to_vec();
        Ok(len)
    }

    fn parse_extensions(&mut self, head: &[u8], mut at: usize) -> Result<(), String> {
        // As in QEMU the list may also end where the backing file's name begins.
        let end = match u64_at(head, 8)?.try_into() {
            Ok(name) if name >= at => head.len().min(name),
            _ => head.len(),
        };
        let list = head.get(..end).unwrap_or(head);
        while let (Ok(magic), Ok(len)) = (u32_at(list, at), u32_at(list, at + 4)) {
            if magic == EXT_END {
                break;
            }
            let start = at + 8;
            let data = start
                .checked_add(len as usize)
                .and_then(|end| list.get(start..end))
                .ok_or_else(|| {
                    format!("its header extension {magic:#x} reaches out of the header")
                })?;
            let text = || String::from_utf8_lossy(data).into_owned();
            match magic {
                EXT_BACKING_FORMAT => {
                    let format = &mut self.backing.get_or_insert_default().format;
                    if format.replace(text()).is_some_and(|old| old != text()) {
                        return Err("it names two formats for its backing file".into());
                    }
                }
                EXT_DATA_FILE => self.data_file = Some(text()),
                _ => self.extensions.push(Extension {
                    magic,
                    data: data.to_vec(),
                }),
            }
            at = start + data.len().next_multiple_of(8);
        }
        Ok(())
    }

    fn check_unknown_features(&self) -> Result<(), String> {
        let unknown = self.incompatible & !KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names = self
            .extensions
            .iter()
            .filter(|extension| extension.magic == EXT_FEATURE_NAMES)
            .flat_map(|extension| extension.data.as_chunks::<FEATURE_NAME_LEN>().0)
            .filter(|name| {
                name[0] == 0 && unknown.checked_shr(name[1].into()).unwrap_or(0) & 1 != 0
            })
            .map(|name| {
                let text = name[2..]
                    .split(|byte| *byte == 0)
                    .next()
                    .unwrap_or_default();
                format!("{:?}", String::from_utf8_lossy(text))
            });
        let names: Vec<_> = names.take(8).collect();
        Err(format!(
            "it uses unknown incompatible features ({unknown:#x}{}{})",
            if names.is_empty() { "" } else { ": " },
            names.join(", ")
        ))
    }

    /// Checks what can be told by the fields alone.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_fields(&self) -> Result<(), String> {
        if self.refcount_order > 6 {
            return Err(format!(
                "its refcounts would be 2^{} bits wide; 64 is the most",
                self.refcount_order
            ));
        }
        let refcount_bytes = u64::from(self.refcount_clusters) << self.cluster_bits;
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(format!(
                "its refcount table would be {refcount_bytes} bytes long"
            ));
        }
        let layout = self.layout();
        if layout.extended && self.cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            return Err("its clusters are too small to have subclusters".into());
        }
        if self.autoclear & RAW_EXTERNAL != 0 {
            if !layout.external {
                return Err("it calls an external data file raw that it does not have".into());
            }
            if self.backing.is_some() {
                return Err("it has both a raw external data file and a backing file".into());
            }
        }
        let needed = layout.l1_entries(self.size);
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if needed * 8 > MAX_L1_BYTES || l1_bytes > MAX_L1_BYTES || self.size > MAX_SIZE {
            return Err(format!(
                "a disk of {} bytes with clusters of {} bytes is larger than qcow2 allows",
                self.size,
                layout.cluster_size()
            ));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(format!(
                "its L1 table has {} entries, but a disk of {} bytes needs {needed}",
                self.l1_entries, self.size
            ));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(format!("it has too many snapshots ({})", self.snapshots));
        }
        Ok(())
    }

    /// Checks what must be so for any of the disk's data to be read.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_readable(&self, file_len: u64) -> Result<(), String> {
        match self.crypt_method {
            0 => {}
            1 => return Err(encrypted("AES")),
            2 => return Err(encrypted("LUKS")),
            other => return Err(format!("its encryption method {other} is unknown")),
        }
        self.check_place(
            "L1 table",
            self.l1_offset,
            u64::from(self.l1_entries) * 8,
            file_len,
        )
    }

    /// Checks what must be so besides for the image to be written.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_writable(&self, file_len: u64) -> Result<(), String> {
        let refcount_bytes = u64::from(self.refcount_clusters) << self.cluster_bits;
        self.check_place(
            "refcount table",
            self.refcount_offset,
            refcount_bytes,
            file_len,
        )
    }

    /// Checks that a table starts at a cluster, not in the header's, and ends inside the file.
    pub fn check_place(
        &self,
        what: &str,
        offset: u64,
        len: u64,
        file_len: u64,
    ) -> Result<(), String> {
        if len == 0 {
            return Ok(());
        }
        if offset == 0 || self.layout().within_cluster(offset) != 0 {
            return Err(format!(
                "its {what} at offset {offset} does not start at a cluster"
            ));
        }
        match offset.checked_add(len) {
            Some(end) if end <= file_len => Ok(()),
            _ => Err(truncated(what, offset, file_len)),
        }
    }

    /// How the image is laid out.
    pub fn layout(&self) -> Layout {
        Layout {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended: self.incompatible & EXTENDED_L2 != 0,
            external: self.incompatible & EXTERNAL != 0,
        }
    }

    /// The external data file is a raw image by itself.
    pub fn has_raw_data_file(&self) -> bool {
        self.autoclear & RAW_EXTERNAL != 0
    }

    /// "AES" or "LUKS" or something unknown, if the data is encrypted.
    pub fn encryption(&self) -> Option<&'static str> {
        match self.crypt_method {
            0 => None,
            1 => Some("AES"),
            2 => Some("LUKS"),
            _ => Some("unknown"),
        }
    }

    /// Number of persistent bitmaps.
    pub fn bitmaps(&self) -> u32 {
        self.extensions
            .iter()
            .filter(|extension| extension.magic == EXT_BITMAPS)
            .find_map(|extension| u32_at(&extension.data, 0).ok())
            .unwrap_or(0)
    }

    /// Size of the bitmap directory in bytes, and where it begins.
    pub fn bitmap_directory(&self) -> Option<(u64, u64)> {
        let data = self
            .extensions
            .iter()
            .find(|extension| extension.magic == EXT_BITMAPS)?
            .data
            .as_slice();
        Some((u64_at(data, 8).ok()?, u64_at(data, 16).ok()?))
    }

    /// Where the header of the encryption begins, and its length in bytes.
    pub fn encryption_header(&self) -> Option<(u64, u64)> {
        let mut all = self.extensions.iter();
        let data = &all.find(|it| it.magic == EXT_ENCRYPTION)?.data;
        Some((u64_at(data, 0).ok()?, u64_at(data, 8).ok()?))
    }

    /// Header extensions that this crate gives no meaning to.
    pub fn unknown_extensions(&self) -> impl Iterator<Item = &Extension> {
        self.extensions.iter().filter(|extension| {
            !matches!(
                extension.magic,
                EXT_FEATURE_NAMES | EXT_BITMAPS | EXT_ENCRYPTION
            )
        })
    }

    /// Has these header extensions take the place of those that this crate gives no meaning to.
    pub fn set_unknown_extensions(&mut self, extensions: Vec<Extension>) {
        let known = [EXT_FEATURE_NAMES, EXT_BITMAPS, EXT_ENCRYPTION];
        self.extensions.retain(|it| known.contains(&it.magic));
        self.extensions.extend(extensions);
    }

    /// Sets the features that the options of a new image ask for.
    pub fn set_features(&mut self, extended: bool, external: bool, raw: bool, lazy: bool) {
        let set = |bits: &mut u64, bit: u64, on: bool| *bits |= if on { bit } else { 0 };
        let zstd = self.compression == Compression::Zstd;
        set(&mut self.incompatible, EXTENDED_L2, extended);
        set(&mut self.incompatible, EXTERNAL, external);
        set(&mut self.incompatible, COMPRESSION, zstd);
        set(&mut self.compatible, LAZY_REFCOUNTS, lazy);
        set(&mut self.autoclear, RAW_EXTERNAL, raw);
    }
}

/// The error for an image that cannot be used.
pub fn bad_image(file: &HostFile, reason: impl Into<String>) -> BlockError {
    BlockError::BadImage {
        format: ImageFormat::Qcow2,
        path: file.name().to_owned(),
        reason: reason.into(),
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

fn version(head: &[u8]) -> Result<u32, String> {
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
        return Err(incomplete());
    }
    Ok(version)
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
    if name.is_empty() {
        return Ok(None);
    }
    String::from_utf8(name.to_vec())
        .map(Some)
        .map_err(|_| "the name of its backing file is not UTF-8".into())
}

fn incomplete() -> String {
    "it is truncated: its header is incomplete".into()
}

/// The big-endian number of 4 bytes at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or_else(incomplete)
}

/// The big-endian number of 8 bytes at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> Result<u64, String> {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|bytes| u64::from_be_bytes(*bytes))
        .ok_or_else(incomplete)
}
