//! The requests of one queue on their way through an [`Engine`]: what is under way, what is made
//! durable, and what is kept because the host has failed it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use edgevmm_block::engine::{Aio, Ending, Engine, Helpers, Operation, Request};
use edgevmm_block::{Access, BlockBackend, BlockError, VolatileSlice};
use libc::iovec;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::limiter::{Cost, Limiter};
use super::policy::{ErrorPolicy, Verdict};
use crate::GuestMemory;
use crate::platform::MachineControl;

/// Bytes of reads and writes under way at which no more are begun: a reset has to wait for them.
const IN_FLIGHT_MAX: u64 = 64 << 20;

/// A flush, of all of the disk.
pub(crate) const FLUSH: Request = Request {
    operation: Operation::Flush,
    offset: 0,
    len: 0,
};

/// What all queues of a disk have in common.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    /// Name of the disk, for messages.
    pub(crate) name: Arc<str>,
    pub(crate) backend: Arc<dyn BlockBackend>,
    pub(crate) helpers: Arc<Helpers>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) aio: Aio,
    pub(crate) limiter: Option<Arc<Limiter>>,
    pub(crate) policy: ErrorPolicy,
    pub(crate) control: Arc<dyn MachineControl>,
    /// Counts how often requests that were kept shall be tried again.
    pub(crate) retries: Arc<AtomicU32>,
}

/// How long to wait for something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Not at all: there may be more.
    Now,
    /// Until something happens.
    Event,
    /// Until then too, but no longer.
    After(Duration),
}

/// A request that was begun.
#[derive(Debug, Clone, Copy)]
struct Job {
    request: Request,
    /// What it changes is made durable before it is done.
    durable: bool,
    /// Bytes that count as in flight.
    bytes: u64,
    /// It is done, and what it changed is being made durable.
    flushing: bool,
}

/// Requests under way, by a small number each; belongs to the thread that made it.
#[derive(Debug)]
pub(crate) struct Jobs {
    engine: Engine,
    terms: Terms,
    jobs: Vec<Job>,
    /// Those that have failed and are kept, in the order in which they failed.
    kept: Vec<usize>,
    retries_seen: u32,
    in_flight: u64,
}

impl Jobs {
    /// Of the calling thread, which is woken by `events`. Setting `halt` has long requests end
    /// early.
    ///
    /// # Errors
    /// There are no more files to be had.
    pub(crate) fn new(
        terms: Terms,
        events: &[&EventFd],
        halt: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let events: Vec<_> = events.iter().map(|event| borrow(event)).collect();
        let mut engine = Engine::new(
            Arc::clone(&terms.backend),
            Arc::clone(&terms.helpers),
            terms.aio,
            &events,
            halt,
        )?;
        if let Some(regions) = pinned(&terms.memory) {
            // SAFETY: the terms keep guest memory mapped, and go after the engine.
            unsafe { engine.register_memory(&regions) };
        }
        Ok(Self {
            engine,
            retries_seen: terms.retries.load(Ordering::Acquire),
            terms,
            jobs: Vec::new(),
            kept: Vec::new(),
            in_flight: 0,
        })
    }

    /// Whether another request may begin now, as far as those under way are concerned.
    pub(crate) fn has_room(&self) -> bool {
        self.kept.is_empty() && self.in_flight < IN_FLIGHT_MAX
    }

    /// Asks the limits whether a request may begin, or how long it has to wait.
    ///
    /// # Errors
    /// For how long it has to wait.
    pub(crate) fn admit(&self, request: &Request) -> Result<(), Duration> {
        let Some(limiter) = &self.terms.limiter else {
            return Ok(());
        };
        let (write, bytes) = match request.operation {
            Operation::Read => (false, request.len),
            Operation::Write => (true, request.len),
            Operation::Discard | Operation::WriteZeroes { .. } => (true, 0),
            Operation::Flush => return Ok(()),
        };
        limiter.admit(Cost { write, bytes })
    }

