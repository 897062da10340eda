//! Does the requests of one queue, many at a time where the host lets it.
//!
//! What a request becomes depends on what its data is. Where [`BlockBackend::plan`] tells where
//! the data is in files of the host, io_uring reads or writes it there, straight from or to the
//! caller's memory. Writes through the page cache are an exception: they are copies, done sooner
//! than io_uring would have found a kernel thread for them, which most filesystems make it do.
//! Without a plan (new clusters, compressed data) or without io_uring the request is done at once
//! in the caller's thread, or by threads of the disk if it keeps others waiting that are there.
//! Flushes, discards and zeroing always go to such a thread, as they can take long.

mod batch;
mod events;
mod helper;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use libc::iovec;

use crate::host::Window;
use crate::host::uring::Uring;
use crate::plan::{Access, Plan};
use crate::{BlockBackend, BlockError, VolatileSlice, io_error, total_len};
use events::Events;
pub use helper::Helpers;
use helper::{Job, Kind, Mailbox, Memory};

/// Longest read or write that is handed over as a whole, in bytes. A longer one is done in parts
/// in the caller's thread, so that it can be given up in between.
const LONGEST: u64 = 4 << 20;

/// By which means a disk is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring where the host has and allows it.
    #[default]
    Auto,
    /// Calls that block, in the thread of each queue.
    Threads,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill memory from the disk.
    Read,
    /// Put memory on the disk.
    Write,
    /// As [`BlockBackend::flush`].
    Flush,
    /// As [`BlockBackend::discard`].
    Discard,
    /// As [`BlockBackend::write_zeroes`].
    WriteZeroes {
        /// Its space may be given back.
        may_unmap: bool,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes to discard or zero; the memory's length counts for reads and writes.
    pub len: u64,
}

/// How a request ended.
#[derive(Debug)]
pub enum Ending {
    /// As a call of the backend would have.
    Done(Result<(), BlockError>),
    /// The host did only a part of it, such as at the end of a file. [`Engine::call`] does all.
    Unfinished,
}

/// Does the requests of one queue; belongs to the thread that made it.
#[derive(Debug)]
pub struct Engine {
    backend: Arc<dyn BlockBackend>,
    helpers: Arc<Helpers>,
    mailbox: Arc<Mailbox>,
    cancelled: Arc<AtomicBool>,
    waiter: Waiter,
    /// By token; made as tokens come up.
    transfers: Vec<Transfer>,
    /// Requests that have begun and not ended.
    busy: usize,
    /// For the next requests that helpers do.
    spare: Vec<Memory>,
}

/// How a request is done.
#[derive(Debug)]
enum Way {
    /// It is done, or can't be.
    Done(Result<(), BlockError>),
    /// By its plan.
    Planned,
    /// By a helper.
    Helper,
    /// By a call here, or by a helper if others wait: one for requests of this kind.
    Slow(Access, Kind),
    /// By a call here.
    Call(Access),
}

#[derive(Debug)]
enum Waiter {
    Ring(Box<Uring>),
    Events(Events),
}

/// A read or write that io_uring does.
#[derive(Debug)]
struct Transfer {
    plan: Plan,
    access: Access,
    offset: u64,
    wanted: u64,
    done: u64,
    /// Pieces that have not ended.
    left: usize,
    error: Option<i32>,
}

