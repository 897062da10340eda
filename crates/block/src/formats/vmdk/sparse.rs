//! Sparse extents: a header, a directory of tables, and grains, compressed or not.

use std::io;

use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::descriptor::{Descriptor, TEXT_MAX};
use super::grains::GrainReader;
use crate::SECTOR_SIZE;
use crate::formats::blocks::{self, Place};
use crate::formats::pages::{PageCache, TablePages};
use crate::formats::range::FileRange;
use crate::formats::refusal::{invalid, unsupported};
use crate::host::Window;
use crate::layer::Mapping;

/// What a sparse extent begins with.
pub const MAGIC: &[u8; 4] = b"KDMV";

const FLAG_NEWLINES: u32 = 1 << 0;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
const DEFLATE: u16 = 1;
/// In place of the directory's sector: it is the footer that tells.
const AT_END: u64 = u64::MAX;
/// Types of the markers around the footer.
const FOOTER: u32 = 3;
const END_OF_STREAM: u32 = 0;
/// An entry of a table for a grain of zeroes.
const ZERO_GRAIN: u32 = 1;
/// Most entries of a table; every known writer has this many.
const TABLE_MAX: u32 = 512;
/// Largest grain, in bytes. Writers make them of 64 KiB.
const GRAIN_MAX: u64 = 32 << 20;
/// Largest grain that is compressed, in bytes, since unpacked ones are kept in memory.
const PACKED_GRAIN_MAX: u64 = 1 << 20;
/// Largest disk, in bytes: VMware's own limit.
const SIZE_MAX: u64 = 64 << 40;

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: le::U32,
    flags: le::U32,
    capacity: le::U64,
    grain_sectors: le::U64,
    text_sector: le::U64,
    text_sectors: le::U64,
    table_entries: le::U32,
    spare_directory: le::U64,
    directory: le::U64,
    overhead: le::U64,
    unclean: u8,
    newlines: [u8; 4],
    compression: le::U16,
    padding: [u8; 433],
}

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct EndMarker {
    value: le::U64,
    size: le::U32,
    kind: le::U32,
    padding: [u8; 496],
}

/// The last sectors of an extent that was written in one go.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Footer {
    before: EndMarker,
    header: Header,
    after: EndMarker,
}

/// A sparse extent.
#[derive(Debug)]
pub struct SparseExtent {
    tables: TablePages,
    size: u64,
    grain_len: u64,
    /// Byte of the file where the directory begins.
    directory: u64,
    table_entries: u64,
    zero_grains: bool,
    grains: Option<GrainReader>,
}

/// A header that was checked, before it is known what memory its tables may take.
#[derive(Debug)]
pub struct SparseHeader {
    range: FileRange,
    header: Header,
}

impl SparseHeader {
    /// Reads and checks the header of the extent in `range`.
    pub fn read(range: FileRange) -> io::Result<Self> {
        let mut header: Header = range.read_struct(0)?;
        check_magic(&header)?;
        if header.directory.get() == AT_END {
            header = read_footer(&range)?;
        }
        check(&header)?;
        Ok(Self { range, header })
    }

    /// Size of its part of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.header.capacity.get() * SECTOR_SIZE
    }

    /// Whether its grains are compressed.
    pub fn is_compressed(&self) -> bool {
        self.header.flags.get() & FLAG_COMPRESSED != 0
    }

    /// Bytes in its tables.
    pub fn tables_len(&self) -> u64 {
        let grains = self.size().div_ceil(self.grain_len());
        let tables = grains.div_ceil(self.table_entries());
        (tables + tables * self.table_entries()) * size_of::<u32>() as u64
    }

    /// The descriptor within the extent.
    ///
    /// # Errors
    /// There is none, which is so in a disk of several extents, or it is refused.
    pub fn descriptor(&self) -> io::Result<Descriptor> {
        // The footer may lack what the header at the start has.
        let header: Header = self.range.read_struct(0)?;
        let bytes = |sectors: le::U64| sectors.get().checked_mul(SECTOR_SIZE);
        let (at, len) = match (bytes(header.text_sector), bytes(header.text_sectors)) {
            (Some(at), Some(len)) if len <= TEXT_MAX => (at, len),
            _ => return Err(invalid("its descriptor is out of bounds")),
        };
        let mut text = vec![0; usize::try_from(len).unwrap_or_default()];
        if at > 0 {
            self.range.read(&mut text, at)?;
        }
        if Descriptor::is_blank(&text) {
            return Err(invalid(
                "it has no descriptor, as it is one of several extents of a disk; give the file \
                 with the descriptor instead, which is named like it but for the ending -s001",
            ));
        }
        Descriptor::parse(&text)
    }

    /// The extent, with its tables read through `cache` as those of `file`.
    pub fn open(self, file: u32, cache: PageCache) -> SparseExtent {
        let grains = self
            .is_compressed()
            .then(|| GrainReader::new(usize::try_from(self.grain_len()).unwrap_or_default()));
        SparseExtent {
            size: self.size(),
            grain_len: self.grain_len(),
            directory: self.header.directory.get() * SECTOR_SIZE,
            table_entries: self.table_entries(),
            zero_grains: self.header.flags.get() & FLAG_ZERO_GRAINS != 0,
            grains,
            tables: TablePages::new(self.range, file, cache),
        }
    }

    fn grain_len(&self) -> u64 {
        self.header.grain_sectors.get() * SECTOR_SIZE
    }

    fn table_entries(&self) -> u64 {
        u64::from(self.header.table_entries.get())
    }
}

