//! Serving one queue: from chains to requests of the engine and back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use edgevmm_block::engine::{Ending, Operation, Request};
use edgevmm_block::{BlockError, SECTOR_SIZE, VolatileSlice};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vmm_sys_util::eventfd::EventFd;

use super::patience::Patience;
use super::request::{self, Command};
use super::worker::Stopped;
use crate::disk::jobs::{Jobs, Next, Terms};
use crate::virtio::DriverError;
use crate::virtio::ring::{Chain, Ring};

/// Bytes of a serial number, padded with zeroes.
pub(super) const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Requests that are begun before a look at those that have ended.
const BATCH: usize = 64;

/// A request that is done may wait this long for others, to be told of together.
const GATHER: Duration = Duration::from_micros(30);

/// What all queues of a disk have in common.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) terms: Terms,
    pub(super) serial: [u8; SERIAL_LEN],
    /// The driver accepted flush. Otherwise it doesn't know that it has to (5.2.6.2).
    pub(super) flush: bool,
    /// Writes may stay in the host's cache until the guest flushes.
    pub(super) writeback: Arc<AtomicBool>,
    /// The driver accepted discard.
    pub(super) discard: bool,
    /// The driver accepted write zeroes.
    pub(super) write_zeroes: bool,
    /// Queues' threads may poll their rings.
    pub(super) polls: bool,
}

/// A chain that was taken, and what it asks for.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    command: Command,
}

impl Slot {
    /// The memory of a read or write.
    fn memory(&self) -> &[VolatileSlice<'_>] {
        match self.command {
            Command::Disk(request) => match request.operation {
                Operation::Read => self.chain.writable.slices(),
                Operation::Write => self.chain.readable.slices(),
                _ => &[],
            },
            _ => &[],
        }
    }
}

/// Serves one queue.
#[derive(Debug)]
pub(super) struct Server {
    // Goes first: it waits for requests that use the slots' memory.
    jobs: Jobs,
    ring: Ring,
    setup: Setup,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// When the first of the requests was done that the driver was not told of.
    done_since: Option<Instant>,
    patience: Patience,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
}

