//! Bringing metadata to the file, in an order that leaves a sound image wherever it is cut off.
//!
//! A flush takes a copy of everything that has changed up to one moment and writes it in stages,
//! each of which is durable before the next begins:
//!
//! 1. What nothing in the file refers to yet: refcounts, and tables in new places. The data that
//!    guests wrote is made durable with it.
//! 2. Where the refcounts are, if there are new blocks of them.
//! 3. What refers to all that: L2 tables and the L1 table.
//!
//! Whatever a power failure leaves of a stage, all that is referred to is there and has a refcount;
//! at worst some clusters count as used that are not. Clusters that the tables no longer refer to
//! after stage 3 are given back in memory, and stage 1 of the next flush writes that.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use libc::iovec;

use super::damage::{damage, damage_of};
use super::freed::{Kind, Run};
use super::header::CORRUPT;
use super::image::{Image, Meta};
use super::{refcounts, tables};
use crate::host::HostFile;

/// Bytes of memory that are kept from one flush to the next.
const KEPT_MEMORY: usize = 1 << 20;
/// Bytes of the file that hold the fields of the header: one sector, which is written as a whole
/// or not at all.
pub const HEAD_LEN: usize = 512;

/// A piece of metadata on its way to the file.
#[derive(Debug)]
struct Piece {
    offset: u64,
    /// Where its content is in the batch's memory.
    bytes: Range<usize>,
}

/// A new table or block on its way to the file.
#[derive(Debug)]
struct NewCluster {
    offset: u64,
    /// What it is a copy of, but for what has been changed.
    from: Option<u64>,
}

/// What a flush writes. Kept from one to the next, for its memory.
#[derive(Debug, Default)]
struct Batch {
    memory: Vec<u8>,
    /// Stage 1: what is in use already, or in parts.
    first: Vec<Piece>,
    /// Stage 1: whole clusters, and what of them is not as they are a copy of.
    new: Vec<NewCluster>,
    changes: Vec<Piece>,
    second: Vec<Piece>,
    third: Vec<Piece>,
    /// The header after stage 2 and stage 3, where it changes.
    head_second: Option<[u8; HEAD_LEN]>,
    head_third: Option<[u8; HEAD_LEN]>,
    cluster: Vec<u8>,
}

/// What references a cluster has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The one that was to be taken.
    Last,
    /// Some others, or none.
    Others,
    /// As many as before.
    Untouched,
}

/// What a flush has taken from the image's state, to be put back if it fails.
#[derive(Debug, Default)]
struct Taken {
    tables: tables::Taken,
    refcounts: refcounts::Taken,
    freed: Vec<Run>,
}

/// Writes metadata. There is one at a time.
#[derive(Debug)]
pub struct Flusher {
    /// The first sector of the file.
    head: [u8; HEAD_LEN],
    batch: Batch,
}

impl Flusher {
    /// `head` is the first sector of the file.
    pub fn new(head: [u8; HEAD_LEN]) -> Self {
        Self {
            head,
            batch: Batch::default(),
        }
    }
}

impl Image {
    fn flusher(&self) -> io::Result<MutexGuard<'_, Flusher>> {
        match &self.flusher {
            Some(flusher) => Ok(flusher.lock().unwrap_or_else(PoisonError::into_inner)),
            None => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    /// Makes everything durable that was written before, with the metadata that leads to it.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut flusher = self.flusher()?;
        self.write_back(&mut flusher)
    }

    /// Writes metadata if so much of it has changed that it is time to.
    pub(super) fn make_room(&self) -> io::Result<()> {
        if !is_crowded(&self.lock()) {
            return Ok(());
        }
        let mut flusher = self.flusher()?;
        // Somebody else may have done it meanwhile.
        if is_crowded(&self.lock()) {
            self.write_back(&mut flusher)?;
        }
        Ok(())
    }

    /// Whether anything is left for a flush to do besides making data durable.
    pub(super) fn has_changes(&self) -> bool {
        let meta = self.lock();
        let space = meta.space.as_ref();
        meta.tables.is_dirty()
            || !meta.freed.is_empty()
            || space.is_some_and(|space| space.refcounts.is_dirty())
    }

