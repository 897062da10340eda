//! A virtqueue in service (virtio 1.2, 2.7 split virtqueues): takes chains, returns them used and
//! tells the driver when it wants to know.
//!
//! The `virtio-queue` crate ends a chain without a word when a descriptor is bad, so the walk here
//! makes sure that the end it saw was the one the driver meant. A driver that breaks the rules
//! stops its device, with DEVICE_NEEDS_RESET set; it never stops ours.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

pub use super::buffers::{Buffers, Chain};
use super::descriptors::Descriptors;
use super::{ActiveQueue, DriverError, Notifier};
use crate::GuestMemory;

/// The feature bits that every device here offers.
pub const RING_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// Bytes before the elements of both rings: flags and index.
const RING_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// A used buffer that has waited this long ends its batch when the next one is returned. Nothing
/// looks at the time in between, so batches are for handlers that don't block.
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
    /// Used chains that the driver can't see yet.
    staged: u16,
    /// The used index when the driver was last told of it.
    told: u16,
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
            told: queue.queue.next_used(),
            queue: queue.queue,
            kick: queue.kick,
            memory,
            notifier,
            halt,
            staged: 0,
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
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Makes a chain that fits this ring.
    pub fn new_chain(&self) -> Chain {
        Chain::new(&self.memory, self.queue.max_size())
    }

    /// Makes buffers for `chains` chains of this ring.
    pub fn new_buffers(&self, chains: usize) -> Buffers {
        let capacity = Chain::capacity(self.queue.max_size()).saturating_mul(chains);
        Buffers::new(self.memory.clone(), capacity)
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
        walk(descriptors, self.queue.max_size(), chain)?;
        Ok(true)
    }

    /// Whether chains are available, as far as can be told.
    pub fn has_more(&self) -> bool {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Relaxed);
        index.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Takes the chain of `head`, which was taken before and not returned since, into `chain`.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn take(&mut self, head: u16, chain: &mut Chain) -> Result<(), DriverError> {
        chain.clear();
        chain.head = head;
        let table = GuestAddress(self.queue.desc_table());
        let descriptors = Descriptors::new(&self.memory, table, self.queue.size(), head);
        walk(descriptors, self.queue.max_size(), chain)
    }

    /// Makes the last `count` chains available again, as if they had not been popped.
    pub fn undo_pop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Returns the chain of `head` to the driver with `len` bytes written.
    ///
    /// # Errors
    /// The ring can't be written or `head` is no descriptor.
    pub fn add_used(&mut self, head: u16, len: u32) -> Result<(), DriverError> {
        self.stage_used(head, len)?;
        self.publish_used()
    }

    /// Like [`Ring::add_used`], but the driver sees the chain only after [`Ring::publish_used`]:
    /// it must not see half of a frame that takes several chains.
    ///
    /// # Errors
    /// The ring can't be written or `head` is no descriptor.
    pub fn stage_used(&mut self, head: u16, len: u32) -> Result<(), DriverError> {
        if head >= self.queue.size() || self.staged >= self.queue.size() {
            return Err(DriverError::Ring(QueueError::InvalidDescriptorIndex));
        }
        let slot = self.queue.next_used().wrapping_add(self.staged) % self.queue.size();
        let offset = RING_HEADER + USED_ELEMENT * u64::from(slot);
        let element = u64::from(head) | u64::from(len) << 32;
        self.memory
            .write_obj(
                element.to_le(),
                ring_address(self.queue.used_ring(), offset)?,
            )
            .map_err(memory_error)?;
        self.staged += 1;
        Ok(())
    }

    /// Shows the driver all staged chains at once.
    ///
    /// # Errors
    /// The ring can't be written.
    pub fn publish_used(&mut self) -> Result<(), DriverError> {
        let next = self.queue.next_used().wrapping_add(self.staged);
        self.staged = 0;
        self.queue.set_next_used(next);
        let index = ring_address(self.queue.used_ring(), 2)?;
        self.memory
            .store(next.to_le(), index, Ordering::Release)
            .map_err(memory_error)?;
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
        if self.untold_since.take().is_some() && self.interrupt_wanted()? {
            self.notifier.queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was used since the last call (2.7.7.2).
    fn interrupt_wanted(&mut self) -> Result<bool, DriverError> {
        let next = self.queue.next_used();
        let last = std::mem::replace(&mut self.told, next);
        // The driver writes its wish and then reads the used index; we do it the other way round.
        fence(Ordering::SeqCst);
        let event_idx = self.queue.event_idx_enabled();
        let offset = if event_idx {
            RING_HEADER + AVAIL_ELEMENT * u64::from(self.queue.size())
        } else {
            0
        };
        let address = ring_address(self.queue.avail_ring(), offset)?;
        let wish = self.memory.load(address, Ordering::Relaxed);
        let wish = u16::from_le(wish.map_err(memory_error)?);
        Ok(if event_idx {
            next.wrapping_sub(wish).wrapping_sub(1) < next.wrapping_sub(last)
        } else {
            u32::from(wish) & VRING_AVAIL_F_NO_INTERRUPT == 0
        })
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

    /// What tells that the device is halted, for those who can't see the ring.
    pub fn halt_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.halt.0)
    }

    /// Whether the device is halted.
    pub fn halted(&self) -> bool {
        self.halt.is_set()
    }

    /// Hands available chains to `handle` until there are none, the device can't take one, or
    /// `budget` of them are done. An error of `handle` halts the device.
    ///
    /// The driver hears of used chains in batches, so `handle` must not block.
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
            // A driver that moves its index to and fro would keep us here.
            left = left.saturating_sub(1);
        }
    }
}

