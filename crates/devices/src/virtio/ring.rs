//! A virtqueue in service (virtio 1.2, 2.7 split virtqueues): takes chains, returns them used and
//! tells the driver when it wants to know.
//!
//! The `virtio-queue` crate ends a chain without a word when a descriptor is bad, so the walk here
//! makes sure that the end it saw was the one the driver meant. A driver that breaks the rules
//! stops its device, with DEVICE_NEEDS_RESET set; it never stops ours.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub use super::buffers::{Buffers, Chain};
use super::{ActiveQueue, DriverError, Notifier};
use crate::GuestMemory;

/// The feature bits that every device here offers.
pub const RING_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// A used buffer waits for its batch this long at most before the driver hears of it.
const NOTIFY_AFTER: Duration = Duration::from_micros(100);

/// Tells all the queues of a device to stop: set when the driver broke a rule or the device is
/// being deactivated.
#[derive(Debug, Clone, Default)]
pub struct Halt(Arc<AtomicBool>);

impl Halt {
    /// Stops the queues before their next chain.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the queues must stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a device did with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done: so many bytes from the front of the writable part were written.
    Used(u32),
    /// Can't be done now. The chain stays first in the ring.
    Later,
}

/// Why [`Ring::serve`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is available; the driver kicks when that changes.
    Drained,
    /// The device answered [`Outcome::Later`]. Kicks may not come.
    Blocked,
    /// There may be more; the queue kicked itself.
    BudgetSpent,
    /// The device is halted.
    Halted,
}

/// A virtqueue in service.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    memory: Arc<GuestMemory>,
    notifier: Arc<dyn Notifier>,
    halt: Halt,
    /// When the oldest used buffer that the driver was not told of was returned.
    untold_since: Option<Instant>,
}

impl Ring {
    /// Takes a queue into service. `halt` is shared by all the queues of the device.
    pub fn new(
        queue: ActiveQueue,
        memory: Arc<GuestMemory>,
        notifier: Arc<dyn Notifier>,
        halt: Halt,
    ) -> Self {
        Self {
            index: queue.index,
            queue: queue.queue,
            kick: queue.kick,
            memory,
            notifier,
            halt,
            untold_since: None,
        }
    }

    /// Takes the queue out of service.
    pub fn into_queue(self) -> ActiveQueue {
        ActiveQueue {
            index: self.index,
            queue: self.queue,
            kick: self.kick,
        }
    }

    /// Size the driver chose.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The queue's doorbell.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Makes a chain that fits this ring.
    pub fn new_chain(&self) -> Chain {
        Chain::new(&self.memory, self.queue.size())
    }