    fn write_back(&self, flusher: &mut Flusher) -> io::Result<()> {
        let mut taken = self.take(flusher)?;
        let done = self.write_stages(flusher, &mut taken);
        let mut meta = self.lock();
        let success = done.is_ok();
        meta.tables.written(mem::take(&mut taken.tables), success);
        if let Some(space) = &mut meta.space {
            space
                .refcounts
                .written(mem::take(&mut taken.refcounts), success);
        }
        if success {
            meta.freed.rest(taken.freed);
        } else {
            meta.freed.put_back(taken.freed);
        }
        drop(meta);
        done?;
        self.give_back();
        Ok(())
    }

    /// Copies all that has changed.
    fn take(&self, flusher: &mut Flusher) -> io::Result<Taken> {
        let batch = &mut flusher.batch;
        batch.clear();
        let mut meta = self.lock();
        let space = meta.space()?;
        let left = space.place_table()?;
        let refcounts = space.refcounts.take(|change| batch.add_refcounts(change));
        let place = space.refcounts.place();
        for clusters in left {
            meta.freed.push(Run::table(clusters));
        }
        let tables = meta.tables.take(|change| batch.add_tables(change));
        let mut head = flusher.head;
        let bits = self.layout.cluster_bits;
        if refcounts.moved {
            // Nothing refers to the table's new place yet.
            batch.first.append(&mut batch.second);
            put(&mut head, 48, &(place.start << bits).to_be_bytes());
            let count = u32::try_from(place.end - place.start).unwrap_or(0);
            put(&mut head, 56, &count.to_be_bytes());
            batch.head_second = Some(head);
        }
        if tables.resized {
            put(&mut head, 24, &meta.size_in_header.to_be_bytes());
            let count = u32::try_from(meta.tables.l1_len()).unwrap_or(0);
            put(&mut head, 36, &count.to_be_bytes());
            put(
                &mut head,
                40,
                &(meta.tables.place().start << bits).to_be_bytes(),
            );
            batch.head_third = Some(head);
        }
        let freed = meta.freed.take_fresh();
        Ok(Taken {
            tables,
            refcounts,
            freed,
        })
    }

    fn write_stages(&self, flusher: &mut Flusher, taken: &mut Taken) -> io::Result<()> {
        let Flusher { head, batch } = flusher;
        let file = self.file.host();
        batch.write_new(file, self.layout.cluster_len())?;
        write_pieces(&batch.memory, &mut batch.first, file)?;
        self.sync(file)?;
        if self.layout.external {
            self.sync(&self.data)?;
        }
        self.lock().tables.tables_written(&mut taken.tables);
        if !batch.second.is_empty() || batch.head_second.is_some() {
            write_pieces(&batch.memory, &mut batch.second, file)?;
            if let Some(new) = batch.head_second {
                file.write_buf(&new, 0)?;
                *head = new;
            }
            self.sync(file)?;
        }
        if !batch.third.is_empty() || batch.head_third.is_some() {
            write_pieces(&batch.memory, &mut batch.third, file)?;
            if let Some(new) = batch.head_third {
                file.write_buf(&new, 0)?;
                *head = new;
            }
            self.sync(file)?;
        }
        Ok(())
    }

    fn sync(&self, file: &HostFile) -> io::Result<()> {
        if self.durable { file.sync() } else { Ok(()) }
    }

    /// Frees clusters that neither the file nor any request refers to any more. What fails is left
    /// to the next time. The caller is the only flusher.
    fn give_back(&self) {
        let mut meta = self.lock();
        let mut runs = meta.freed.ripe(&self.in_flight);
        drop(meta);
        runs.sort_unstable_by_key(|run| run.clusters.start);
        for run in runs {
            let done = match run.kind {
                Kind::External => self.give_back_external(&run),
                Kind::Data | Kind::Table => self.give_back_run(&run),
            };
            if let Err((next, error)) = done {
                tracing::debug!(%error, ?run, "Clusters could not be freed yet");
                let clusters = next..run.clusters.end;
                self.lock().freed.push(Run { clusters, ..run });
            }
        }
    }

