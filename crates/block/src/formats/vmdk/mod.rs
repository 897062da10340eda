//! VMDK images, read-only.
//!
//! By VMware's "Virtual Disk Format 5.0", technical note: disks in one file (monolithicSparse and
//! streamOptimized), and those of a descriptor and one or several extents (monolithicFlat,
//! twoGbMaxExtentFlat and -Sparse, vmfs). Left out: whatever needs a disk below it (snapshots, as
//! delta links, vmfsSparse or seSparse), devices of another host, and the redundant tables.
//!
//! Memory: at most 16 MiB of tables for a disk, and where grains are compressed 20 of them, which
//! are of 64 KiB and may be of 1 MiB.

mod companions;
mod descriptor;
mod grains;
mod sparse;

use std::io;
use std::sync::Arc;

pub use companions::vmdk_data_files;
pub use descriptor::MAGIC as DESCRIPTOR_MAGIC;
pub use sparse::MAGIC as SPARSE_MAGIC;

use self::descriptor::{Descriptor, ExtentKind, ExtentLine, TEXT_MAX};
use self::sparse::{SparseExtent, SparseHeader};
use super::pages::PageCache;
use super::range::FileRange;
use super::refusal::{invalid, refusal, unsupported};
use crate::host::{HostFile, Window};
use crate::layer::{Extent, Layer, Mapping};
use crate::{BlockError, ImageFormat, SECTOR_SIZE};

/// A VMDK disk.
#[derive(Debug)]
pub struct VmdkDisk {
    /// In the order of the disk, without gaps.
    parts: Vec<Part>,
    size: u64,
}

/// A part of the disk that is in one extent.
#[derive(Debug)]
struct Part {
    start: u64,
    len: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Flat(FileRange),
    Sparse(Box<SparseExtent>),
    Zero,
}

/// Opens the disk in `range`. If that is a descriptor, `files` are those that it names, each once
/// and in its order.
///
/// # Errors
/// The image breaks the format's rules, or uses what is not supported, or can't be read, or wants
/// other files than were given.
pub fn open(range: FileRange, files: &[Arc<HostFile>]) -> Result<VmdkDisk, BlockError> {
    let name = range.name().to_owned();
    let refuse = refusal(ImageFormat::Vmdk, &name);
    let descriptor = read_descriptor(&range).map_err(&refuse)?;
    let wanted = descriptor.as_ref().map_or_else(Vec::new, Descriptor::files);
    if let Some(wanted) = wanted.get(files.len()) {
        return Err(BlockError::DataFileNotGiven {
            path: name,
            wanted: (*wanted).to_owned(),
        });
    }
    if let Some(given) = files.get(wanted.len()) {
        return Err(BlockError::DataFileNotWanted {
            path: name,
            given: given.name().to_owned(),
        });
    }
    match &descriptor {
        Some(descriptor) => VmdkDisk::of_extents(descriptor, files),
        None => VmdkDisk::of_one_file(range),
    }
    .map_err(refuse)
}

/// The descriptor, if that is what the image is; nothing for an extent with a header.
fn read_descriptor(range: &FileRange) -> io::Result<Option<Descriptor>> {
    let mut magic = [0; descriptor::MAGIC.len()];
    if range.len() < magic.len() as u64 {
        return Ok(None);
    }
    range.read(&mut magic, 0)?;
    if magic != descriptor::MAGIC {
        return Ok(None);
    }
    if range.len() > TEXT_MAX {
        return Err(invalid(format!(
            "it begins as a descriptor does, but is larger than the {TEXT_MAX} bytes that one may \
             have; give format=raw if these bytes are the disk itself"
        )));
    }
    let mut text = vec![0; usize::try_from(range.len()).unwrap_or_default()];
    range.read(&mut text, 0)?;
    let descriptor = Descriptor::parse(&text)?;
    if descriptor.extents.is_empty() {
        return Err(invalid("its descriptor tells of no extent"));
    }
    Ok(Some(descriptor))
}