fn check_magic(header: &Header) -> io::Result<()> {
    if &header.magic == MAGIC {
        return Ok(());
    }
    Err(match &header.magic {
        b"COWD" => unsupported(
            "it is of an old ESX kind (COWD); convert it with `qemu-img convert -O qcow2`",
        ),
        _ => invalid("it does not begin as a sparse extent does"),
    })
}

/// Reads the header that stands at the end, which counts.
fn read_footer(range: &FileRange) -> io::Result<Header> {
    let len = range.len() / SECTOR_SIZE * SECTOR_SIZE;
    let at = len.saturating_sub(size_of::<Footer>() as u64);
    let footer: Footer = range.read_struct(at)?;
    let (before, after) = (&footer.before, &footer.after);
    if before.kind.get() != FOOTER
        || after.kind.get() != END_OF_STREAM
        || (before.size.get(), after.size.get(), after.value.get()) != (0, 0, 0)
        || &footer.header.magic != MAGIC
        || footer.header.directory.get() == AT_END
    {
        return Err(invalid(
            "it is cut off: the footer at its end is missing; copy or download it again",
        ));
    }
    Ok(footer.header)
}

/// Refuses what makes no sense or is not supported. What passes can't overflow later.
fn check(header: &Header) -> io::Result<()> {
    let flags = header.flags.get();
    if !(1..=3).contains(&header.version.get()) {
        let version = header.version.get();
        return Err(unsupported(format!("version {version} is not known")));
    }
    if flags & FLAG_NEWLINES != 0 && &header.newlines != b"\n \r\n" {
        return Err(invalid(
            "it was damaged when it was transferred as text (by FTP); transfer it as binary",
        ));
    }
    let grain_len = header
        .grain_sectors
        .get()
        .checked_mul(SECTOR_SIZE)
        .filter(|len| len.is_power_of_two() && *len <= GRAIN_MAX)
        .ok_or_else(|| invalid("its grain size makes no sense"))?;
    let size = header.capacity.get().checked_mul(SECTOR_SIZE);
    if size.is_none_or(|size| size == 0 || size > SIZE_MAX) {
        return Err(invalid("its capacity makes no sense"));
    }
    if !(1..=TABLE_MAX).contains(&header.table_entries.get()) {
        return Err(invalid("the size of its grain tables makes no sense"));
    }
    let directory = header.directory.get().checked_mul(SECTOR_SIZE);
    // Room for the directory itself, so that adding to its offset never overflows.
    if directory.is_none_or(|at| at == 0 || at > i64::MAX.cast_unsigned()) {
        return Err(invalid("it has no grain directory"));
    }
    let packed = flags & FLAG_MARKERS != 0 && grain_len <= PACKED_GRAIN_MAX;
    match (flags & FLAG_COMPRESSED != 0, header.compression.get()) {
        (false, 0) => Ok(()),
        (true, DEFLATE) if packed => Ok(()),
        _ => Err(unsupported("its kind of compression is not known")),
    }
}

impl SparseExtent {
    /// Size of its part of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// As [`Layer::map`](crate::layer::Layer::map), for this part of the disk.
    pub fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let range = self.tables.range();
        blocks::map(range, self.grain_len, offset, len, |grain| {
            self.place(grain)
        })
    }

    /// As [`Layer::read_packed`](crate::layer::Layer::read_packed), for this part of the disk.
    pub fn read_packed(&self, mut window: Window<'_>, mut offset: u64) -> io::Result<()> {
        let grains = self.grains.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        while !window.is_empty() {
            let (grain, within) = (offset / self.grain_len, offset % self.grain_len);
            let part = window.split_off(self.grain_len - within);
            offset += part.len();
            match self.place(grain)? {
                Place::Packed(at) => {
                    let within = usize::try_from(within).unwrap_or(usize::MAX);
                    grains.read(part, self.tables.range(), grain, at, within)?;
                }
                _ => part.fill_zero(),
            }
        }
        Ok(())
    }

    fn place(&self, grain: u64) -> io::Result<Place> {
        let (table, entry) = (grain / self.table_entries, grain % self.table_entries);
        let table = self.entry(self.directory + table * 4)?;
        if table == 0 {
            return Ok(Place::Zero);
        }
        let sector = self.entry(u64::from(table) * SECTOR_SIZE + entry * 4)?;
        let at = u64::from(sector) * SECTOR_SIZE;
        Ok(match (sector, &self.grains) {
            (0, _) => Place::Zero,
            (ZERO_GRAIN, _) if self.zero_grains => Place::Zero,
            (_, None) => Place::At(at),
            (_, Some(_)) => Place::Packed(at),
        })
    }

    fn entry(&self, at: u64) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.tables.read(at)?))
    }
}
