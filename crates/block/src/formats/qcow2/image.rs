//! An open image: its state, and how requests get at its tables.
//!
//! One lock guards all metadata. It is held for look-ups and changes in memory, and while
//! refcounts are read, but not while slices of L2 tables or the disk's data are read or written.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::cache::Found;
use super::create::Compression;
use super::damage::{ImageFile, damage};
use super::entry::Entry;
use super::flush::Flusher;
use super::freed::Freed;
use super::layout::Layout;
use super::space::Space;
use super::tables::{Source, Tables};
use super::unpacked::Unpacked;
use crate::host::HostFile;
use crate::in_flight::InFlight;

/// An open image.
pub struct Image {
    pub(super) layout: Layout,
    pub(super) file: Arc<ImageFile>,
    /// Where the data is: `file`, unless that is external.
    pub(super) data: Arc<HostFile>,
    /// The external data file is a raw image by itself.
    pub(super) raw_external: bool,
    pub(super) size: AtomicU64,
    pub(super) meta: Mutex<Meta>,
    /// Something happened that somebody waits for.
    pub(super) happened: Condvar,
    pub(super) in_flight: Arc<InFlight>,
    pub(super) unpacked: Unpacked,
    /// Present if the image is written. Taken before `meta` where both are.
    pub(super) flusher: Option<Mutex<Flusher>>,
    /// Whether anything need be durable.
    pub(super) durable: bool,
    /// How new compressed clusters are.
    pub(super) compression: Compression,
    pub(super) has_snapshots: bool,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("file", &self.file.host().name())
            .field("layout", &self.layout)
            .field("size", &self.disk_size())
            .finish_non_exhaustive()
    }
}

/// The metadata of an image.
#[derive(Debug)]
pub struct Meta {
    /// Where each cluster of the disk is.
    pub tables: Tables,
    /// Which clusters of the file are free. Present if the image is written.
    pub space: Option<Space>,
    /// Clusters of the disk that are being moved to new places. Whoever wants to change where they
    /// are waits.
    pub busy: Vec<Range<u64>>,
    /// How many wait for something to happen.
    pub waiting: usize,
    /// Clusters of the file that will be free.
    pub freed: Freed,
    /// Size of the disk in bytes that the header is to tell.
    pub size_in_header: u64,
    /// Where the next compressed cluster goes, if the last one left some of its cluster over.
    pub packing: Option<u64>,
    /// Why nothing must be written any more.
    pub damage: Option<String>,
}

impl Meta {
    /// The space of an image that is written.
    pub fn space(&mut self) -> io::Result<&mut Space> {
        self.space
            .as_mut()
            .ok_or_else(|| io::ErrorKind::ReadOnlyFilesystem.into())
    }

    /// Whether somebody is moving any of these clusters of the disk.
    pub fn is_busy(&self, clusters: &Range<u64>) -> bool {
        self.busy
            .iter()
            .any(|busy| busy.start < clusters.end && clusters.start < busy.end)
    }

    /// Ends what was begun by adding `clusters` to those that are busy.
    pub fn not_busy(&mut self, clusters: &Range<u64>) {
        if let Some(at) = self.busy.iter().position(|busy| busy == clusters) {
            self.busy.swap_remove(at);
        }
    }
}

/// The metadata while nobody else has it.
pub type Guard<'a> = MutexGuard<'a, Meta>;

impl Image {
    /// Locks the metadata.
    pub(super) fn lock(&self) -> Guard<'_> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something has happened.
    pub(super) fn wait<'a>(&'a self, mut meta: Guard<'a>) -> Guard<'a> {
        meta.waiting += 1;
        let mut meta = self
            .happened
            .wait(meta)
            .unwrap_or_else(PoisonError::into_inner);
        meta.waiting -= 1;
        meta
    }

    /// Unlocks the metadata and tells whoever waits that something has happened.
    pub(super) fn tell(&self, meta: Guard<'_>) {
        let waiting = meta.waiting > 0;
        drop(meta);
        if waiting {
            self.happened.notify_all();
        }
    }

    /// Size of the disk in bytes.
    pub(super) fn disk_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the image has a cluster of the disk's data at `offset` of the data file.
    pub(super) fn check_data(&self, guest: u64, offset: u64) -> io::Result<()> {
        if !self.layout.external {
            return self.file.check("data", offset);
        }
        if offset == guest {
            return Ok(());
        }
        Err(damage(format!(
            "the data for offset {guest} is said to be at offset {offset} of the external data file"
        )))
    }

    /// Gets the slice with this key into the cache and returns its slot, or none if there is no
    /// such table. The lock may be released meanwhile, so the caller has a pin: the table must not
    /// be freed while it is read.
    pub(super) fn slice<'a>(
        &'a self,
        mut meta: Guard<'a>,
        key: u64,
    ) -> io::Result<(Guard<'a>, Option<usize>)> {
        loop {
            match meta.tables.find(key) {
                Found::Ready(slot) => return Ok((meta, Some(slot))),
                Found::Loading => meta = self.wait(meta),
                Found::Absent => break,
            }
        }
        let (table, within) = match meta.tables.source(key) {
            Source::None => return Ok((meta, None)),
            Source::Zeroes => {
                let cache = meta.tables.cache();
                let (slot, mut data) = cache.reserve(key);
                data.fill(0);
                cache.fill(slot, data);
                return Ok((meta, Some(slot)));
            }
            Source::At(table, within) => (table, within),
        };
        self.check_table(table)?;
        let (slot, mut data) = meta.tables.cache().reserve(key);
        drop(meta);
        let done = self.file.host().read_buf(&mut data, table + within);
        let mut meta = self.lock();
        match done {
            Ok(()) => meta.tables.cache().fill(slot, data),
            Err(_) => meta.tables.cache().give_up(slot, data),
        }
        if meta.waiting > 0 {
            self.happened.notify_all();
        }
        done.map(|()| (meta, Some(slot)))
    }

    /// Checks that an L2 table can be at this offset.
    pub(super) fn check_table(&self, offset: u64) -> io::Result<()> {
        if self.layout.within_cluster(offset) != 0 {
            return Err(damage(format!(
                "its L2 table at offset {offset} does not start at a cluster"
            )));
        }
        self.file.check("L2 table", offset)
    }

    /// The entry at `at` of the slice in `slot`, which is that of a cluster of the disk.
    pub(super) fn entry(
        &self,
        meta: &Meta,
        slot: usize,
        at: usize,
        cluster: u64,
    ) -> io::Result<Entry> {
        meta.tables.entry(slot, at).map_err(|reason| {
            let offset = cluster << self.layout.cluster_bits;
            damage(format!("the L2 entry for offset {offset} {reason}"))
        })
    }

    /// Fails if the image was found damaged.
    pub(super) fn check_sound(meta: &Meta) -> io::Result<()> {
        match &meta.damage {
            None => Ok(()),
            Some(what) => Err(damage(what.clone())),
        }
    }
}