impl VmdkDisk {
    fn of_one_file(range: FileRange) -> io::Result<Self> {
        let header = SparseHeader::read(range)?;
        if header.descriptor()?.extents.len() > 1 {
            return Err(unsupported("its descriptor tells of several extents"));
        }
        let cache = PageCache::new(header.tables_len());
        let extent = header.open(0, cache);
        Ok(Self {
            size: extent.size(),
            parts: vec![Part {
                start: 0,
                len: extent.size(),
                bytes: Bytes::Sparse(Box::new(extent)),
            }],
        })
    }

    fn of_extents(descriptor: &Descriptor, files: &[Arc<HostFile>]) -> io::Result<Self> {
        let names = descriptor.files();
        let mut sources = Vec::with_capacity(descriptor.extents.len());
        for line in &descriptor.extents {
            let file = names.iter().position(|name| *name == line.file);
            let file = file.and_then(|index| files.get(index));
            sources.push(Source::find(line, file).map_err(|err| of_extent(line, &err))?);
        }
        let tables = sources.iter().map(Source::tables_len);
        let cache = PageCache::new(tables.fold(0, u64::saturating_add));
        let mut parts = Vec::with_capacity(sources.len());
        let mut size = 0_u64;
        for (line, source) in descriptor.extents.iter().zip(sources) {
            let number = u32::try_from(parts.len()).unwrap_or(u32::MAX);
            let len = line.sectors.saturating_mul(SECTOR_SIZE);
            parts.push(Part {
                start: size,
                len,
                bytes: source.open(number, &cache),
            });
            size = size
                .checked_add(len)
                .filter(|&size| i64::try_from(size).is_ok())
                .ok_or_else(|| invalid("its size makes no sense"))?;
        }
        Ok(Self { parts, size })
    }

    /// The part that `offset` is in.
    fn part(&self, offset: u64) -> io::Result<&Part> {
        let after = self.parts.partition_point(|part| part.start <= offset);
        after
            .checked_sub(1)
            .and_then(|index| self.parts.get(index))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// What a line of a descriptor leads to, before it is known what memory all tables may take.
enum Source {
    Flat(FileRange),
    Sparse(Box<SparseHeader>),
    Zero,
}

impl Source {
    fn find(line: &ExtentLine, file: Option<&Arc<HostFile>>) -> io::Result<Self> {
        if line.kind == ExtentKind::Zero {
            return Ok(Self::Zero);
        }
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        let range = FileRange::whole(Arc::clone(file))?;
        if let ExtentKind::Flat(offset) = line.kind {
            let len = line.sectors.saturating_mul(SECTOR_SIZE);
            return range.part(offset, len).map(Self::Flat);
        }
        let header = SparseHeader::read(range)?;
        if header.is_compressed() {
            return Err(unsupported("it is compressed"));
        }
        if header.size() / SECTOR_SIZE < line.sectors {
            return Err(invalid("it is smaller than the descriptor says"));
        }
        Ok(Self::Sparse(Box::new(header)))
    }

    fn tables_len(&self) -> u64 {
        match self {
            Self::Sparse(header) => header.tables_len(),
            _ => 0,
        }
    }

    fn open(self, number: u32, cache: &PageCache) -> Bytes {
        match self {
            Self::Flat(range) => Bytes::Flat(range),
            Self::Sparse(header) => Bytes::Sparse(Box::new(header.open(number, cache.clone()))),
            Self::Zero => Bytes::Zero,
        }
    }
}

/// An error with the name of the extent that it is about.
fn of_extent(line: &ExtentLine, err: &io::Error) -> io::Error {
    io::Error::new(err.kind(), format!("in its extent {:?}, {err}", line.file))
}

impl Layer for VmdkDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let part = self.part(offset)?;
        let within = offset - part.start;
        let len = len.min(part.len.saturating_sub(within)).max(1);
        match &part.bytes {
            Bytes::Sparse(extent) => extent.map(within, len),
            Bytes::Flat(range) => range.map(within, len),
            Bytes::Zero => Ok(Mapping {
                extent: Extent::Zero,
                len,
            }),
        }
    }

    fn read_packed(&self, window: Window<'_>, offset: u64) -> io::Result<()> {
        // Only a disk of one extent has compressed grains.
        match &self.part(offset)?.bytes {
            Bytes::Sparse(extent) => extent.read_packed(window, offset),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
