//! The thread that does what would keep a queue waiting: flushes, discards, zeroing.
//!
//! Flushes go through it, rather than through io_uring, because several must not be under way on
//! one file: Linux tells only one of them of an error in writing back. The kernel would need a
//! thread for each as well.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Operation, Request};
use crate::{BlockBackend, BlockError};

/// Bytes of a discard or zeroing that are done without a look at whether it is still wanted.
const PART: u64 = 32 << 20;
/// Enough for a nested image format; only touched pages cost memory.
const STACK_SIZE: usize = 256 << 10;

/// Does slow requests of a disk on a thread of its own, one after the other.
///
/// The thread is there from the first request on.
#[derive(Debug)]
pub struct Helper {
    name: String,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    backend: Arc<dyn BlockBackend>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// A request, and who wants to know of its end.
#[derive(Debug)]
pub struct Job {
    pub token: usize,
    pub request: Request,
    pub cancelled: Arc<AtomicBool>,
    pub mailbox: Arc<Mailbox>,
}

impl Helper {
    /// A helper for `backend`, its thread to be called `name`.
    pub fn new(name: String, backend: Arc<dyn BlockBackend>) -> Self {
        Self {
            name,
            shared: Arc::new(Shared {
                backend,
                queue: Mutex::default(),
                changed: Condvar::new(),
            }),
            thread: Mutex::default(),
        }
    }

    /// Takes a request. Its result comes to the mailbox, unless it is returned: then there is no
    /// thread to be had, and it was done here.
    pub fn post(&self, job: Job) -> Option<Result<(), BlockError>> {
        if let Err(error) = self.start() {
            tracing::warn!(%error, "There is no thread for slow disk requests");
            return Some(perform(&*self.shared.backend, &job));
        }
        lock(&self.shared.queue).jobs.push_back(job);
        self.shared.changed.notify_one();
        None
    }

    fn start(&self) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = Builder::new()
                .name(self.name.clone())
                .stack_size(STACK_SIZE);
            *thread = Some(builder.spawn(move || shared.run())?);
        }
        Ok(())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.changed.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            let result = perform(&*self.backend, &job);
            job.mailbox.put(job.token, result);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn perform(backend: &dyn BlockBackend, job: &Job) -> Result<(), BlockError> {
    let Request {
        operation,
        offset,
        len,
    } = job.request;
    let part: &dyn Fn(u64, u64) -> Result<(), BlockError> = match operation {
        Operation::Flush => return backend.flush(),
        Operation::Discard => &|offset, len| backend.discard(offset, len),
        Operation::WriteZeroes { may_unmap } => {
            &move |offset, len| backend.write_zeroes(offset, len, may_unmap)
        }
        Operation::Read | Operation::Write => return Err(BlockError::Cancelled),
    };
    let mut at = offset;
    let end = offset.saturating_add(len);
    while at < end {
        if job.cancelled.load(Ordering::Acquire) {
            return Err(BlockError::Cancelled);
        }
        let stop = (at / PART + 1).saturating_mul(PART).min(end);
        part(at, stop - at)?;
        at = stop;
    }
    Ok(())
}

/// Results for one engine.
#[derive(Debug)]
pub struct Mailbox {
    results: Mutex<Vec<(usize, Result<(), BlockError>)>>,
    /// Whether there are any, so that looking costs no lock.
    filled: AtomicBool,
    /// Signalled when one comes.
    event: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            results: Mutex::default(),
            filled: AtomicBool::new(false),
            event: EventFd::from_flags(flags)?,
        })
    }

    pub fn event(&self) -> impl AsFd {
        self.event.as_fd()
    }

    fn put(&self, token: usize, result: Result<(), BlockError>) {
        let mut results = lock(&self.results);
        results.push((token, result));
        self.filled.store(true, Ordering::Release);
        drop(results);
        // A counter this small can't be full.
        let _ = self.event.write(1);
    }

    pub fn take(&self) -> Option<(usize, Result<(), BlockError>)> {
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
