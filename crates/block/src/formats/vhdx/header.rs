//! The fixed places at the start of a VHDX file: its two headers and two region tables.

use std::io;

use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::log::Patches;
use crate::formats::range::FileRange;
use crate::formats::refusal::{invalid, unsupported};

/// What the file begins with.
pub const MAGIC: &[u8; 8] = b"vhdxfile";

const HEADERS_AT: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS_AT: [u64; 2] = [192 << 10, 256 << 10];
const HEADER_LEN: usize = 4 << 10;
const REGIONS_LEN: usize = 64 << 10;
/// Most entries of a region table, by the specification.
const REGIONS_MAX: usize = 2047;
/// What everything but the fixed places is aligned to.
pub const ALIGN: u64 = 1 << 20;

const BAT: [u8; 16] = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: [u8; 16] = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

/// A GUID as it is stored: the first three parts have their lowest byte first.
pub const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (
        a.to_le_bytes(),
        b.to_le_bytes(),
        c.to_le_bytes(),
        d.to_be_bytes(),
    );
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6],
        d[7],
    ]
}

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    checksum: le::U32,
    sequence: le::U64,
    file_id: [u8; 16],
    data_id: [u8; 16],
    log_id: [u8; 16],
    log_version: le::U16,
    version: le::U16,
    log_len: le::U32,
    log_at: le::U64,
}

/// What the header in use tells.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Marks the log's entries; zero if the log is empty.
    pub log_id: [u8; 16],
    /// Where the log is, in bytes.
    pub log_at: u64,
    /// Its length in bytes.
    pub log_len: u64,
}

impl Header {
    /// Reads the header in use: the one of the two that is sound and newer.
    pub fn read(range: &FileRange) -> io::Result<Self> {
        let mut newest: Option<(u64, RawHeader)> = None;
        for at in HEADERS_AT {
            let mut bytes = [0; HEADER_LEN];
            range.read(&mut bytes, at)?;
            let sound = &bytes[..4] == b"head" && is_sound(&mut bytes);
            let Ok((header, _)) = RawHeader::read_from_prefix(&bytes) else {
                continue;
            };
            let sequence = header.sequence.get();
            if sound && newest.as_ref().is_none_or(|(newest, _)| sequence > *newest) {
                newest = Some((sequence, header));
            }
        }
        let (_, header) = newest.ok_or_else(|| invalid("both of its headers are damaged"))?;
        let (version, log_version) = (header.version.get(), header.log_version.get());
        if (version, log_version) != (1, 0) {
            return Err(unsupported(format!(
                "version {version} with log version {log_version} is not known"
            )));
        }
        Ok(Self {
            log_id: header.log_id,
            log_at: header.log_at.get(),
            log_len: header.log_len.get().into(),
        })
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRegion {
    id: [u8; 16],
    at: le::U64,
    len: le::U32,
    required: le::U32,
}

/// A range of the file.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where it begins, in bytes.
    pub at: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Where the tables are.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Region,
    /// Metadata.
    pub metadata: Region,
}

impl Regions {
    /// Reads the first region table that is sound.
    pub fn read(range: &FileRange, patches: &Patches) -> io::Result<Self> {
        let mut bytes = vec![0; REGIONS_LEN];
        for at in REGIONS_AT {
            range.read(&mut bytes, at)?;
            patches.apply(&mut bytes, at);
            if bytes.starts_with(b"regi") && is_sound(&mut bytes) {
                return Self::parse(&bytes, range);
            }
        }
        Err(invalid("both of its region tables are damaged"))
    }

    fn parse(bytes: &[u8], range: &FileRange) -> io::Result<Self> {
        let count = bytes.get(8..12).and_then(|it| it.try_into().ok());
        let count = count.map_or(0, u32::from_le_bytes) as usize;
        let entries = bytes.get(16..).unwrap_or_default();
        if count > REGIONS_MAX {
            return Err(invalid(format!("{count} regions make no sense")));
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in entries.chunks_exact(size_of::<RawRegion>()).take(count) {
            let Ok(region) = RawRegion::read_from_bytes(entry) else {
                break;
            };
            let place = match region.id {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if region.required.get() & 1 == 0 => continue,
                _ => return Err(unsupported("it needs a region of an unknown kind")),
            };
            let (at, len) = (region.at.get(), u64::from(region.len.get()));
            if at % ALIGN != 0 || at == 0 || range.part(at, len).is_err() {
                return Err(invalid("a region of it is out of bounds"));
            }
            *place = Some(Region { at, len });
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            _ => Err(invalid("it has no table of blocks, or no metadata")),
        }
    }
}

/// Whether the CRC-32C of a structure is right, which is in its bytes 4 to 7 and is counted with
/// zeroes there. Leaves those behind.
pub fn is_sound(bytes: &mut [u8]) -> bool {
    let Some(field) = bytes.get_mut(4..8) else {
        return false;
    };
    let mut stored = [0; 4];
    stored.copy_from_slice(field);
    field.fill(0);
    crc32c::crc32c(bytes) == u32::from_le_bytes(stored)
}