impl Engine {
    /// An engine for the calling thread. [`wait`](Self::wait) returns when one of `events`, which
    /// are eventfds, is signalled; nobody needs to read them. Setting `cancelled` has long
    /// requests end early.
    ///
    /// # Errors
    /// There are no more files to be had.
    pub fn new(
        backend: Arc<dyn BlockBackend>,
        helpers: Arc<Helpers>,
        aio: Aio,
        events: &[BorrowedFd<'_>],
        cancelled: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let mail = mailbox.event();
        let mut all = events.to_vec();
        all.push(mail.as_fd());
        let waiter = match ring(aio, &all) {
            Some(ring) => Waiter::Ring(Box::new(ring)),
            None => Waiter::Events(Events::new(&all)?),
        };
        drop(mail);
        Ok(Self {
            backend,
            helpers,
            mailbox,
            cancelled,
            waiter,
            transfers: Vec::new(),
            busy: 0,
            spare: Vec::new(),
        })
    }

    /// Tells of memory that is pinned, as huge pages are: requests in it then cost less.
    ///
    /// # Safety
    /// The memory must stay mapped as it is for as long as this value lives.
    pub unsafe fn register_memory(&mut self, regions: &[iovec]) {
        if let Waiter::Ring(ring) = &mut self.waiter {
            // SAFETY: the caller vouches for the memory.
            unsafe { ring.register_memory(regions) };
        }
    }

    /// Begins a request, or does it at once and returns how it went. If it has only begun,
    /// [`ended`](Self::ended) tells its end under `token`, a small number that no other request
    /// under way has. `more` tells that others wait to be begun, which it should not keep waiting.
    ///
    /// # Safety
    /// The memory of `bufs` must stay mapped until the request has ended.
    pub unsafe fn begin(
        &mut self,
        token: usize,
        request: Request,
        bufs: &[VolatileSlice<'_>],
        more: bool,
    ) -> Option<Result<(), BlockError>> {
        let way = match request.operation {
            Operation::Read => self.plan(token, Access::Read, request.offset, bufs),
            Operation::Write => self.plan(token, Access::Write, request.offset, bufs),
            _ => Way::Helper,
        };
        let ended = match way {
            Way::Done(result) => Some(result),
            // SAFETY: the caller vouches for the memory.
            Way::Planned => unsafe { self.hand_over_pieces(token, bufs) },
            // SAFETY: as above.
            Way::Helper => unsafe { self.post(token, Kind::Long, request, bufs) },
            // SAFETY: as above.
            Way::Slow(_, kind) if more || self.is_busy() => unsafe {
                self.post(token, kind, request, bufs)
            },
            Way::Call(access) | Way::Slow(access, _) => {
                Some(self.call(access, request.offset, bufs))
            }
        };
        self.busy += usize::from(ended.is_none());
        ended
    }

    /// Does a read or write at once.
    ///
    /// # Errors
    /// As those of the backend, and [`BlockError::Cancelled`].
    pub fn call(
        &self,
        access: Access,
        offset: u64,
        bufs: &[VolatileSlice<'_>],
    ) -> Result<(), BlockError> {
        if total_len(bufs) > LONGEST {
            return self.call_in_parts(access, offset, bufs);
        }
        match access {
            Access::Read => self.backend.read_vectored(bufs, offset),
            Access::Write => self.backend.write_vectored(bufs, offset),
        }
    }

    /// Whether requests are under way.
    pub fn is_busy(&self) -> bool {
        self.busy > 0
    }

    /// Waits until a request may have ended, an event was signalled or `timeout` has passed. To be
    /// called once [`ended`](Self::ended) has no more.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match &mut self.waiter {
            Waiter::Ring(ring) => ring.wait(timeout),
            Waiter::Events(events) => events.wait(timeout),
        }
    }

    /// Hands requests to the kernel that were begun, without waiting.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn hand_over(&mut self) -> io::Result<()> {
        match &mut self.waiter {
            Waiter::Ring(ring) => ring.submit(),
            Waiter::Events(_) => Ok(()),
        }
    }

    /// Takes a request that has ended; `None` if there is none now.
    pub fn ended(&mut self) -> Option<(usize, Ending)> {
        let ended = self.transfer_ended().or_else(|| {
            let (token, result, mut memory) = self.mailbox.take()?;
            memory.clear();
            self.spare.push(memory);
            Some((token, Ending::Done(result)))
        });
        self.busy -= usize::from(ended.is_some());
        ended
    }

