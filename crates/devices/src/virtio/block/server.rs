//! Serving one queue: from chains to requests of the engine and back.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use edgevmm_block::engine::{Aio, Ending, Engine, Helpers, Operation, Request};
use edgevmm_block::{Access, BlockBackend, BlockError, SECTOR_SIZE};
use libc::iovec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::limiter::{Cost, Limiter};
use super::policy::{ErrorPolicy, Verdict};
use super::request::{Command, FLUSH, Terms};
use super::worker::Stopped;
use crate::GuestMemory;
use crate::platform::MachineControl;
use crate::virtio::DriverError;
use crate::virtio::ring::{Chain, Ring};

/// Bytes of a serial number, padded with zeroes.
pub(super) const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Bytes of reads and writes under way at which no more are begun: a reset has to wait for them.
const IN_FLIGHT_MAX: u64 = 64 << 20;

/// Requests that are begun before a look at those that have ended.
const BATCH: usize = 64;

/// A request that is done may wait this long for others, to be told of together.
const GATHER: Duration = Duration::from_micros(30);

/// What all queues of a disk have in common.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) name: Arc<str>,
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) helpers: Arc<Helpers>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) aio: Aio,
    pub(super) serial: [u8; SERIAL_LEN],
    /// The driver accepted flush. Otherwise it doesn't know that it has to (5.2.6.2).
    pub(super) flush: bool,
    /// Writes may stay in the host's cache until the guest flushes.
    pub(super) writeback: Arc<AtomicBool>,
    /// The driver accepted discard.
    pub(super) discard: bool,
    /// The driver accepted write zeroes.
    pub(super) write_zeroes: bool,
    pub(super) limiter: Option<Arc<Limiter>>,
    pub(super) policy: ErrorPolicy,
    pub(super) control: Arc<dyn MachineControl>,
    /// Counts how often requests that were kept shall be tried again.
    pub(super) retries: Arc<AtomicU32>,
}

/// A chain that was taken, and what has become of it.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    command: Command,
    /// Bytes that count as in flight.
    bytes: u64,
    /// It is done, and what it changed is being made durable.
    flushing: bool,
}

/// When to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// At once: there may be more.
    Now,
    /// When something happens.
    Event,
    /// Then too, but no later.
    After(Duration),
}

/// Serves one queue.
#[derive(Debug)]
pub(super) struct Server {
    // Goes first: it waits for requests that use the slots' memory.
    engine: Engine,
    ring: Ring,
    setup: Setup,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slots whose requests have failed and are kept, in the order in which they failed.
    kept: Vec<usize>,
    retries_seen: u32,
    in_flight: u64,
    /// When the first of the requests was done that the driver was not told of.
    done_since: Option<Instant>,
}

impl Server {
    /// A server for the calling thread, to be woken by `wake` when something has changed.
    ///
    /// # Errors
    /// There are no more files to be had; the ring is given back.
    pub(super) fn new(ring: Ring, setup: Setup, wake: &EventFd) -> Result<Self, (io::Error, Ring)> {
        let events = [borrow(ring.kick()), borrow(wake)];
        let engine = Engine::new(
            Arc::clone(&setup.backend),
            Arc::clone(&setup.helpers),
            setup.aio,
            &events,
            ring.halt_flag(),
        );
        let mut engine = match engine {
            Ok(engine) => engine,
            Err(error) => return Err((error, ring)),
        };
        if let Some(regions) = pinned(&setup.memory) {
            // SAFETY: the ring keeps guest memory mapped, and goes after the engine.
            unsafe { engine.register_memory(&regions) };
        }
        Ok(Self {
            engine,
            retries_seen: setup.retries.load(Ordering::Acquire),
            ring,
            setup,
            slots: Vec::new(),
            free: Vec::new(),
            kept: Vec::new(),
            in_flight: 0,
            done_since: None,
        })
    }

    /// Serves until the device is halted; first the chains of `kept`.
    pub(super) fn run(mut self, kept: &[u16]) -> Stopped {
        if let Err(cause) = self.take_kept(kept).and_then(|()| self.serve()) {
            self.ring.fail(&cause);
        }
        self.drain();
        // Halted by itself, it still has to wait for the device to take the queue back.
        let heads = |slot: &usize| self.slots.get(*slot).map(|slot| slot.chain.head());
        Stopped {
            kept: self.kept.iter().filter_map(heads).collect(),
            queue: self.ring.into_queue(),
        }
    }

