//! The order in which a qcow2 image's metadata reaches its file.
//!
//! Whatever moment a process or its host dies at, no cluster of the file may be in use without a
//! refcount that says so: the next writer would give such a cluster away again, and a guest's data
//! would become part of the image's tables. So a refcount must be in the file before the entry
//! that refers to its cluster, and the disk must not exchange the two either.
//!
//! imago keeps refcounts in memory until a flush, but writes entries of the L1 and the refcount
//! table at once, and never waits for the disk in between. This module sits below imago and
//! recognises those writes by where they go. It keeps the entries of the two top tables back until
//! a flush has written what they need, and has the disk catch up between writes of other metadata
//! and of L2 tables. Nobody misses what is kept back, as both tables are only read when an image
//! is opened. A flush that meets no new metadata costs nothing more than before.
//!
//! It also keeps the header from harm. Refcounts can come to say that cluster 0 is free after they
//! were checked, as an image may give its guest the clusters of its tables as data, and imago would
//! then put data there. Such writes fail; only what looks like this image's header passes, with a
//! refcount table of bounded length, as its length bounds what is kept back.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::io_buffers::{IoBuffer, IoVector};
use libc::iovec;

use super::header::Header;
use super::tables::{OFFSET_MASK, entries};
use crate::host::HostFile;

/// Writes to tables that are kept back: bytes by their offset in the file.
type Kept = BTreeMap<u64, Box<[u8]>>;

/// Orders the writes to one writable image.
#[derive(Debug)]
pub struct WriteOrder {
    host: Arc<HostFile>,
    cluster: u64,
    /// Bytes imago writes to change one table entry; no guest's write is as short.
    entry_len: u64,
    header: Header,
    l1: Range<u64>,
    refcounts_start: AtomicU64,
    refcounts_end: AtomicU64,
    state: Mutex<State>,
    /// Writes of L2 tables.
    l2_writes: Progress,
    /// All other writes.
    other_writes: Progress,
    /// Held while waiting for the disk.
    syncing: Mutex<()>,
}

/// How many writes of a kind were done, and how many of them the disk is known to have.
#[derive(Debug, Default)]
struct Progress {
    done: AtomicU64,
    durable: AtomicU64,
}

impl Progress {
    fn count(&self) {
        self.done.fetch_add(1, Ordering::AcqRel);
    }

    fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire) >= self.done.load(Ordering::Acquire)
    }
}

#[derive(Debug, Default)]
struct State {
    l2_tables: HashSet<u64>,
    l1: Kept,
    refcounts: Kept,
}

/// What was kept back when a flush began; see [`WriteOrder::begin_flush`].
#[derive(Debug)]
pub struct KeptBack {
    l1: Kept,
    refcounts: Kept,
}

impl WriteOrder {
    /// Starts with an image whose L1 table refers to `l2_tables`.
    pub fn new(host: Arc<HostFile>, header: &Header, l2_tables: HashSet<u64>) -> Self {
        let end = |offset: u64, entries: u32| offset.saturating_add(u64::from(entries) * 8);
        Self {
            entry_len: host.align().request.max(8) as u64,
            host,
            cluster: header.cluster_size(),
            header: header.clone(),
            l1: header.l1_offset..end(header.l1_offset, header.l1_entries),
            refcounts_start: header.refcount_offset.into(),
            refcounts_end: end(header.refcount_offset, header.refcount_entries).into(),
            state: Mutex::new(State {
                l2_tables,
                ..State::default()
            }),
            l2_writes: Progress::default(),
            other_writes: Progress::default(),
            syncing: Mutex::default(),
        }
    }

