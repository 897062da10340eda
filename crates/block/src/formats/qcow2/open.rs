//! Opening images.

use std::io;
use std::sync::{Arc, Condvar, Mutex};

use super::damage::{ImageFile, damage_of};
use super::disk::Qcow2Disk;
use super::flush::{Flusher, HEAD_LEN};
use super::freed::Freed;
use super::header::{BITMAPS, CORRUPT, DIRTY, Header, RAW_EXTERNAL, bad_image, truncated};
use super::image::{Image, Meta};
use super::layout::Layout;
use super::missing;
use super::places::{Places, Use};
use super::refcounts::Refcounts;
use super::snapshots::Directory;
use super::space::Space;
use super::tables::Tables;
use super::unpacked::Unpacked;
use crate::BlockError;
use crate::formats::OpenLayer;
use crate::host::HostFile;
use crate::stack::Stack;

/// How much memory an image may take for its metadata, besides its two top tables.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// For slices of L2 tables, in bytes.
    pub tables: usize,
    /// For slices of refcount blocks, in bytes.
    pub refcounts: usize,
}

impl Memory {
    /// Enough for all tables of 128 GiB of disk with the usual clusters, and for all refcounts of
    /// as much data. It is taken as far as it is used.
    pub const DEFAULT: Self = Self {
        tables: 16 << 20,
        refcounts: 4 << 20,
    };
}

/// Where an L1 table is and what it is for.
#[derive(Clone, Copy, Debug)]
struct Root {
    offset: u64,
    entries: u64,
    size: u64,
}

/// As [`open_layer`](crate::formats::open_layer).
pub fn open_layer(
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    snapshot: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    let header = Header::read(&file)?;
    let data = data_file(&file, &header, data_files)?;
    let len = file.len().map_err(failed(&file))?;
    header
        .check_readable(len)
        .map_err(|reason| bad_image(&file, reason))?;
    let root = match snapshot {
        None => Root {
            offset: header.l1_offset,
            entries: u64::from(header.l1_entries),
            size: header.size,
        },
        Some(wanted) => snapshot_root(&file, &header, wanted, len)?,
    };
    let image = Opening {
        file,
        data,
        header: &header,
        root,
        memory: Memory::DEFAULT,
    }
    .finish(None)?;
    Ok(OpenLayer {
        layer: Arc::new(image),
        extensions: header.unknown_extensions().cloned().collect(),
        backing: header.backing,
    })
}

/// Opens the image in `file`, which is locked already, for writing on top of `below`.
///
/// # Errors
/// The image breaks its format's rules, or has not as many data files, or is damaged.
pub fn open_disk(
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    below: Stack,
) -> Result<Qcow2Disk, BlockError> {
    open_disk_within(Memory::DEFAULT, file, data_files, below)
}

/// [`open_disk`] with so much memory for the image's metadata.
///
/// # Errors
/// As [`open_disk`].
pub fn open_disk_within(
    memory: Memory,
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    below: Stack,
) -> Result<Qcow2Disk, BlockError> {
    let mut header = Header::read(&file)?;
    let data = data_file(&file, &header, data_files)?;
    let len = file.len().map_err(failed(&file))?;
    header
        .check_readable(len)
        .and_then(|()| header.check_writable(len))
        .map_err(|reason| bad_image(&file, reason))?;
    if header.incompatible & CORRUPT != 0 {
        return Err(bad_image(
            &file,
            "it is marked as corrupt; repair it with `edgevmm image check --repair`, or open it \
             read-only to save what is left",
        ));
    }
    if header.incompatible & DIRTY != 0 {
        super::check::mend_refcounts(&file)?;
        header = Header::read(&file)?;
    }
    if header.autoclear & !RAW_EXTERNAL != 0 {
        clear_features(&file, &header).map_err(failed(&file))?;
    }
    let root = Root {
        offset: header.l1_offset,
        entries: u64::from(header.l1_entries),
        size: header.size,
    };
    let opening = Opening {
        file,
        data,
        header: &header,
        root,
        memory,
    };
    let image = opening.finish(Some(true))?;
    Ok(Qcow2Disk::new(image, below))
}