    /// Begins a request under `token`. Returns how it has ended for the driver, if it has. `more`
    /// says that others wait to be begun.
    ///
    /// # Safety
    /// The memory must stay mapped until the request has ended.
    pub(crate) unsafe fn begin(
        &mut self,
        token: usize,
        request: Request,
        durable: bool,
        memory: &[VolatileSlice<'_>],
        more: bool,
    ) -> Option<Result<(), BlockError>> {
        let job = Job {
            request,
            durable,
            bytes: 0,
            flushing: false,
        };
        if self.jobs.len() <= token {
            self.jobs.resize(token + 1, job);
        }
        if let Some(place) = self.jobs.get_mut(token) {
            *place = job;
        }
        // SAFETY: the caller vouches for the memory.
        let ended = unsafe { self.engine.begin(token, request, memory, more) };
        if let Some(result) = ended {
            return self.finish(token, Ending::Done(result), memory);
        }
        if !memory.is_empty()
            && let Some(job) = self.jobs.get_mut(token)
        {
            job.bytes = request.len;
            self.in_flight += request.len;
        }
        None
    }

    /// Takes a request of which the engine has told the end. It goes to [`Jobs::finish`].
    pub(crate) fn ended(&mut self) -> Option<(usize, Ending)> {
        self.engine.ended()
    }

    /// Takes up how a request has ended, whose memory is `memory`. Returns what the driver is to
    /// be told; nothing if that isn't known yet.
    pub(crate) fn finish(
        &mut self,
        token: usize,
        ending: Ending,
        memory: &[VolatileSlice<'_>],
    ) -> Option<Result<(), BlockError>> {
        let mut ending = ending;
        loop {
            let job = self.jobs.get_mut(token)?;
            let request = job.request;
            let result = match ending {
                Ending::Done(result) => result,
                Ending::Unfinished => {
                    let access = match request.operation {
                        Operation::Read => Access::Read,
                        _ => Access::Write,
                    };
                    self.engine.call(access, request.offset, memory)
                }
            };
            match result {
                Ok(()) if job.durable && !job.flushing => {
                    job.flushing = true;
                    // SAFETY: a flush has no memory.
                    ending = Ending::Done(unsafe { self.engine.begin(token, FLUSH, &[], false) }?);
                }
                Ok(()) => {
                    self.release(token);
                    return Some(Ok(()));
                }
                Err(BlockError::Cancelled) => {
                    self.keep(token);
                    return None;
                }
                Err(error) => return self.judge(token, error),
            }
        }
    }

    fn judge(&mut self, token: usize, error: BlockError) -> Option<Result<(), BlockError>> {
        let device = &*self.terms.name;
        let cause: &dyn std::error::Error = &error;
        match self.terms.policy.judge(&error) {
            Verdict::Stop => {
                let text = with_causes(cause);
                tracing::warn!(device, error = %text, "Request failed; the machine has to wait");
                if self.kept.is_empty() {
                    self.terms.control.pause(format!("{device}: {text}"));
                }
                self.keep(token);
                return None;
            }
            Verdict::Ignore => {
                tracing::warn!(
                    device,
                    error = cause,
                    "Request failed; the guest is not told"
                );
                self.release(token);
                return Some(Ok(()));
            }
            // What a guest can cause at will must not fill the host's log.
            Verdict::Report if matches!(error, BlockError::Io { .. } | BlockError::Flush(_)) => {
                tracing::warn!(device, error = cause, "Request failed");
            }
            Verdict::Report => tracing::debug!(device, error = cause, "Request refused"),
        }
        self.release(token);
        Some(Err(error))
    }

    fn release(&mut self, token: usize) {
        if let Some(job) = self.jobs.get_mut(token) {
            self.in_flight -= std::mem::take(&mut job.bytes);
        }
    }

    fn keep(&mut self, token: usize) {
        self.release(token);
        self.kept.push(token);
    }

    /// The requests that are kept, to be begun anew.
    pub(crate) fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// Gives the requests back that are kept, if somebody has asked for another try.
    pub(crate) fn take_retries(&mut self) -> Vec<usize> {
        let retries = self.terms.retries.load(Ordering::Acquire);
        if retries == self.retries_seen {
            return Vec::new();
        }
        self.retries_seen = retries;
        std::mem::take(&mut self.kept)
    }

    /// Whether requests are under way; those that are kept are not.
    pub(crate) fn is_busy(&self) -> bool {
        self.engine.is_busy()
    }

    /// Hands over what was begun, and waits as long as is said.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub(crate) fn wait(&mut self, next: Next) -> io::Result<()> {
        match next {
            Next::Now => self.engine.hand_over(),
            Next::Event => self.engine.wait(None),
            Next::After(time) => self.engine.wait(Some(time)),
        }
    }
}

/// Guest memory, if all of it is pinned because it is huge pages.
fn pinned(memory: &GuestMemory) -> Option<Vec<iovec>> {
    memory
        .iter()
        .map(|region| {
            let huge = region.is_hugetlbfs() == Some(true);
            huge.then(|| iovec {
                iov_base: region.as_ptr().cast(),
                iov_len: region.size(),
            })
        })
        .collect()
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the borrow lasts.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// An error with what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