    /// Finds out how a read or write is to be done. It has a plan then if it can be done by that.
    fn plan(
        &mut self,
        token: usize,
        access: Access,
        offset: u64,
        bufs: &[VolatileSlice<'_>],
    ) -> Way {
        let len = total_len(bufs);
        if len > LONGEST {
            return Way::Call(access);
        }
        if self.transfers.len() <= token {
            self.transfers.resize_with(token + 1, Transfer::default);
        }
        let Some(transfer) = self.transfers.get_mut(token) else {
            return Way::Call(access);
        };
        let planned = self.backend.plan(access, offset, len, &mut transfer.plan);
        if matches!(planned, Ok(true)) && matches!(self.waiter, Waiter::Ring(_)) {
            transfer.start(access, offset, len);
            return Way::Planned;
        }
        let way = match planned {
            Err(error) => Way::Done(Err(error)),
            // Without io_uring what goes to the disk itself waits for it.
            Ok(true) if transfer.plan.waits_for_disk() => Way::Slow(access, Kind::Transfer),
            Ok(false) if self.backend.takes_time(access) => match access {
                Access::Read => Way::Slow(access, Kind::Transfer),
                Access::Write => Way::Slow(access, Kind::NewData),
            },
            Ok(_) => Way::Call(access),
        };
        transfer.plan.end();
        way
    }

    /// # Safety
    ///
    /// As for [`Self::begin`].
    unsafe fn hand_over_pieces(
        &mut self,
        token: usize,
        bufs: &[VolatileSlice<'_>],
    ) -> Option<Result<(), BlockError>> {
        let (Waiter::Ring(ring), Some(transfer)) =
            (&mut self.waiter, self.transfers.get_mut(token))
        else {
            return Some(Err(BlockError::Cancelled));
        };
        // SAFETY: the caller vouches for the memory.
        unsafe { transfer.hand_over(ring, token as u64, bufs) }
    }

    /// Has a helper do a request.
    ///
    /// # Safety
    ///
    /// As for [`Self::begin`].
    unsafe fn post(
        &mut self,
        token: usize,
        kind: Kind,
        request: Request,
        bufs: &[VolatileSlice<'_>],
    ) -> Option<Result<(), BlockError>> {
        let mut memory = self.spare.pop().unwrap_or_default();
        // SAFETY: the caller vouches for the memory, which is let go of when the request has ended.
        unsafe { memory.set(bufs) };
        let job = Job {
            token,
            request,
            memory,
            cancelled: Arc::clone(&self.cancelled),
            mailbox: Arc::clone(&self.mailbox),
        };
        self.helpers.post(kind, job)
    }

    /// Takes a read or write of which all pieces have ended.
    fn transfer_ended(&mut self) -> Option<(usize, Ending)> {
        let Waiter::Ring(ring) = &mut self.waiter else {
            return None;
        };
        loop {
            let ended = ring.next()?;
            let token = usize::try_from(ended.tag).ok()?;
            let transfer = self.transfers.get_mut(token)?;
            if let Some(ending) = transfer.piece_ended(ended.result) {
                return Some((token, ending));
            }
        }
    }

    fn call_in_parts(
        &self,
        access: Access,
        offset: u64,
        bufs: &[VolatileSlice<'_>],
    ) -> Result<(), BlockError> {
        let mut at = offset;
        for buf in bufs {
            let mut rest = *buf;
            while !rest.is_empty() {
                if self.cancelled.load(Ordering::Acquire) {
                    return Err(BlockError::Cancelled);
                }
                let len = rest
                    .len()
                    .min(usize::try_from(LONGEST).unwrap_or(usize::MAX));
                let cut = rest.split_at(len).map_err(|_| BlockError::Cancelled)?;
                let part = [cut.0];
                match access {
                    Access::Read => self.backend.read_vectored(&part, at)?,
                    Access::Write => self.backend.write_vectored(&part, at)?,
                }
                at += len as u64;
                rest = cut.1;
            }
        }
        Ok(())
    }
}

impl Drop for Engine {
    /// Waits for all requests: the kernel may still write to their memory.
    fn drop(&mut self) {
        while self.is_busy() {
            if self.ended().is_none()
                && let Err(error) = self.wait(None)
            {
                tracing::error!(%error, "Cannot wait for the last requests of a disk");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            plan: Plan::default(),
            access: Access::Read,
            offset: 0,
            wanted: 0,
            done: 0,
            left: 0,
            error: None,
        }
    }
}

impl Transfer {
    fn start(&mut self, access: Access, offset: u64, len: u64) {
        self.access = access;
        self.offset = offset;
        self.wanted = len;
        self.done = 0;
        self.left = 0;
        self.error = None;
    }

    /// Hands the pieces of the plan to `ring`, or does them here. Returns how it went if nothing
    /// is left to wait for.
    ///
    /// # Safety
    ///
    /// As for [`Engine::begin`].
    unsafe fn hand_over(
        &mut self,
        ring: &mut Uring,
        tag: u64,
        bufs: &[VolatileSlice<'_>],
    ) -> Option<Result<(), BlockError>> {
        let mut rest = Window::new(bufs);
        let mut failed = None;
        for piece in self.plan.pieces() {
            let part = rest.split_off(piece.len);
            let Some(file) = &piece.file else {
                if self.access == Access::Write {
                    failed = Some(io::ErrorKind::InvalidInput.into());
                    break;
                }
                part.fill_zero();
                self.done += piece.len;
                continue;
            };
            let at_once = self.access == Access::Write && !file.is_direct()
                || !file.align().fits(part.iovecs(), piece.offset);
            // SAFETY: the caller vouches for the memory.
            let pushed = !at_once
                && unsafe { ring.push(self.access, file, part.iovecs(), piece.offset, tag) };
            if pushed {
                self.left += 1;
                continue;
            }
            // SAFETY: as above.
            let done = unsafe {
                match self.access {
                    Access::Read => file.read_at(part.iovecs(), piece.offset),
                    Access::Write => file.write_at(part.iovecs(), piece.offset),
                }
            };
            match done {
                Ok(()) => self.done += piece.len,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if self.left > 0 {
            // The error is told once those pieces have ended that are under way.
            self.error = failed.map(|error| error.raw_os_error().unwrap_or(libc::EIO));
            return None;
        }
        self.plan.end();
        Some(failed.map_or(Ok(()), |error| Err(self.failure(error))))
    }

    /// Takes the result of one piece, and tells how all of it went if it was the last.
    fn piece_ended(&mut self, result: Result<u32, i32>) -> Option<Ending> {
        match result {
            Ok(bytes) => self.done += u64::from(bytes),
            // Nothing was done; that shows in the bytes.
            Err(libc::EAGAIN | libc::EINTR) => {}
            Err(error) => self.error = self.error.or(Some(error)),
        }
        self.left -= 1;
        if self.left > 0 {
            return None;
        }
        self.plan.end();
        Some(match self.error {
            Some(error) => Ending::Done(Err(self.failure(io::Error::from_raw_os_error(error)))),
            None if self.done < self.wanted => Ending::Unfinished,
            None => Ending::Done(Ok(())),
        })
    }

    fn failure(&self, error: io::Error) -> BlockError {
        let op = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        io_error(op, self.offset, self.wanted)(error)
    }
}

/// Tells whether there is io_uring here.
///
/// # Errors
/// There is none, or the host does not allow it.
pub fn check_io_uring() -> io::Result<()> {
    Uring::new(&[]).map(drop)
}

/// Makes an io_uring if that is wanted and to be had, and tells once if not.
fn ring(aio: Aio, events: &[BorrowedFd<'_>]) -> Option<Uring> {
    static TOLD: Once = Once::new();
    if aio == Aio::Threads {
        return None;
    }
    match Uring::new(events) {
        Ok(ring) => {
            TOLD.call_once(|| tracing::info!("Disks are read and written by io_uring"));
            Some(ring)
        }
        Err(error) => {
            TOLD.call_once(|| {
                tracing::warn!(
                    %error,
                    "This host has or allows no io_uring (Linux 5.13 or newer, and see \
                     kernel.io_uring_disabled): disks do one request at a time in each queue"
                );
            });
            None
        }
    }
}