    /// [`Self::give_back`] of one run. If it fails, it does so at the cluster that is returned.
    fn give_back_run(&self, run: &Run) -> Result<(), (u64, io::Error)> {
        let mut start = run.clusters.start;
        while start < run.clusters.end {
            let (last, next, done) = self.drop_references(start..run.clusters.end);
            if !last.is_empty() {
                if run.punch {
                    // Not being able to only costs space of the host.
                    let _ = self.punch(&last);
                }
                let bits = self.layout.cluster_bits;
                self.unpacked
                    .forget(last.start << bits, (last.end - last.start) << bits);
                self.free(last, run.kind)?;
            }
            done.map_err(|error| (next, error))?;
            start = next;
        }
        Ok(())
    }

    /// Frees clusters that have one reference.
    fn free(&self, clusters: Range<u64>, kind: Kind) -> Result<(), (u64, io::Error)> {
        let mut meta = self.lock();
        for cluster in clusters {
            let freed = meta.space().and_then(|space| {
                space.free(cluster)?;
                if kind == Kind::Table {
                    space.places.remove(cluster);
                }
                Ok(())
            });
            freed.map_err(|error| (cluster, error))?;
        }
        Ok(())
    }

    /// Takes one reference from each of these clusters, up to the end of the first run of those
    /// that have just one. Those keep it, and are returned, with the cluster after the last one
    /// that was dealt with, and why it is the last. They can't be used by anybody.
    fn drop_references(&self, clusters: Range<u64>) -> (Range<u64>, u64, io::Result<()>) {
        let mut meta = self.lock();
        let mut last = clusters.end..clusters.end;
        for cluster in clusters.clone() {
            let ends = last.end == cluster && !last.is_empty();
            match self.drop_reference(&mut meta, cluster, ends) {
                Ok(Left::Last) => last = last.start.min(cluster)..cluster + 1,
                Ok(Left::Others) => {}
                Ok(Left::Untouched) => return (last, cluster, Ok(())),
                Err(error) => return (last, cluster, Err(error)),
            }
        }
        (last, clusters.end, Ok(()))
    }

    /// Takes one reference from a cluster, unless it is the last one, or `not_if_others`.
    fn drop_reference(
        &self,
        meta: &mut Meta,
        cluster: u64,
        not_if_others: bool,
    ) -> io::Result<Left> {
        let refcounts = &mut meta.space()?.refcounts;
        match refcounts.get(cluster)? {
            1 => {
                // Nothing more is put there.
                let packing = meta.packing.map(|at| self.layout.cluster_of(at));
                if packing == Some(cluster) {
                    meta.packing = None;
                }
                return Ok(Left::Last);
            }
            _ if not_if_others => return Ok(Left::Untouched),
            // A damaged image; there is nothing to take.
            0 => {}
            more => refcounts.set(cluster, more - 1)?,
        }
        Ok(Left::Others)
    }

    fn punch(&self, clusters: &Range<u64>) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        let len = (clusters.end - clusters.start) << bits;
        self.file.host().discard(clusters.start << bits, len)
    }

    /// If `done` failed as the image is damaged, keeps everybody from writing to it, now and later.
    pub(super) fn note_damage(&self, done: &io::Result<()>) {
        let Err(error) = done else { return };
        let Some(what) = damage_of(error) else {
            return;
        };
        let Ok(mut flusher) = self.flusher() else {
            return;
        };
        let mut meta = self.lock();
        if meta.damage.is_some() {
            return;
        }
        meta.damage = Some(what.to_owned());
        drop(meta);
        tracing::error!(disk = self.file.host().name(), %error, "Writing to the disk has ended");
        if let Err(error) = self.mark_corrupt(&mut flusher) {
            tracing::error!(%error, "The image could not be marked as corrupt");
        }
    }

    fn mark_corrupt(&self, flusher: &mut Flusher) -> io::Result<()> {
        if self.layout.version < 3 || !self.durable {
            return Ok(());
        }
        let bits = flusher
            .head
            .get(72..)
            .and_then(<[u8]>::first_chunk)
            .map(|bytes| u64::from_be_bytes(*bytes))
            .ok_or_else(|| damage("its header is too short"))?;
        put(&mut flusher.head, 72, &(bits | CORRUPT).to_be_bytes());
        self.file.host().write_buf(&flusher.head, 0)?;
        self.file.host().sync()
    }
}

