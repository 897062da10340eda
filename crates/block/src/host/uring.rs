//! An io_uring instance of one thread: reads, writes, and events to wait for.
//!
//! Needs what Linux 5.13 has (multishot poll); newer kernels make it cheaper. Guest memory is
//! registered only where it is pinned anyway, as huge pages are: registering pins all of it, and
//! the guest's memory could then be neither swapped, nor merged, nor given back by a balloon. Files
//! are not registered: the kernel would let go of them, and so of the locks on them, only some time
//! after this process has ended, and the machine could not be started again at once. What it would
//! save was not to be seen in measurements.

use std::fmt::{self, Debug};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{Builder, EnterFlags, IoUring, opcode, squeue};
use libc::iovec;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::file::HostFile;
use crate::plan::Access;

/// Requests that can be handed over in one system call.
const ENTRIES: u32 = 128;
/// Results that the kernel keeps for us without memory of its own; more go to a list.
const RESULTS: u32 = 1024;
/// Buffers of the requests that were not handed over yet.
const IOVECS: usize = 1024;
/// Largest memory that can be registered as one buffer.
const BUFFER_MAX: usize = 1 << 30;
/// Set in the tag of an event.
const EVENT: u64 = 1 << 63;

/// How the kernel ended a request.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// The tag of the request.
    pub tag: u64,
    /// Bytes done, or the error.
    pub result: Result<u32, i32>,
}

/// The instance.
pub struct Uring {
    ring: IoUring,
    /// Start and length of memory registered as buffers.
    buffers: Vec<(usize, usize)>,
    iovecs: Box<[iovec]>,
    /// Those that the kernel has not copied yet.
    iovecs_used: usize,
    /// Requests that have not ended, handed over or not.
    in_flight: usize,
    events: Vec<i32>,
    /// Waiting with nothing but events in flight need not count as waiting for I/O.
    no_iowait: bool,
}

// SAFETY: the pointers are in `iovecs`, and point to memory that whoever put them there vouches
// for until the requests end, on any thread.
unsafe impl Send for Uring {}

