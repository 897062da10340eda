//! The receive queue: host to guest (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::collections::VecDeque;
use std::io;

use vm_memory::VolatileSlice;

use super::backend::NetBackend;
use super::device::NetStats;
use crate::virtio::DriverError;
use crate::virtio::ring::{Buffers, Chain, Ring};

/// Bytes of the header before each frame in guest memory.
pub(super) const HEADER: usize = 12;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// Shortest frame: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;

/// Longest frame with its header: an Ethernet and a VLAN header before the largest IP packet.
pub(super) const MAX_FRAME: usize = HEADER + MIN_FRAME + 4 + 65_535;

/// Frames received before others on the device thread get their turn.
const BUDGET: usize = 64;

/// Why [`RxQueue::receive`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxProgress {
    /// The backend has no frame: poll its descriptor.
    NoFrame,
    /// The guest gave no buffers: wait for its kick.
    NoBuffers,
    /// There may be more; the queue kicked itself.
    BudgetSpent,
    /// The device is halted.
    Halted,
}

/// A chain that waits for a frame.
#[derive(Debug)]
struct Posted {
    head: u16,
    slices: usize,
    bytes: u64,
}

/// A receive queue in service.
///
/// Chains are taken from the ring ahead of the frames, so that each frame costs one system call
/// however many chains it takes; they are given back unused at the end. While the guest is short
/// of buffers, frames go by way of `held`: how long a frame is shows only once it is received,
/// and one that is too long for now must wait and not be lost.
#[derive(Debug)]
pub(super) struct RxQueue {
    pub(super) ring: Ring,
    chain: Chain,
    posted: VecDeque<Posted>,
    /// The slices of all of `posted`, in order.
    buffers: Buffers,
    /// A frame may take several chains.
    mergeable: bool,
    /// Bytes of the longest frame to expect, with its header.
    longest: u64,
    /// Kicks are on because buffers ran short.
    kicks: bool,
    /// A frame that waits for buffers, with its header.
    held: Box<[u8]>,
    /// Bytes in `held`; none waits if absent.
    held_len: Option<usize>,
}

/// Whether chains wait for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stock {
    /// The longest frame fits, or what there is is all that the driver can give.
    Full,
    /// Short frames fit.
    Low,
    /// None does.
    Empty,
}

impl RxQueue {
    pub(super) fn new(ring: Ring, buffers: Buffers, mergeable: bool, longest: u64) -> Self {
        Self {
            chain: ring.new_chain(),
            posted: VecDeque::with_capacity(ring.size().into()),
            ring,
            buffers,
            mergeable,
            longest,
            kicks: false,
            // Untouched pages of it cost nothing.
            held: vec![0; MAX_FRAME].into(),
            held_len: None,
        }
    }

    /// Gives the chains that wait for a frame back to the ring.
    pub(super) fn into_ring(mut self) -> Ring {
        // No more than the queue's size are taken.
        let count = u16::try_from(self.posted.len()).unwrap_or(0);
        self.ring.undo_pop(count);
        self.ring
    }