/// Opens an overlay that nobody else will ever see, so that nothing in it need be durable.
///
/// # Errors
/// The host can't read or write it.
pub fn open_temporary(file: Arc<HostFile>, below: Stack) -> Result<Qcow2Disk, BlockError> {
    let header = Header::read(&file)?;
    let root = Root {
        offset: header.l1_offset,
        entries: u64::from(header.l1_entries),
        size: header.size,
    };
    let data = Arc::clone(&file);
    let opening = Opening {
        file,
        data,
        header: &header,
        root,
        memory: Memory::DEFAULT,
    };
    let image = opening.finish(Some(false))?;
    Ok(Qcow2Disk::new(image, below))
}

/// What an image is made of.
struct Opening<'a> {
    file: Arc<HostFile>,
    data: Arc<HostFile>,
    header: &'a Header,
    root: Root,
    memory: Memory,
}

impl Opening<'_> {
    /// Opens the image: for writing if `durable` tells whether that is to be durable.
    fn finish(self, durable: Option<bool>) -> Result<Image, BlockError> {
        let Self {
            file,
            data,
            header,
            root,
            memory,
        } = self;
        let layout = header.layout();
        let l1 = read_table(&file, root.offset, root.entries).map_err(failed(&file))?;
        let image_file = Arc::new(ImageFile::new(Arc::clone(&file)).map_err(failed(&file))?);
        let tables = Tables::new(layout, l1, root.offset, memory.tables);
        let space = match durable {
            Some(_) => Some(open_space(&image_file, header, &tables, memory)?),
            None => None,
        };
        let flusher = match durable {
            Some(_) => Some(Mutex::new(Flusher::new(
                read_head(&file).map_err(failed(&file))?,
            ))),
            None => None,
        };
        Ok(Image {
            layout,
            file: image_file,
            data,
            raw_external: header.has_raw_data_file(),
            size: root.size.into(),
            meta: Mutex::new(Meta {
                tables,
                space,
                busy: Vec::new(),
                waiting: 0,
                freed: Freed::default(),
                size_in_header: root.size,
                packing: None,
                damage: None,
            }),
            happened: Condvar::new(),
            in_flight: Arc::default(),
            unpacked: Unpacked::new(layout.cluster_len(), header.compression),
            flusher,
            durable: durable.unwrap_or(false),
            compression: header.compression,
            has_snapshots: header.snapshots > 0,
        })
    }
}

/// The file that the data is in.
fn data_file(
    file: &Arc<HostFile>,
    header: &Header,
    data_files: Vec<Arc<HostFile>>,
) -> Result<Arc<HostFile>, BlockError> {
    let path = || file.name().to_owned();
    let mut given = data_files.into_iter();
    let data = if header.layout().external {
        given.next().ok_or_else(|| BlockError::DataFileNotGiven {
            path: path(),
            wanted: header.data_file.clone().unwrap_or_default(),
        })?
    } else {
        Arc::clone(file)
    };
    match given.next() {
        None => Ok(data),
        Some(excess) => Err(BlockError::DataFileNotWanted {
            path: path(),
            given: excess.name().to_owned(),
        }),
    }
}

fn snapshot_root(
    file: &HostFile,
    header: &Header,
    wanted: &str,
    file_len: u64,
) -> Result<Root, BlockError> {
    let directory = Directory::read(file, header).map_err(failed(file))?;
    let record = directory
        .find(wanted)
        .ok_or_else(|| BlockError::NoSnapshot {
            path: file.name().to_owned(),
            snapshot: wanted.to_owned(),
        })?;
    let entries = u64::from(record.l1_entries);
    let size = record.snapshot.size;
    header
        .check_place(
            "snapshot's L1 table",
            record.l1_offset,
            entries * 8,
            file_len,
        )
        .and_then(|()| {
            if header.layout().l1_entries(size) <= entries {
                Ok(())
            } else {
                Err(format!(
                    "the L1 table of its snapshot {wanted:?} is too short for {size} bytes"
                ))
            }
        })
        .map_err(|reason| bad_image(file, reason))?;
    Ok(Root {
        offset: record.l1_offset,
        entries,
        size,
    })
}