    fn serve(&mut self) -> Result<(), DriverError> {
        while !self.ring.halted() {
            while let Some((slot, ending)) = self.engine.ended() {
                self.end(slot, ending)?;
            }
            self.tell()?;
            self.try_again()?;
            let next = self.take()?;
            self.tell()?;
            let waited = match next {
                Next::Now => self.engine.hand_over(),
                Next::Event => self.engine.wait(None),
                Next::After(time) => self.engine.wait(Some(time)),
            };
            if let Err(error) = waited {
                tracing::error!(%error, "Cannot wait for block requests; the queue stops");
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits for all requests under way. Those given up halfway are kept.
    fn drain(&mut self) {
        while self.engine.is_busy() {
            let Some((slot, ending)) = self.engine.ended() else {
                if let Err(error) = self.engine.wait(None) {
                    tracing::error!(%error, "Cannot wait for the last block requests");
                    std::thread::sleep(GATHER);
                }
                continue;
            };
            if let Err(cause) = self.end(slot, ending) {
                self.ring.fail(&cause);
            }
        }
        if let Err(cause) = self.tell() {
            self.ring.fail(&cause);
        }
    }

    /// Begins what the driver has made available, as far as that may be.
    fn take(&mut self) -> Result<Next, DriverError> {
        let mut left = BATCH;
        loop {
            self.ring.disable_kicks()?;
            loop {
                // What was begun is handed over and what is done is told in between, however many
                // there are.
                if left == 0 {
                    return Ok(Next::Now);
                }
                left -= 1;
                if self.ring.halted() || !self.kept.is_empty() || self.in_flight >= IN_FLIGHT_MAX {
                    return Ok(Next::Event);
                }
                let Some(slot) = self.free_slot() else {
                    return Ok(Next::Event);
                };
                if !self.pop(slot)? {
                    break;
                }
                if let Err(wait) = self.admit(slot) {
                    self.release(slot);
                    self.ring.undo_pop(1);
                    return Ok(Next::After(wait));
                }
                if self
                    .done_since
                    .is_some_and(|since| since.elapsed() >= GATHER)
                {
                    self.tell()?;
                }
                self.start(slot)?;
            }
            if !self.ring.enable_kicks()? {
                return Ok(Next::Event);
            }
        }
    }

    /// A slot that is not in use; none if there are as many requests as the queue holds.
    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() >= usize::from(self.ring.size()) {
            return None;
        }
        self.slots.push(Slot {
            chain: self.ring.new_chain(),
            command: Command::Nothing,
            bytes: 0,
            flushing: false,
        });
        Some(self.slots.len() - 1)
    }

    fn release(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            self.in_flight -= std::mem::take(&mut slot.bytes);
            slot.flushing = false;
            self.free.push(index);
        }
    }

    /// Takes the next chain into a slot, which is free again if there is none.
    fn pop(&mut self, index: usize) -> Result<bool, DriverError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(false);
        };
        if !self.ring.pop(&mut slot.chain)? {
            self.free.push(index);
            return Ok(false);
        }
        slot.command = Command::read(&mut slot.chain, &self.setup.terms())?;
        Ok(true)
    }

    /// Asks the limiter whether the request in a slot may begin.
    fn admit(&self, index: usize) -> Result<(), Duration> {
        let (Some(limiter), Some(slot)) = (&self.setup.limiter, self.slots.get(index)) else {
            return Ok(());
        };
        let Command::Disk(request) = slot.command else {
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

    /// Begins the request in a slot.
    fn start(&mut self, index: usize) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        match slot.command {
            Command::Disk(request) => self.begin(index, request),
            Command::GetId => {
                let written = slot.chain.writable.copy_in(&self.setup.serial) as u64;
                self.answer(index, VIRTIO_BLK_S_OK, written)
            }
            Command::Nothing => self.answer(index, VIRTIO_BLK_S_OK, 0),
            Command::Unsupported => self.answer(index, VIRTIO_BLK_S_UNSUPP, 0),
            Command::Invalid(reason) => {
                // What a guest can cause at will must not fill the host's log.
                tracing::debug!(device = &*self.setup.name, "Request refused: {reason}");
                self.answer(index, VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    fn begin(&mut self, index: usize, request: Request) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let memory = match request.operation {
            Operation::Read => slot.chain.writable.slices(),
            Operation::Write => slot.chain.readable.slices(),
            _ => &[],
        };
        let more = self.ring.has_more();
        // SAFETY: it is guest memory, which the ring keeps mapped until the engine is gone.
        let ended = unsafe { self.engine.begin(index, request, memory, more) };
        match ended {
            Some(result) => self.end(index, Ending::Done(result)),
            None => {
                if !memory.is_empty() {
                    slot.bytes = request.len;
                    self.in_flight += request.len;
                }
                Ok(())
            }
        }
    }

    /// Takes up how the request in a slot has ended.
    fn end(&mut self, index: usize, ending: Ending) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let result = match (ending, slot.command) {
            (Ending::Done(result), _) => result,
            (Ending::Unfinished, Command::Disk(request)) => match request.operation {
                Operation::Read => {
                    let memory = slot.chain.writable.slices();
                    self.engine.call(Access::Read, request.offset, memory)
                }
                _ => {
                    let memory = slot.chain.readable.slices();
                    self.engine.call(Access::Write, request.offset, memory)
                }
            },
            (Ending::Unfinished, _) => Ok(()),
        };
        match result {
            Ok(()) if slot.command.is_change() && !slot.flushing && self.setup.writes_through() => {
                slot.flushing = true;
                self.begin(index, FLUSH)
            }
            Ok(()) => self.succeed(index),
            Err(BlockError::Cancelled) => {
                self.keep(index);
                Ok(())
            }
            Err(error) => self.fail(index, &error),
        }
    }

    fn succeed(&mut self, index: usize) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get(index) else {
            return Ok(());
        };
        let written = match slot.command {
            Command::Disk(Request {
                operation: Operation::Read,
                len,
                ..
            }) => len,
            _ => 0,
        };
        self.answer(index, VIRTIO_BLK_S_OK, written)
    }

    fn fail(&mut self, index: usize, error: &BlockError) -> Result<(), DriverError> {
        let device = &*self.setup.name;
        match self.setup.policy.judge(error) {
            Verdict::Stop => {
                let text = with_causes(error);
                tracing::warn!(device, error = %text, "Request failed; the machine has to wait");
                if self.kept.is_empty() {
                    self.setup.control.pause(format!("{device}: {text}"));
                }
                self.keep(index);
                Ok(())
            }
            Verdict::Ignore => {
                let error: &dyn std::error::Error = error;
                tracing::warn!(device, error, "Request failed; the guest is not told");
                self.succeed(index)
            }
            Verdict::Report => {
                let error: &dyn std::error::Error = error;
                if matches!(
                    error.downcast_ref(),
                    Some(BlockError::Io { .. } | BlockError::Flush(_))
                ) {
                    tracing::warn!(device, error, "Request failed");
                } else {
                    tracing::debug!(device, error, "Request refused");
                }
                self.answer(index, VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    /// Keeps a request that was begun, to be tried again.
    fn keep(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            self.in_flight -= std::mem::take(&mut slot.bytes);
            slot.flushing = false;
            self.kept.push(index);
        }
    }

    /// Begins requests that were kept once more, if somebody has asked for it.
    fn try_again(&mut self) -> Result<(), DriverError> {
        let retries = self.setup.retries.load(Ordering::Acquire);
        if retries == self.retries_seen {
            return Ok(());
        }
        self.retries_seen = retries;
        for index in std::mem::take(&mut self.kept) {
            self.start(index)?;
        }
        Ok(())
    }

    /// Takes chains that were taken before the queue came here.
    fn take_kept(&mut self, heads: &[u16]) -> Result<(), DriverError> {
        for head in heads {
            let Some(index) = self.free_slot() else {
                return Err(DriverError::Chain(
                    "more of them are kept than there can be",
                ));
            };
            let Some(slot) = self.slots.get_mut(index) else {
                return Ok(());
            };
            self.ring.take(*head, &mut slot.chain)?;
            slot.command = Command::read(&mut slot.chain, &self.setup.terms())?;
            self.kept.push(index);
        }
        for index in std::mem::take(&mut self.kept) {
            self.start(index)?;
        }
        Ok(())
    }

    /// Returns a chain with its status. `written` counts from the front of its writable part.
    fn answer(&mut self, index: usize, status: u32, written: u64) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get(index) else {
            return Ok(());
        };
        slot.chain
            .write_status(u8::try_from(status).unwrap_or(u8::MAX));
        // The used length counts from the front without gaps, so it covers the status byte only
        // if all before it was written.
        let left = match slot.command {
            Command::GetId => slot.chain.writable.bytes(),
            _ => slot.chain.writable.bytes() - written.min(slot.chain.writable.bytes()),
        };
        let used = if left == 0 {
            written.saturating_add(1)
        } else {
            written
        };
        let head = slot.chain.head();
        self.ring
            .stage_used(head, u32::try_from(used).unwrap_or(u32::MAX))?;
        self.done_since.get_or_insert_with(Instant::now);
        self.release(index);
        Ok(())
    }

    /// Tells the driver of all that is done.
    fn tell(&mut self) -> Result<(), DriverError> {
        if self.done_since.take().is_some() {
            self.ring.publish_used()?;
            self.ring.notify()?;
        }
        Ok(())
    }
}

impl Setup {
    fn terms(&self) -> Terms {
        Terms {
            sectors: self.backend.size() / SECTOR_SIZE,
            discard: self.discard,
            write_zeroes: self.write_zeroes,
        }
    }

    fn writes_through(&self) -> bool {
        !(self.flush && self.writeback.load(Ordering::Acquire))
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