impl Server {
    /// A server for the calling thread, to be woken by `wake` when something has changed.
    ///
    /// # Errors
    /// There are no more files to be had; the ring is given back.
    pub(super) fn new(ring: Ring, setup: Setup, wake: &EventFd) -> Result<Self, (io::Error, Ring)> {
        let events = [&**ring.kick(), wake];
        let jobs = match Jobs::new(setup.terms.clone(), &events, ring.halt_flag()) {
            Ok(jobs) => jobs,
            Err(error) => return Err((error, ring)),
        };
        Ok(Self {
            jobs,
            patience: Patience::new(setup.polls),
            ring,
            setup,
            slots: Vec::new(),
            free: Vec::new(),
            done_since: None,
            idle_since: None,
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
            kept: self.jobs.kept().iter().filter_map(heads).collect(),
            queue: self.ring.into_queue(),
        }
    }

    fn serve(&mut self) -> Result<(), DriverError> {
        while !self.ring.halted() {
            while let Some((slot, ending)) = self.jobs.ended() {
                self.end(slot, ending)?;
            }
            self.tell()?;
            self.try_again()?;
            let next = self.take()?;
            self.tell()?;
            if let Err(error) = self.jobs.wait(next) {
                tracing::error!(%error, "Cannot wait for block requests; the queue stops");
                return Ok(());
            }
            if let Some(since) = self.idle_since.take() {
                self.patience.slept(since.elapsed());
            }
        }
        Ok(())
    }

    /// Waits for all requests under way. Those given up halfway are kept.
    fn drain(&mut self) {
        while self.jobs.is_busy() {
            let Some((slot, ending)) = self.jobs.ended() else {
                if let Err(error) = self.jobs.wait(Next::Event) {
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
                if self.ring.halted() || !self.jobs.has_room() {
                    return Ok(Next::Event);
                }
                let Some(slot) = self.free_slot() else {
                    return Ok(Next::Event);
                };
                if !self.pop(slot)? {
                    break;
                }
                if let Err(wait) = self.admit(slot) {
                    self.free.push(slot);
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
            if self.linger()? {
                continue;
            }
            if !self.ring.enable_kicks()? {
                return Ok(Next::Event);
            }
            self.idle_since = None;
        }
    }

    /// Looks at the ring for a while, if nothing is under way and that may pay off. Returns whether
    /// there are chains again.
    fn linger(&mut self) -> Result<bool, DriverError> {
        if self.jobs.is_busy() {
            return Ok(false);
        }
        let since = Instant::now();
        self.idle_since = Some(since);
        let Some(time) = self.patience.look() else {
            return Ok(false);
        };
        self.tell()?;
        while since.elapsed() < time {
            if self.ring.has_more() {
                self.patience.hit();
                self.idle_since = None;
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
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
        });
        Some(self.slots.len() - 1)
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

    /// Asks the limits whether the request in a slot may begin.
    fn admit(&self, index: usize) -> Result<(), Duration> {
        match self.slots.get(index).map(|slot| slot.command) {
            Some(Command::Disk(request)) => self.jobs.admit(&request),
            _ => Ok(()),
        }
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
                tracing::debug!(
                    device = &*self.setup.terms.name,
                    "Request refused: {reason}"
                );
                self.answer(index, VIRTIO_BLK_S_IOERR, 0)
            }
        }
    }

    fn begin(&mut self, index: usize, request: Request) -> Result<(), DriverError> {
        let durable = self.setup.writes_through();
        let Some(slot) = self.slots.get(index) else {
            return Ok(());
        };
        let durable = durable && slot.command.is_change();
        let more = self.ring.has_more();
        // SAFETY: it is guest memory, which the ring keeps mapped until the engine is gone.
        match unsafe {
            self.jobs
                .begin(index, request, durable, slot.memory(), more)
        } {
            Some(result) => self.tell_end(index, &result),
            None => Ok(()),
        }
    }

    /// Takes up how the request in a slot has ended.
    fn end(&mut self, index: usize, ending: Ending) -> Result<(), DriverError> {
        let Some(slot) = self.slots.get(index) else {
            return Ok(());
        };
        match self.jobs.finish(index, ending, slot.memory()) {
            Some(result) => self.tell_end(index, &result),
            None => Ok(()),
        }
    }

    fn tell_end(
        &mut self,
        index: usize,
        result: &Result<(), BlockError>,
    ) -> Result<(), DriverError> {
        if result.is_err() {
            return self.answer(index, VIRTIO_BLK_S_IOERR, 0);
        }
        let written = match self.slots.get(index).map(|slot| slot.command) {
            Some(Command::Disk(Request {
                operation: Operation::Read,
                len,
                ..
            })) => len,
            _ => 0,
        };
        self.answer(index, VIRTIO_BLK_S_OK, written)
    }

    /// Begins requests that were kept once more, if somebody has asked for it.
    fn try_again(&mut self) -> Result<(), DriverError> {
        for index in self.jobs.take_retries() {
            self.start(index)?;
        }
        Ok(())
    }

    /// Takes chains that were taken before the queue came here.
    fn take_kept(&mut self, heads: &[u16]) -> Result<(), DriverError> {
        let mut kept = Vec::with_capacity(heads.len());
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
            kept.push(index);
        }
        for index in kept {
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
        self.free.push(index);
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
    fn terms(&self) -> request::Terms {
        request::Terms {
            sectors: self.terms.backend.size() / SECTOR_SIZE,
            discard: self.discard,
            write_zeroes: self.write_zeroes,
        }
    }

    fn writes_through(&self) -> bool {
        !(self.flush && self.writeback.load(Ordering::Acquire))
    }
}