    /// Writes `iovecs`, `len` bytes in all, at `offset`, or keeps them back.
    ///
    /// # Safety
    ///
    /// Every `iovec` must describe memory that is readable until this returns.
    pub unsafe fn write(&self, iovecs: &[iovec], len: u64, offset: u64) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory.
        if len == self.entry_len && unsafe { self.keep_back(iovecs, offset) } {
            return Ok(());
        }
        if offset == 0 && len <= self.cluster {
            // SAFETY: the caller vouches for the memory.
            return self.write_header(&unsafe { gather(iovecs) }, || unsafe {
                self.host.write_at(iovecs.iter().copied(), offset)
            });
        }
        self.check_place(offset)?;
        let whole_cluster = len == self.cluster && offset.is_multiple_of(self.cluster);
        let is_l2 = whole_cluster && self.state().l2_tables.contains(&offset);
        if is_l2 {
            self.before_l2()?;
        } else if whole_cluster {
            // This may be a refcount block that frees what an L2 table no longer refers to.
            self.catch_up(&self.l2_writes)?;
        }
        // SAFETY: the caller vouches for the memory.
        let done = unsafe { self.host.write_at(iovecs.iter().copied(), offset) };
        if is_l2 {
            self.l2_writes.count();
        } else {
            self.other_writes.count();
        }
        done
    }

    /// Checks that nothing but a header goes to the first cluster, and that table entries can
    /// refer to `offset`.
    pub fn check_place(&self, offset: u64) -> io::Result<()> {
        if offset < self.cluster {
            return Err(io::Error::other(
                "the image's refcounts are damaged: its header would be overwritten",
            ));
        }
        if offset > OFFSET_MASK {
            return Err(io::Error::other(
                "the image's tables are damaged: it would grow past what they can refer to",
            ));
        }
        Ok(())
    }

    /// Has `write` write the header, whose first bytes are `head`.
    fn write_header(&self, head: &[u8], write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(refcounts) = self.header.refcounts_if_moved(head) else {
            return self.check_place(0);
        };
        self.catch_up(&self.other_writes)?;
        let done = write();
        self.other_writes.count();
        if done.is_ok() {
            self.refcounts_moved(refcounts);
        }
        done
    }

    /// Keeps an entry of one of the top tables back; false if it is none.
    ///
    /// # Safety
    ///
    /// As for [`Self::write`].
    unsafe fn keep_back(&self, iovecs: &[iovec], offset: u64) -> bool {
        if self.l1.contains(&offset) {
            // SAFETY: the caller vouches for the memory.
            let bytes = unsafe { gather(iovecs) };
            let mut state = self.state();
            let referred = entries(&bytes).map(|entry| entry & OFFSET_MASK);
            state
                .l2_tables
                .extend(referred.filter(|&offset| offset != 0));
            state.l1.insert(offset, bytes);
        } else if self.in_refcount_table(offset) {
            // SAFETY: the caller vouches for the memory.
            self.state()
                .refcounts
                .insert(offset, unsafe { gather(iovecs) });
        } else {
            return false;
        }
        true
    }

    /// Notes a write of data that went around [`Self::write`].
    pub fn data_written(&self) {
        self.other_writes.count();
    }

    /// To be called before imago flushes: tells what that flush will allow to be written.
    pub fn begin_flush(&self) -> KeptBack {
        let mut state = self.state();
        KeptBack {
            l1: std::mem::take(&mut state.l1),
            refcounts: state.refcounts.clone(),
        }
    }

    /// To be called after imago's flush, with its result, once the disk has caught up: writes
    /// what was kept back, or if anything fails keeps it for the next flush.
    pub fn end_flush(&self, kept: KeptBack, flushed: io::Result<()>) -> io::Result<()> {
        let done = flushed.and_then(|()| self.write_kept(&kept));
        if done.is_err() {
            keep_again(&mut self.state().l1, kept.l1);
        }
        done
    }

    fn write_kept(&self, kept: &KeptBack) -> io::Result<()> {
        if kept.l1.is_empty() && kept.refcounts.is_empty() {
            return Ok(());
        }
        for (offset, bytes) in &kept.refcounts {
            // Written meanwhile if it is no longer there; a newer one must wait for its own flush.
            if self.state().refcounts.contains_key(offset) {
                self.write_bytes(bytes, *offset)?;
            }
            let mut state = self.state();
            if state.refcounts.get(offset) == Some(bytes) {
                state.refcounts.remove(offset);
            }
        }
        self.catch_up(&self.other_writes)?;
        for (offset, bytes) in &kept.l1 {
            self.write_bytes(bytes, *offset)?;
        }
        self.catch_up(&self.other_writes)
    }

    /// imago has written the refcounts an L2 table needs; has them found, and on the disk.
    fn before_l2(&self) -> io::Result<()> {
        let tables = std::mem::take(&mut self.state().refcounts);
        if !tables.is_empty() {
            let done = self.catch_up(&self.other_writes).and_then(|()| {
                tables
                    .iter()
                    .try_for_each(|(offset, bytes)| self.write_bytes(bytes, *offset))
            });
            if let Err(err) = done {
                keep_again(&mut self.state().refcounts, tables);
                return Err(err);
            }
        }
        self.catch_up(&self.other_writes)
    }

    /// The header may have got a new refcount table, written in full before.
    fn refcounts_moved(&self, to: Range<u64>) {
        if self.refcounts_start.swap(to.start, Ordering::AcqRel) != to.start {
            self.state().refcounts.clear();
        }
        self.refcounts_end.store(to.end, Ordering::Release);
    }

    fn in_refcount_table(&self, offset: u64) -> bool {
        let start = self.refcounts_start.load(Ordering::Acquire);
        (start..self.refcounts_end.load(Ordering::Acquire)).contains(&offset)
    }

    /// Waits until the disk has all writes of a kind.
    fn catch_up(&self, writes: &Progress) -> io::Result<()> {
        if writes.is_durable() {
            Ok(())
        } else {
            self.sync_unless(|| writes.is_durable())
        }
    }

    /// Waits until the disk has every write that is done.
    pub fn sync(&self) -> io::Result<()> {
        self.sync_unless(|| false)
    }

    fn sync_unless(&self, needless: impl Fn() -> bool) -> io::Result<()> {
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if needless() {
            return Ok(());
        }
        let counts = [&self.l2_writes, &self.other_writes]
            .map(|writes| (writes, writes.done.load(Ordering::Acquire)));
        self.host.sync()?;
        for (writes, done) in counts {
            writes.durable.fetch_max(done, Ordering::AcqRel);
        }
        Ok(())
    }

    fn write_bytes(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Direct I/O takes aligned memory only.
        let mut buf = IoBuffer::new(bytes.len(), self.host.align().memory)?;
        buf.as_mut().into_slice().copy_from_slice(bytes);
        let buf = IoVector::from(&buf);
        // SAFETY: the vector borrows its memory until this returns.
        let done = unsafe { self.host.write_at(buf.as_iovec().iter().copied(), offset) };
        self.other_writes.count();
        done
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts what could not be written back among what is kept; newer writes win.
fn keep_again(kept: &mut Kept, failed: Kept) {
    for (offset, bytes) in failed {
        kept.entry(offset).or_insert(bytes);
    }
}

/// Copies the memory of `iovecs` together.
///
/// # Safety
///
/// Every `iovec` must describe memory that is readable until this returns.
unsafe fn gather(iovecs: &[iovec]) -> Box<[u8]> {
    let mut bytes = vec![0; iovecs.iter().map(|vec| vec.iov_len).sum()];
    let mut at = 0;
    for vec in iovecs {
        // SAFETY: the caller vouches for the memory, and `bytes` has room for all of it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                vec.iov_base.cast::<u8>(),
                bytes.as_mut_ptr().add(at),
                vec.iov_len,
            );
        }
        at += vec.iov_len;
    }
    bytes.into()
}