    /// Takes the next available chain into `chain`; false if there is none.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, DriverError> {
        chain.clear();
        let memory = &*self.memory;
        let mut retried = false;
        let descriptors = loop {
            let mut available = self.queue.iter(memory).map_err(DriverError::Ring)?;
            if let Some(descriptors) = available.next() {
                break descriptors;
            }
            // None stands for an empty ring and for one that can't be read. A chain that came
            // just now is there on the second look.
            let index = self
                .queue
                .avail_idx(memory, Ordering::Acquire)
                .map_err(DriverError::Ring)?;
            if index.0 == self.queue.next_avail() {
                return Ok(false);
            }
            if retried {
                return Err(DriverError::Ring(QueueError::InvalidAvailRingIndex));
            }
            retried = true;
        };
        chain.head = descriptors.head_index();
        walk(descriptors, self.queue.size(), chain)?;
        Ok(true)
    }

    /// Makes the last `count` chains available again, as if they had not been popped.
    pub fn undo_pop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Whether chains are available that were not popped.
    ///
    /// # Errors
    /// The ring can't be read.
    pub fn has_available(&self) -> Result<bool, DriverError> {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        Ok(index.map_err(DriverError::Ring)?.0 != self.queue.next_avail())
    }

    /// Returns the chain of `head` to the driver with `len` bytes written.
    ///
    /// # Errors
    /// The ring can't be written or `head` is no descriptor.
    pub fn add_used(&mut self, head: u16, len: u32) -> Result<(), DriverError> {
        self.queue
            .add_used(&*self.memory, head, len)
            .map_err(DriverError::Ring)?;
        let now = Instant::now();
        match self.untold_since {
            None => self.untold_since = Some(now),
            Some(since) if now.saturating_duration_since(since) >= NOTIFY_AFTER => self.notify()?,
            Some(_) => {}
        }
        Ok(())
    }

    /// Tells the driver of used buffers, unless there are none or it does not want to know.
    ///
    /// # Errors
    /// The ring can't be read.
    pub fn notify(&mut self) -> Result<(), DriverError> {
        if self.untold_since.take().is_some() {
            let wanted = self.queue.needs_notification(&*self.memory);
            if wanted.map_err(DriverError::Ring)? {
                self.notifier.queue(self.index);
            }
        }
        Ok(())
    }

    /// Asks the driver for a kick at the next chain. True if chains are already there.
    ///
    /// # Errors
    /// The ring can't be accessed.
    pub fn enable_kicks(&mut self) -> Result<bool, DriverError> {
        self.queue
            .enable_notification(&*self.memory)
            .map_err(DriverError::Ring)
    }

    /// Tells the driver that kicks are not needed.
    ///
    /// # Errors
    /// The ring can't be written.
    pub fn disable_kicks(&mut self) -> Result<(), DriverError> {
        self.queue
            .disable_notification(&*self.memory)
            .map_err(DriverError::Ring)
    }

    /// Stops the device: the driver broke a rule.
    pub fn fail(&self, cause: &DriverError) {
        self.halt.set();
        self.notifier.needs_reset(cause);
    }

    /// Whether the device is halted.
    pub fn halted(&self) -> bool {
        self.halt.is_set()
    }

    /// Hands available chains to `handle` until there are none, the device can't take one, or
    /// `budget` of them are done. An error of `handle` halts the device.
    pub fn serve(
        &mut self,
        chain: &mut Chain,
        budget: usize,
        handle: impl FnMut(&mut Chain) -> Result<Outcome, DriverError>,
    ) -> Progress {
        let served = self.serve_chains(chain, budget, handle);
        let told = served.and_then(|progress| self.notify().map(|()| progress));
        told.unwrap_or_else(|cause| {
            self.fail(&cause);
            Progress::Halted
        })
    }

    fn serve_chains(
        &mut self,
        chain: &mut Chain,
        budget: usize,
        mut handle: impl FnMut(&mut Chain) -> Result<Outcome, DriverError>,
    ) -> Result<Progress, DriverError> {
        let mut left = budget;
        loop {
            self.disable_kicks()?;
            loop {
                if self.halted() {
                    return Ok(Progress::Halted);
                }
                if left == 0 {
                    // Only a counter about to overflow refuses, and that one is signalled.
                    let _ = self.kick.write(1);
                    return Ok(Progress::BudgetSpent);
                }
                if !self.pop(chain)? {
                    break;
                }
                match handle(chain)? {
                    Outcome::Used(len) => self.add_used(chain.head, len)?,
                    Outcome::Later => {
                        self.undo_pop(1);
                        return Ok(Progress::Blocked);
                    }
                }
                left -= 1;
            }
            if !self.enable_kicks()? {
                return Ok(Progress::Drained);
            }
        }
    }
}

/// Walks all of `descriptors` into `chain`.
fn walk(
    descriptors: DescriptorChain<&GuestMemory>,
    queue_size: u16,
    chain: &mut Chain,
) -> Result<(), DriverError> {
    let mut last: Option<Descriptor> = None;
    for (position, descriptor) in descriptors.enumerate() {
        // An indirect table may have more entries than that, a chain may not (2.7.5.3.1).
        if position >= usize::from(queue_size) {
            return Err(DriverError::Chain("it is longer than the queue"));
        }
        if descriptor.len() == 0 {
            return Err(DriverError::Chain("a buffer is empty"));
        }
        if descriptor.is_write_only() {
            chain.writable.push(descriptor.addr(), descriptor.len())?;
        } else if chain.writable.bytes() > 0 {
            return Err(DriverError::Chain("a readable buffer follows a writable"));
        } else {
            chain.readable.push(descriptor.addr(), descriptor.len())?;
        }
        last = Some(descriptor);
    }
    match last {
        Some(descriptor) if !descriptor.has_next() => Ok(()),
        _ => Err(DriverError::Chain(
            "it loops or leaves the descriptor table",
        )),
    }
}