/// Finds out where the metadata is, and that it is in places of its own.
fn open_space(
    file: &Arc<ImageFile>,
    header: &Header,
    tables: &Tables,
    memory: Memory,
) -> Result<Space, BlockError> {
    let host = file.host();
    let layout = header.layout();
    let entries = (u64::from(header.refcount_clusters) << layout.cluster_bits) / 8;
    let table = read_table(host, header.refcount_offset, entries).map_err(failed(host))?;
    let mut refcounts = Refcounts::new(
        Arc::clone(file),
        layout,
        table,
        header.refcount_offset,
        memory.refcounts,
    );
    refcounts.check_blocks().map_err(refused(host))?;
    let len = host.len().map_err(failed(host))?;
    for offset in tables.tables() {
        check_table(layout, offset, len).map_err(|reason| bad_image(host, reason))?;
    }
    let directory = Directory::read(host, header).map_err(refused(host))?;
    let mut runs = vec![
        (0..1, Use::Header),
        (tables.place(), Use::L1),
        (refcounts.place(), Use::RefcountTable),
    ];
    let run = |offset: u64, len: u64| {
        let start = layout.cluster_of(offset);
        start..start.saturating_add(layout.clusters(len))
    };
    if header.snapshots > 0 {
        runs.push((run(header.snapshots_offset, directory.len), Use::Snapshots));
    }
    for record in &directory.records {
        let l1 = run(record.l1_offset, u64::from(record.l1_entries) * 8);
        runs.push((l1, Use::L1));
    }
    runs.retain(|(run, _)| !run.is_empty());
    let l2 = tables.tables().map(|offset| layout.cluster_of(offset));
    let places = Places::new(runs, l2, refcounts.blocks()).map_err(|(a, b, cluster)| {
        let offset = cluster << layout.cluster_bits;
        bad_image(
            host,
            format!(
                "its {a} and its {b} are in the same place, at offset {offset}; repair it with \
                 `edgevmm image check --repair`, or open it read-only to save what is left"
            ),
        )
    })?;
    let missing = missing::find(host, layout, tables.tables(), &mut refcounts);
    let missing = missing.map_err(refused(host))?;
    if missing.clusters > 0 {
        return Err(bad_image(host, missing.reason(layout, len)));
    }
    Ok(Space::new(layout, refcounts, places, len, host.is_device()))
}

fn check_table(layout: Layout, offset: u64, file_len: u64) -> Result<(), String> {
    if layout.within_cluster(offset) != 0 {
        return Err(format!(
            "its L2 table at offset {offset} does not start at a cluster"
        ));
    }
    if offset >= file_len {
        return Err(truncated("L2 table", offset, file_len));
    }
    Ok(())
}

/// Clears the features that become void when the image is written by somebody who does not know
/// them.
fn clear_features(file: &HostFile, header: &Header) -> io::Result<()> {
    if header.autoclear & BITMAPS != 0 {
        tracing::warn!(
            disk = file.name(),
            "The image's persistent bitmaps are no longer valid, as they are not maintained here"
        );
    }
    let kept = header.autoclear & RAW_EXTERNAL;
    let mut head = read_head(file)?;
    for (to, from) in head.iter_mut().skip(88).zip(kept.to_be_bytes()) {
        *to = from;
    }
    file.write_buf(&head, 0)?;
    file.sync()
}

/// The first sector of a file.
pub fn read_head(file: &HostFile) -> io::Result<[u8; HEAD_LEN]> {
    let mut head = [0; HEAD_LEN];
    file.read_buf(&mut head, 0)?;
    Ok(head)
}

/// The entries of a table.
pub fn read_table(file: &HostFile, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let len = usize::try_from(entries * 8).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; len];
    file.read_buf(&mut bytes, offset)?;
    let entries = bytes.as_chunks().0.iter();
    Ok(entries.map(|entry| u64::from_be_bytes(*entry)).collect())
}

/// The error for a file that can't be read.
pub fn failed(file: &HostFile) -> impl FnOnce(io::Error) -> BlockError {
    move |source| match damage_of(&source) {
        Some(what) => bad_image(file, what),
        None => BlockError::File {
            op: "read",
            path: file.name().to_owned(),
            source,
        },
    }
}

/// The error for an image that makes no sense, or can't be read.
pub fn refused(file: &HostFile) -> impl FnOnce(io::Error) -> BlockError {
    move |source| match (damage_of(&source), source.kind()) {
        (Some(what), _) => bad_image(file, what),
        (None, io::ErrorKind::InvalidData) => bad_image(file, source.to_string()),
        _ => failed(file)(source),
    }
}