impl Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// Makes an instance for the calling thread, which alone may use it. It wakes when one of
    /// `events`, all of them eventfds, is signalled; nobody needs to read them.
    ///
    /// # Errors
    /// The kernel has no io_uring, an old one, or forbids it.
    pub fn new(events: &[BorrowedFd<'_>]) -> io::Result<Self> {
        match modern() {
            // Only with these kernels can waiting be told from waiting for I/O.
            Ok(ring) if ring.params().is_feature_no_iowait() => Self::with(ring, events),
            _ => Self::new_compatible(events),
        }
    }

    /// As [`new`](Self::new) with kernels before 6.15.
    pub(crate) fn new_compatible(events: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let mut this = Self::with(compatible()?, events)?;
        this.no_iowait = false;
        Ok(this)
    }

    fn with(ring: IoUring, events: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let params = ring.params();
        if !params.is_feature_nodrop()
            || !params.is_feature_submit_stable()
            || !params.is_feature_ext_arg()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let none = iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        restrict(&ring)?;
        let mut this = Self {
            no_iowait: true,
            buffers: Vec::new(),
            iovecs: vec![none; IOVECS].into(),
            iovecs_used: 0,
            in_flight: 0,
            events: events.iter().map(AsRawFd::as_raw_fd).collect(),
            ring,
        };
        // Saves looking it up by its number; from 5.18 on.
        let _ = this.ring.submitter().register_ring_fd();
        for index in 0..events.len() {
            this.watch(index)?;
        }
        this.submit()?;
        // A kernel without multishot poll refuses at once.
        if let Some(Ended {
            result: Err(error), ..
        }) = this.take(true)
        {
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(this)
    }

    /// Registers pinned memory, which makes requests in it cheaper. Whether that succeeds depends
    /// on limits of the host and makes no other difference.
    ///
    /// # Safety
    /// The memory must stay mapped as it is for as long as this value lives.
    pub unsafe fn register_memory(&mut self, regions: &[iovec]) {
        let mut parts = Vec::new();
        for region in regions {
            let mut done = 0;
            while done < region.iov_len {
                let len = (region.iov_len - done).min(BUFFER_MAX);
                let base: *mut u8 = region.iov_base.cast();
                parts.push(iovec {
                    iov_base: base.wrapping_add(done).cast(),
                    iov_len: len,
                });
                done += len;
            }
        }
        // SAFETY: the caller vouches for the memory.
        match unsafe { self.ring.submitter().register_buffers(&parts) } {
            Ok(()) => {
                let place = |part: &iovec| (part.iov_base.addr(), part.iov_len);
                self.buffers = parts.iter().map(place).collect();
            }
            Err(error) => tracing::debug!(%error, "Guest memory can't be registered for I/O"),
        }
    }

    /// Adds a read or write, to be handed over by [`wait`](Self::wait). Returns whether there was
    /// room. It ends as [`next`](Self::next) tells under `tag`.
    ///
    /// # Safety
    /// Every `iovec` must describe memory that is writable (for a read) or readable (for a write)
    /// until the request has ended or this value is gone.
    pub unsafe fn push(
        &mut self,
        access: Access,
        file: &HostFile,
        iovecs: impl Iterator<Item = iovec>,
        offset: u64,
        tag: u64,
    ) -> bool {
        if !self.make_room() {
            return false;
        }
        let start = self.iovecs_used;
        for vec in iovecs {
            let Some(free) = self.iovecs.get_mut(self.iovecs_used) else {
                self.iovecs_used = start;
                return false;
            };
            *free = vec;
            self.iovecs_used += 1;
        }
        let fd = Fd(file.file().as_raw_fd());
        let vecs = self.iovecs.get(start..self.iovecs_used).unwrap_or_default();
        let entry = match vecs {
            [one] => {
                let one = *one;
                self.iovecs_used = start;
                self.single(access, fd, one, offset)
            }
            many => vectored(access, fd, many, offset),
        };
        // SAFETY: the caller vouches for the memory; the iovecs stay until the kernel has them.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(tag)) }.is_ok();
        self.in_flight += usize::from(pushed);
        pushed
    }

    /// Hands over what was added. Then, unless something has ended already, waits until something
    /// ends, an event is signalled or `timeout` passes.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.in_flight == 0 && !self.no_iowait {
            if !self.ring.submission().is_empty() {
                self.submit()?;
            }
            return self.wait_idle(timeout);
        }
        let mut flags = EnterFlags::GETEVENTS;
        if self.in_flight == 0 {
            flags |= EnterFlags::NO_IOWAIT;
        }
        self.enter(1, flags, timeout)
    }

    /// What has ended, one by one; does not wait.
    pub fn next(&mut self) -> Option<Ended> {
        self.take(false)
    }

    /// Waits while nothing but events can come.
    ///
    /// Inside of io_uring that would count as waiting for I/O with these kernels, and so all the
    /// time that a guest leaves its disk alone.
    fn wait_idle(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.ring.completion().is_empty() {
            return Ok(());
        }
        // SAFETY: the ring is open as long as this value lives.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, timeout.map(TimeSpec::from_duration), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Hands over what was added.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0, EnterFlags::GETEVENTS, None)
    }

    fn enter(
        &mut self,
        wanted: u32,
        flags: EnterFlags,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        let count = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
        let time = timeout.map(Timespec::from);
        let arguments = time.as_ref().map(|time| SubmitArgs::new().timespec(time));
        let flags = match &arguments {
            Some(_) => flags | EnterFlags::EXT_ARG,
            None => flags,
        };
        // SAFETY: the arguments are those that EXT_ARG asks for, and live here.
        let done = unsafe {
            let submitter = self.ring.submitter();
            submitter.enter(count, wanted, flags.bits(), arguments.as_ref())
        };
        if self.ring.submission().is_empty() {
            self.iovecs_used = 0;
        }
        match done {
            Ok(_) => Ok(()),
            // What was not handed over now will be the next time, after room was made for results.
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Makes room for one request more, if need be by handing over those that wait.
    fn make_room(&mut self) -> bool {
        let full = |this: &mut Self| {
            this.ring.submission().is_full() || this.iovecs_used >= this.iovecs.len() / 2
        };
        if full(self) && self.submit().is_err() {
            return false;
        }
        !full(self)
    }

    /// Has event `index` wake us, from now on.
    fn watch(&mut self, index: usize) -> io::Result<()> {
        let Some(fd) = self.events.get(index) else {
            return Ok(());
        };
        let entry = opcode::PollAdd::new(Fd(*fd), libc::POLLIN.cast_unsigned().into())
            .multi(true)
            .build()
            .user_data(EVENT | index as u64);
        // SAFETY: polling touches no memory of ours.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Takes the next result. Events have none, except failed ones if `all` are wanted.
    fn take(&mut self, all: bool) -> Option<Ended> {
        loop {
            let entry = self.ring.completion().next()?;
            let result = u32::try_from(entry.result()).map_err(|_| -entry.result());
            let ended = Ended {
                tag: entry.user_data(),
                result,
            };
            if ended.tag & EVENT == 0 {
                self.in_flight -= 1;
                return Some(ended);
            }
            if all && result.is_err() {
                return Some(ended);
            }
            if !io_uring::cqueue::more(entry.flags()) {
                // The kernel ends a poll when it has no room for results.
                let index = usize::try_from(ended.tag & !EVENT).unwrap_or(usize::MAX);
                if let Err(error) = self.watch(index) {
                    tracing::error!(%error, "Cannot wait for events of a disk");
                }
            }
        }
    }

    /// A request of one buffer.
    fn single(&self, access: Access, fd: Fd, vec: iovec, offset: u64) -> squeue::Entry {
        let (base, len) = (vec.iov_base.cast::<u8>(), vec.iov_len);
        // No single request is anywhere near this long.
        let bytes = u32::try_from(len).unwrap_or(u32::MAX);
        let buffer = self.buffers.iter().position(|(start, size)| {
            let within = base.addr().checked_sub(*start);
            within.is_some_and(|within| within <= *size && len <= *size - within)
        });
        let buffer = buffer.and_then(|buffer| u16::try_from(buffer).ok());
        match (access, buffer) {
            (Access::Read, Some(index)) => opcode::ReadFixed::new(fd, base, bytes, index)
                .offset(offset)
                .build(),
            (Access::Write, Some(index)) => opcode::WriteFixed::new(fd, base, bytes, index)
                .offset(offset)
                .build(),
            (Access::Read, None) => opcode::Read::new(fd, base, bytes).offset(offset).build(),
            (Access::Write, None) => opcode::Write::new(fd, base, bytes).offset(offset).build(),
        }
    }
}

fn vectored(access: Access, fd: Fd, vecs: &[iovec], offset: u64) -> squeue::Entry {
    let (at, count) = (vecs.as_ptr(), u32::try_from(vecs.len()).unwrap_or(0));
    match access {
        Access::Read => opcode::Readv::new(fd, at, count).offset(offset).build(),
        Access::Write => opcode::Writev::new(fd, at, count).offset(offset).build(),
    }
}

fn builder() -> Builder {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_cqsize(RESULTS).setup_clamp();
    builder.setup_r_disabled();
    builder
}

/// Lets an instance do what is done here and nothing else, as a system call filter does not see what
/// it is handed.
fn restrict(ring: &IoUring) -> io::Result<()> {
    const REGISTER_BUFFERS: u8 = 0;
    const REGISTER_RING_FDS: u8 = 20;
    const UNREGISTER_RING_FDS: u8 = 21;
    const ALL: [u8; 3] = [REGISTER_BUFFERS, REGISTER_RING_FDS, UNREGISTER_RING_FDS];
    let restricted = restrict_to(ring, &ALL);
    match restricted {
        // Before 5.18 there are none but the first, and a kernel refuses those that it does not know.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            restrict_to(ring, &[REGISTER_BUFFERS])?;
        }
        restricted => restricted?,
    }
    ring.submitter().register_enable_rings()
}

/// As [`restrict`], with what may be registered. The instance stays disabled.
fn restrict_to(ring: &IoUring, registered: &[u8]) -> io::Result<()> {
    let requests = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::ReadFixed::CODE,
        opcode::WriteFixed::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::PollAdd::CODE,
    ];
    let requests = requests.into_iter().map(Restriction::sqe_op);
    let registered = registered.iter().copied().map(Restriction::register_op);
    let mut all: Vec<_> = requests.chain(registered).collect();
    ring.submitter().register_restrictions(&mut all)
}