fn ring_address(base: u64, offset: u64) -> Result<GuestAddress, DriverError> {
    base.checked_add(offset)
        .map(GuestAddress)
        .ok_or(DriverError::Ring(QueueError::AddressOverflow))
}

fn memory_error(error: GuestMemoryError) -> DriverError {
    DriverError::Ring(QueueError::GuestMemory(error))
}

/// Walks all of `descriptors`, at most `limit`, into `chain`.
fn walk(
    descriptors: impl Iterator<Item = Descriptor>,
    limit: u16,
    chain: &mut Chain,
) -> Result<(), DriverError> {
    let mut last: Option<Descriptor> = None;
    for (position, descriptor) in descriptors.enumerate() {
        // A chain may not be longer than the queue (2.7.5.3.1), but Linux goes by the size that
        // the device offered even where it chose a smaller one.
        if position >= usize::from(limit) {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::{MockNotifier, guest_memory};
    use crate::virtio::driver::{Driver, INDIRECT, NEXT, WRITE, readable, writable};

    fn ring(
        memory: &Arc<GuestMemory>,
        driver: &Driver,
        event_idx: bool,
    ) -> (Ring, Arc<MockNotifier>) {
        let notifier = Arc::new(MockNotifier::default());
        let queue = ActiveQueue {
            index: 0,
            queue: driver.queue(event_idx),
            kick: driver.kick.clone(),
        };
        let ring = Ring::new(queue, memory.clone(), notifier.clone(), Halt::default());
        (ring, notifier)
    }

    /// Returns three chains one by one and tells the driver of each. Returns the interrupts that
    /// the driver had got after each.
    fn interrupts(event_idx: bool, set_up: impl FnOnce(&Driver)) -> Vec<u32> {
        let memory = guest_memory(1 << 20);
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let (mut ring, notifier) = ring(&memory, &driver, event_idx);
        for _ in 0..3 {
            driver.add(&[writable(0x8000, 8)]);
        }
        set_up(&driver);
        let mut all = Vec::new();
        let mut chain = ring.new_chain();
        while ring.pop(&mut chain).unwrap() {
            ring.add_used(chain.head(), 0).unwrap();
            ring.notify().unwrap();
            all.push(notifier.log().queues.get(&0).copied().unwrap_or(0));
        }
        assert_eq!(driver.used_index(), 3);
        all
    }

    #[test]
    fn a_driver_is_told_no_more_than_it_wants() {
        assert_eq!(interrupts(false, |_| ()), [1, 2, 3]);
        let unwanted = |driver: &Driver| {
            let flags = u16::try_from(VRING_AVAIL_F_NO_INTERRUPT).unwrap();
            driver.write(driver.avail_ring(), &flags.to_le_bytes());
        };
        assert_eq!(interrupts(false, unwanted), [0, 0, 0]);
        for (event, expected) in [
            (0, [1, 1, 1]),
            (1, [0, 1, 1]),
            (2, [0, 0, 1]),
            (3, [0, 0, 0]),
        ] {
            let told = interrupts(true, |driver| driver.set_used_event(event));
            assert_eq!(told, expected, "used_event {event}");
        }
    }

    #[test]
    fn a_chain_can_be_taken_again_by_its_head() {
        let memory = guest_memory(1 << 20);
        let mut driver = Driver::new(&memory, 0x1000, 16);
        let (mut ring, _) = ring(&memory, &driver, false);
        driver.add(&[readable(0x8000, 8), writable(0x9000, 16)]);
        let table = 0xa000;
        driver.descriptor_at(table, 0xb000, 3, NEXT, 1);
        driver.descriptor_at(table + 16, 0xc000, 5, WRITE, 0);
        driver.descriptor(5, table, 32, INDIRECT, 0);
        driver.offer(5);
        let show = |chain: &Chain| {
            let lens = |part: &Buffers| -> Vec<_> {
                let place = |slice: &vm_memory::VolatileSlice<'_>| {
                    (slice.ptr_guard().as_ptr().addr(), slice.len())
                };
                part.slices().iter().map(place).collect()
            };
            (chain.head(), lens(&chain.readable), lens(&chain.writable))
        };
        let mut chain = ring.new_chain();
        for _ in 0..2 {
            assert!(ring.pop(&mut chain).unwrap());
            let first = show(&chain);
            assert!(!first.1.is_empty() && !first.2.is_empty());
            ring.take(chain.head(), &mut chain).unwrap();
            assert_eq!(show(&chain), first);
        }
        assert!(!ring.pop(&mut chain).unwrap());
    }

    #[test]
    fn a_broken_chain_is_refused_by_its_head() {
        let memory = guest_memory(1 << 20);
        let driver = Driver::new(&memory, 0x1000, 16);
        let (mut ring, _) = ring(&memory, &driver, false);
        let mut chain = ring.new_chain();
        // In a circle, out of the table, a table of nothing, of half a descriptor, in another.
        driver.descriptor(0, 0x8000, 8, NEXT, 0);
        driver.descriptor(1, 0x8000, 8, NEXT, 16);
        driver.descriptor(2, 0x8000, 0, INDIRECT, 0);
        driver.descriptor(3, 0x8000, 24, INDIRECT, 0);
        driver.descriptor_at(0x8000, 0x9000, 16, INDIRECT, 0);
        driver.descriptor(4, 0x8000, 16, INDIRECT, 0);
        driver.descriptor(5, 1 << 40, 16, INDIRECT, 0);
        driver.descriptor(6, 0x8000, 16, INDIRECT | NEXT, 5);
        driver.descriptor(7, u64::MAX - 15, 32, INDIRECT, 0);
        for head in (0..9).chain([16, u16::MAX]) {
            assert!(ring.take(head, &mut chain).is_err(), "{head}");
        }
    }
}