    /// Moves frames from `backend` to the guest.
    ///
    /// # Errors
    /// The backend is gone.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        stats: &NetStats,
    ) -> io::Result<RxProgress> {
        let result = self.receive_frames(backend, stats);
        let told = self.ring.notify();
        let result = match result {
            Err(Stop::Backend(error)) => return Err(error),
            Err(Stop::Driver(cause)) => Err(cause),
            Ok(progress) => told.map(|()| progress),
        };
        Ok(result.unwrap_or_else(|cause| {
            self.ring.fail(&cause);
            RxProgress::Halted
        }))
    }

    fn receive_frames(
        &mut self,
        backend: &mut dyn NetBackend,
        stats: &NetStats,
    ) -> Result<RxProgress, Stop> {
        for _ in 0..BUDGET {
            if self.ring.halted() {
                return Ok(RxProgress::Halted);
            }
            let stock = self.stock()?;
            let (placed, received) = match (self.held_len, stock) {
                (_, Stock::Empty) => return Ok(RxProgress::NoBuffers),
                (Some(len), Stock::Low) if len as u64 > self.room().1 => {
                    return Ok(RxProgress::NoBuffers);
                }
                (Some(len), _) => (true, Some(self.unhold(len))),
                (None, Stock::Full) => (true, self.receive_straight(backend)?),
                (None, Stock::Low) => (false, self.receive_held(backend)?),
            };
            let Some(len) = received else {
                return Ok(RxProgress::NoFrame);
            };
            if !(HEADER + MIN_FRAME..=MAX_FRAME).contains(&len) {
                stats.rx_dropped();
            } else if !placed {
                self.held_len = Some(len);
            } else if len as u64 > self.room().1 {
                stats.rx_dropped();
            } else {
                stats.received(len - HEADER);
                self.deliver(len)?;
            }
        }
        self.come_again();
        Ok(RxProgress::BudgetSpent)
    }

    /// Has the device thread come back to this queue: frames that the backend holds itself don't
    /// make its descriptor readable.
    pub(super) fn come_again(&self) {
        let _ = self.ring.kick().write(1);
    }

    /// Receives a frame into the guest's buffers. Returns its length with the header.
    fn receive_straight(&mut self, backend: &mut dyn NetBackend) -> Result<Option<usize>, Stop> {
        let before = missing_header(backend);
        let (slices, _) = self.room();
        let received = self
            .buffers
            .with_rest(slices, before, |parts| backend.recv(parts));
        let len = received.map_err(Stop::Backend)?;
        if before > 0 && len.is_some() {
            self.buffers.write_at(0, &[0; HEADER]);
        }
        Ok(len.map(|len| before.saturating_add(len)))
    }

    /// Receives a frame into `held`. Returns its length with the header.
    fn receive_held(&mut self, backend: &mut dyn NetBackend) -> Result<Option<usize>, Stop> {
        let before = missing_header(backend);
        if let Some(header) = self.held.get_mut(..HEADER) {
            header.fill(0);
        }
        let room = self.held.get_mut(before..).unwrap_or_default();
        let len = backend
            .recv(&[VolatileSlice::from(room)])
            .map_err(Stop::Backend)?;
        Ok(len.map(|len| before.saturating_add(len)))
    }

    /// Copies the frame of `len` bytes from `held` to the guest's buffers, as far as it fits.
    fn unhold(&mut self, len: usize) -> usize {
        self.held_len = None;
        let (slices, _) = self.room();
        let mut rest = self.held.get(..len).unwrap_or_default();
        self.buffers.with_rest(slices, 0, |parts| {
            for part in parts {
                part.copy_from(rest);
                rest = rest.get(part.len()..).unwrap_or_default();
            }
        });
        len
    }

    /// Takes chains until the longest frame fits. With less than that, the driver was asked to
    /// kick when it gives more.
    fn stock(&mut self) -> Result<Stock, DriverError> {
        let mut asked = false;
        while !self.full() {
            if self.ring.pop(&mut self.chain)? {
                self.take_chain()?;
            } else if !asked {
                asked = true;
                self.kicks = true;
                if !self.ring.enable_kicks()? {
                    break;
                }
            } else {
                break;
            }
        }
        if self.full() {
            if self.kicks {
                self.kicks = false;
                self.ring.disable_kicks()?;
            }
            Ok(Stock::Full)
        } else if self.posted.is_empty() {
            Ok(Stock::Empty)
        } else {
            Ok(Stock::Low)
        }
    }

    fn full(&self) -> bool {
        if !self.mergeable {
            return !self.posted.is_empty();
        }
        self.buffers.bytes() >= self.longest
            || self.posted.len() >= usize::from(self.ring.size())
            || !self.buffers.has_room_for(&self.chain.writable)
    }

    fn take_chain(&mut self) -> Result<(), DriverError> {
        let (readable, writable) = (&self.chain.readable, &self.chain.writable);
        if readable.bytes() > 0 {
            return Err(DriverError::Chain("a receive buffer is not writable"));
        }
        if writable.bytes() < HEADER as u64 {
            return Err(DriverError::Chain("a receive buffer is too short"));
        }
        self.posted.push_back(Posted {
            head: self.chain.head(),
            slices: self.buffers.append(writable)?,
            bytes: writable.bytes(),
        });
        Ok(())
    }

    /// Slices and bytes that the next frame may take.
    fn room(&self) -> (usize, u64) {
        match self.posted.front() {
            Some(first) if !self.mergeable => (first.slices, first.bytes),
            _ => (self.buffers.slices().len(), self.buffers.bytes()),
        }
    }

    /// Returns the chains that the frame of `len` bytes with its header fills.
    fn deliver(&mut self, len: usize) -> Result<(), DriverError> {
        let mut left = len as u64;
        let mut count: u16 = 0;
        let mut slices = 0;
        for posted in &self.posted {
            let used = left.min(posted.bytes);
            let used32 = u32::try_from(used).unwrap_or(u32::MAX);
            self.ring.stage_used(posted.head, used32)?;
            left -= used;
            count += 1;
            slices += posted.slices;
            if left == 0 {
                break;
            }
        }
        self.buffers.write_at(NUM_BUFFERS, &count.to_le_bytes());
        self.ring.publish_used()?;
        self.posted.drain(..usize::from(count));
        self.buffers.remove_slices(slices);
        Ok(())
    }
}

/// Bytes of the header that the guest expects and `backend` doesn't give.
fn missing_header(backend: &dyn NetBackend) -> usize {
    if backend.vnet_header() { 0 } else { HEADER }
}

/// Who ended a round.
enum Stop {
    Driver(DriverError),
    Backend(io::Error),
}

impl From<DriverError> for Stop {
    fn from(cause: DriverError) -> Self {
        Self::Driver(cause)
    }
}