/// An instance of which results are made when we ask for them, rather than by interrupting us.
/// From 6.1 on; cannot be waited for from outside.
fn modern() -> io::Result<IoUring> {
    let mut builder = builder();
    builder.setup_single_issuer().setup_defer_taskrun();
    builder.build(ENTRIES)
}

/// An instance of which results are made at our next system call (from 5.19 on) or any time.
fn compatible() -> io::Result<IoUring> {
    let mut cooperative = builder();
    cooperative.setup_coop_taskrun();
    match cooperative.build(ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder().build(ENTRIES),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_what_disks_need_is_done() {
        for ring in [modern(), compatible()] {
            // Some hosts have none.
            let Ok(ring) = ring else { continue };
            let mut uring = Uring::with(ring, &[]).unwrap();
            let (family, kind) = (libc::AF_UNIX, libc::SOCK_STREAM);
            let entries = [
                opcode::Socket::new(family, kind, 0).build(),
                opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/".as_ptr()).build(),
                opcode::Nop::new().build(),
            ];
            for entry in entries {
                // SAFETY: the one path lives in the program.
                unsafe { uring.ring.submission().push(&entry.user_data(1)) }.unwrap();
                uring.ring.submit_and_wait(1).unwrap();
                let result = uring.ring.completion().next().unwrap().result();
                assert_eq!(result, -libc::EACCES);
            }
            assert!(uring.ring.submitter().register_files(&[0]).is_err());
        }
    }
}