impl Batch {
    fn clear(&mut self) {
        self.memory.clear();
        self.memory.shrink_to(KEPT_MEMORY);
        for pieces in [
            &mut self.first,
            &mut self.changes,
            &mut self.second,
            &mut self.third,
        ] {
            pieces.clear();
        }
        self.new.clear();
        self.head_second = None;
        self.head_third = None;
    }

    fn copy(&mut self, offset: u64, bytes: &[u8]) -> Piece {
        let start = self.memory.len();
        self.memory.extend(bytes);
        Piece {
            offset,
            bytes: start..self.memory.len(),
        }
    }

    fn add_refcounts(&mut self, change: refcounts::Change<'_>) {
        use refcounts::Change;
        match change {
            Change::Slice(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.first.push(piece);
            }
            Change::NewSlice(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.changes.push(piece);
            }
            Change::NewBlock(offset) => self.new.push(NewCluster { offset, from: None }),
            Change::Table(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.second.push(piece);
            }
        }
    }

    fn add_tables(&mut self, change: tables::Change<'_>) {
        use tables::Change;
        match change {
            Change::Slice(offset, bytes) | Change::L1(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.third.push(piece);
            }
            Change::NewSlice(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.changes.push(piece);
            }
            Change::NewTable(offset, from) => self.new.push(NewCluster { offset, from }),
            Change::NewL1(offset, bytes) => {
                let piece = self.copy(offset, bytes);
                self.first.push(piece);
            }
        }
    }

    /// Writes new tables and blocks, each as a whole.
    fn write_new(&mut self, file: &HostFile, cluster_len: usize) -> io::Result<()> {
        self.new.sort_unstable_by_key(|new| new.offset);
        self.changes.sort_unstable_by_key(|piece| piece.offset);
        if !self.new.is_empty() {
            self.cluster.resize(cluster_len, 0);
        }
        let mut changes = self.changes.iter().peekable();
        for new in &self.new {
            match new.from {
                Some(from) => file.read_buf(&mut self.cluster, from)?,
                None => self.cluster.fill(0),
            }
            let end = new.offset + cluster_len as u64;
            while let Some(piece) = changes.next_if(|piece| piece.offset < end) {
                let within = piece.offset.saturating_sub(new.offset);
                let bytes = self.memory.get(piece.bytes.clone()).unwrap_or_default();
                put(
                    &mut self.cluster,
                    usize::try_from(within).unwrap_or(0),
                    bytes,
                );
            }
            file.write_buf(&self.cluster, new.offset)?;
        }
        Ok(())
    }
}

/// Writes pieces, whose content is in `memory`; those that follow each other in the file at once.
fn write_pieces(memory: &[u8], pieces: &mut [Piece], file: &HostFile) -> io::Result<()> {
    pieces.sort_unstable_by_key(|piece| piece.offset);
    let follows = |a: &Piece, b: &Piece| a.offset + a.bytes.len() as u64 == b.offset;
    for run in pieces.chunk_by(follows) {
        let iovecs = run.iter().map(|piece| {
            let bytes = memory.get(piece.bytes.clone()).unwrap_or_default();
            iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            }
        });
        let offset = run.first().map_or(0, |piece| piece.offset);
        // SAFETY: the memory is borrowed until this returns, and only read.
        unsafe { file.write_at(iovecs, offset) }?;
    }
    Ok(())
}

fn is_crowded(meta: &Meta) -> bool {
    let space = meta.space.as_ref();
    meta.tables.is_crowded()
        || meta.freed.is_crowded()
        || space.is_some_and(|space| space.refcounts.is_crowded())
}

/// Puts `bytes` at `at`, as far as there is room.
fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}
