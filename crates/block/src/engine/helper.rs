//! Threads of a disk that do what would keep a queue waiting.
//!
//! One does flushes, discards and zeroing. Flushes go through it, rather than through io_uring,
//! because several must not be under way on one file: Linux tells only one of them of an error in
//! writing back. The kernel would need a thread for each as well. Others do reads and writes that
//! io_uring can't do, such as of compressed data, when there are several at a time. Writes that
//! find no place yet have one thread for themselves where they would wait for each other anyway,
//! and it does those that lie side by side as one ([`Batch`]).

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use edgevmm_sandbox::{Kind as Confined, enter, threads};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::batch::Batch;
use super::{Operation, Request};
use crate::{BlockBackend, BlockError, VolatileSlice};

/// Threads for reads and writes.
const TRANSFERS_MAX: usize = 4;
/// Bytes of a discard or zeroing that are done without a look at whether it is still wanted.
const PART: u64 = 32 << 20;
/// How long a thread waits for more to do before it ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests that there is room for from the start, so that none needs memory.
const USUAL: usize = 64;
/// As much as the threads of queues have; only touched pages cost memory.
const STACK_SIZE: usize = 512 << 10;

/// Does slow requests of a disk on threads that are there only while there is something to do.
#[derive(Debug)]
pub struct Helpers {
    slow: Arc<Crew>,
    transfers: Arc<Crew>,
    new_data: Arc<Crew>,
}

/// What a request is, as far as it matters to who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A flush, discard or zeroing.
    Long,
    /// A read, or a write to a place that is there.
    Transfer,
    /// A write to where there may be no place yet.
    NewData,
}

/// Threads that take requests from one queue.
#[derive(Debug)]
struct Crew {
    name: String,
    most: usize,
    backend: Arc<dyn BlockBackend>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that have not ended.
    threads: usize,
    /// Those that wait for something to do.
    idle: usize,
    handles: Vec<JoinHandle<()>>,
    closed: bool,
}

/// The memory of a request.
#[derive(Debug, Default)]
pub struct Memory(Vec<VolatileSlice<'static>>);

// SAFETY: a slice is a pointer and a length, and whoever made it one vouches for the memory.
unsafe impl Send for Memory {}

impl Memory {
    /// None, with room for so many pieces.
    pub fn with_capacity(pieces: usize) -> Self {
        Self(Vec::with_capacity(pieces))
    }

    /// Takes `bufs` in place of what was there.
    ///
    /// # Safety
    /// The memory must stay mapped for as long as this value has it.
    pub unsafe fn set(&mut self, bufs: &[VolatileSlice<'_>]) {
        self.0.clear();
        self.0.extend(bufs.iter().map(|buf| {
            // SAFETY: the memory outlives this value's hold of it, as the caller vouches.
            unsafe { VolatileSlice::new(buf.ptr_guard_mut().as_ptr(), buf.len()) }
        }));
    }

    /// Has the memory of `other` as well, for no longer than that has it.
    pub fn append(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// The memory.
    pub fn slices(&self) -> &[VolatileSlice<'_>] {
        &self.0
    }

    /// Lets go of it.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// A request, and who wants to know of its end.
#[derive(Debug)]
pub struct Job {
    pub token: usize,
    pub request: Request,
    pub memory: Memory,
    pub cancelled: Arc<AtomicBool>,
    pub mailbox: Arc<Mailbox>,
}

impl Job {
    /// Whether nobody wants it done any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Tells whoever posted it how it has ended.
    pub fn tell(self, result: Result<(), BlockError>) {
        self.mailbox.put(self.token, result, self.memory);
    }
}

impl Helpers {
    /// Helpers for `backend`; the names of their threads begin with `name`.
    pub fn new(name: &str, backend: &Arc<dyn BlockBackend>) -> Self {
        let crew = |what, most| {
            Arc::new(Crew {
                name: format!("{name}-{what}"),
                most,
                backend: Arc::clone(backend),
                queue: Mutex::new(Queue {
                    jobs: VecDeque::with_capacity(USUAL),
                    ..Queue::default()
                }),
                changed: Condvar::new(),
            })
        };
        Self {
            slow: crew("slow", 1),
            transfers: crew("io", TRANSFERS_MAX),
            new_data: crew(
                "new",
                if backend.new_data_waits() {
                    1
                } else {
                    TRANSFERS_MAX
                },
            ),
        }
    }

    /// Takes a request. Its result comes to the mailbox, unless it is returned: then there is no
    /// thread to be had, and it was done here.
    pub fn post(&self, kind: Kind, job: Job) -> Option<Result<(), BlockError>> {
        match kind {
            Kind::Long => self.slow.post(job),
            Kind::Transfer => self.transfers.post(job),
            Kind::NewData => self.new_data.post(job),
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        for crew in [&self.slow, &self.transfers, &self.new_data] {
            let handles = {
                let mut queue = lock(&crew.queue);
                queue.closed = true;
                mem::take(&mut queue.handles)
            };
            crew.changed.notify_all();
            for handle in handles {
                let _ = handle.join();
            }
        }
    }
}

impl Crew {
    fn post(self: &Arc<Self>, job: Job) -> Option<Result<(), BlockError>> {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.jobs.len() <= queue.idle || queue.threads >= self.most {
            let sleepers = queue.idle > 0;
            drop(queue);
            if sleepers {
                self.changed.notify_one();
            }
            return None;
        }
        let Err(error) = self.start(&mut queue) else {
            return None;
        };
        if queue.threads > 0 {
            return None;
        }
        let job = queue.jobs.pop_back()?;
        drop(queue);
        tracing::warn!(%error, "There is no thread for slow disk requests");
        Some(perform(&*self.backend, &job))
    }

    fn start(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        let crew = Arc::clone(self);
        let handle = threads::spawn(self.name.clone(), STACK_SIZE, move || {
            enter(Confined::DiskHelper);
            crew.run();
        })?;
        queue.handles.retain(|handle| !handle.is_finished());
        queue.handles.push(handle);
        queue.threads += 1;
        Ok(())
    }

    fn run(&self) {
        let mut batch = Batch::new();
        while self.next(&mut batch) {
            batch.perform(&*self.backend);
        }
    }

    /// Waits for requests; none come any more if the thread shall end.
    fn next(&self, batch: &mut Batch) -> bool {
        let mut queue = lock(&self.queue);
        let mut waited = false;
        loop {
            if !queue.jobs.is_empty() {
                batch.take(&mut queue.jobs);
                return true;
            }
            if queue.closed || waited {
                queue.threads -= 1;
                return false;
            }
            queue.idle += 1;
            let woken = self.changed.wait_timeout(queue, PATIENCE);
            let (guard, timeout) = woken.unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            queue.idle -= 1;
            waited = timeout.timed_out();
        }
    }
}

pub fn perform(backend: &dyn BlockBackend, job: &Job) -> Result<(), BlockError> {
    let Request {
        operation,
        offset,
        len,
    } = job.request;
    if job.is_cancelled() && operation != Operation::Flush {
        return Err(BlockError::Cancelled);
    }
    let part: &dyn Fn(u64, u64) -> Result<(), BlockError> = match operation {
        Operation::Flush => return backend.flush(),
        Operation::Discard => &|offset, len| backend.discard(offset, len),
        Operation::WriteZeroes { may_unmap } => {
            &move |offset, len| backend.write_zeroes(offset, len, may_unmap)
        }
        Operation::Read => return backend.read_vectored(&job.memory.0, offset),
        Operation::Write => return backend.write_vectored(&job.memory.0, offset),
    };
    let mut at = offset;
    let end = offset.saturating_add(len);
    while at < end {
        if job.is_cancelled() {
            return Err(BlockError::Cancelled);
        }
        let stop = (at / PART + 1).saturating_mul(PART).min(end);
        part(at, stop - at)?;
        at = stop;
    }
    Ok(())
}

/// A request's token, how it went, and its memory.
type Answer = (usize, Result<(), BlockError>, Memory);

/// Results for one engine.
#[derive(Debug)]
pub struct Mailbox {
    results: Mutex<Vec<Answer>>,
    /// Whether there are any, so that looking costs no lock.
    filled: AtomicBool,
    /// Signalled when one comes.
    event: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            results: Mutex::new(Vec::with_capacity(USUAL)),
            filled: AtomicBool::new(false),
            event: EventFd::from_flags(flags)?,
        })
    }

    pub fn event(&self) -> impl AsFd {
        self.event.as_fd()
    }

    fn put(&self, token: usize, result: Result<(), BlockError>, memory: Memory) {
        let mut results = lock(&self.results);
        // Whoever has not taken those that are there will look again before waiting.
        let awaited = results.is_empty();
        results.push((token, result, memory));
        self.filled.store(true, Ordering::Release);
        drop(results);
        if awaited {
            // A counter this small can't be full.
            let _ = self.event.write(1);
        }
    }

    pub fn take(&self) -> Option<Answer> {
        if !self.filled.load(Ordering::Acquire) {
            return None;
        }
        let mut results = lock(&self.results);
        let taken = results.pop();
        if results.is_empty() {
            self.filled.store(false, Ordering::Release);
        }
        taken
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
