//! The guest buffers of a descriptor chain as host memory, checked once and kept without
//! allocating per chain.

use std::fmt::{self, Debug};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use super::DriverError;
use crate::GuestMemory;

/// Guest buffers in chain order, up to a capacity fixed when made.
///
/// Bytes are taken from the front as they are copied in or out; what is left is what
/// [`Buffers::slices`] shows.
pub struct Buffers {
    /// Point into `memory`, which the same struct keeps mapped. The `'static` never gets out:
    /// every method ties what it returns to `&self`.
    slices: Vec<VolatileSlice<'static>>,
    /// Slices before this one are consumed.
    start: usize,
    /// Bytes in `slices[start..]`.
    bytes: u64,
    /// What [`Buffers::detach_last`] cut off.
    detached: Option<VolatileSlice<'static>>,
    capacity: usize,
    memory: Arc<GuestMemory>,
}

// SAFETY: a slice is a pointer and a length within guest memory. `Arc<GuestMemory>` is Send and
// keeps that memory mapped at the same place on every thread.
unsafe impl Send for Buffers {}

impl Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers")
            .field("slices", &(self.slices.len() - self.start))
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Buffers {
    /// No buffers yet, and room for `capacity` of them.
    pub fn new(memory: Arc<GuestMemory>, capacity: usize) -> Self {
        Self {
            slices: Vec::with_capacity(capacity),
            ..Self::growing(memory, capacity)
        }
    }

    /// As [`Buffers::new`], but the room is made as buffers come.
    pub fn growing(memory: Arc<GuestMemory>, capacity: usize) -> Self {
        Self {
            slices: Vec::new(),
            start: 0,
            bytes: 0,
            detached: None,
            capacity,
            memory,
        }
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.slices.clear();
        self.start = 0;
        self.bytes = 0;
        self.detached = None;
    }

    /// Appends `len` bytes at `address`.
    ///
    /// # Errors
    /// The range is not all memory, or there is no room for its pieces.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), DriverError> {
        let outside = |_| DriverError::Chain("a buffer is outside of memory");
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let pieces = self
            .memory
            .get_slices(address, len, Permissions::ReadWrite)
            .map_err(outside)?;
        for piece in pieces {
            let piece = piece.map_err(outside)?;
            if self.slices.len() == self.capacity {
                return Err(DriverError::Chain("there are too many buffers"));
            }
            // SAFETY: `piece` is a live range of `self.memory`, which outlives the slice: both
            // are fields of this struct and the Arc is never replaced.
            let slice = unsafe { VolatileSlice::new(piece.ptr_guard_mut().as_ptr(), piece.len()) };
            self.slices.push(slice);
            self.bytes += piece.len() as u64;
        }
        Ok(())
    }

    /// The buffers not consumed yet. None is empty.
    pub fn slices(&self) -> &[VolatileSlice<'_>] {
        self.slices.get(self.start..).unwrap_or_default()
    }

    /// Bytes not consumed yet.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies the first bytes to `out` and consumes them; returns how many there were.
    pub fn copy_out(&mut self, out: &mut [u8]) -> usize {
        self.consume(out.len(), |slice, done| {
            slice.copy_to(out.get_mut(done..).unwrap_or_default());
        })
    }

    /// Copies `data` into the first bytes and consumes those; returns how many fitted.
    pub fn copy_in(&mut self, data: &[u8]) -> usize {
        self.consume(data.len(), |slice, done| {
            slice.copy_from(data.get(done..).unwrap_or_default());
        })
    }

    /// Consumes up to `count` bytes; returns how many there were.
    pub fn skip(&mut self, count: usize) -> usize {
        self.consume(count, |_, _| ())
    }

    /// Whether as many slices fit as there are in `other` at most.
    pub fn has_room_for(&self, other: &Self) -> bool {
        self.capacity - self.slices.len() >= other.capacity
    }

    /// Appends the buffers of `other` and returns how many slices those are.
    ///
    /// # Errors
    /// There is no room, or `other` is of another memory.
    pub fn append(&mut self, other: &Self) -> Result<usize, DriverError> {
        let slices = other.slices.get(other.start..).unwrap_or_default();
        let room = self.capacity - self.slices.len();
        if room < slices.len() || !Arc::ptr_eq(&self.memory, &other.memory) {
            return Err(DriverError::Chain("there are too many buffers"));
        }
        self.slices.extend_from_slice(slices);
        self.bytes += other.bytes;
        Ok(slices.len())
    }

    /// Shows `view` the bytes from `skip` on of the first `count` slices.
    pub fn with_rest<R>(
        &mut self,
        count: usize,
        skip: usize,
        view: impl FnOnce(&[VolatileSlice<'_>]) -> R,
    ) -> R {
        let end = self.start.saturating_add(count).min(self.slices.len());
        let mut left = skip;
        let mut first = self.start;
        while let Some(slice) = self.slices.get(first)
            && slice.len() <= left
        {
            left -= slice.len();
            first += 1;
        }
        let whole = self.slices.get(first).copied();
        if let (Some(slot), Some(whole)) = (self.slices.get_mut(first), whole)
            && let Ok(rest) = whole.offset(left)
        {
            *slot = rest;
        }
        let result = view(self.slices.get(first..end).unwrap_or_default());
        if let (Some(slot), Some(whole)) = (self.slices.get_mut(first), whole) {
            *slot = whole;
        }
        result
    }

    /// Writes `data` from byte `offset` on without consuming anything. What lies beyond the
    /// buffers is not written.
    pub fn write_at(&self, offset: usize, data: &[u8]) {
        let (mut skip, mut data) = (offset, data);
        for slice in self.slices() {
            if data.is_empty() {
                break;
            }
            if let Ok(rest) = slice.offset(skip) {
                rest.copy_from(data);
                data = data.get(rest.len()..).unwrap_or_default();
                skip = 0;
            } else {
                skip -= slice.len();
            }
        }
    }

    /// Forgets the first `count` slices of [`Buffers::slices`] and makes room for as many.
    pub fn remove_slices(&mut self, count: usize) {
        let end = self.start.saturating_add(count).min(self.slices.len());
        let gone = self.slices.get(self.start..end).unwrap_or_default();
        self.bytes -= gone.iter().map(|slice| slice.len() as u64).sum::<u64>();
        self.slices.drain(..end);
        self.start = 0;
    }

    /// Cuts the last byte off, for [`Buffers::write_detached`]; false if there is none.
    pub fn detach_last(&mut self) -> bool {
        let Some(last) = self
            .slices
            .get_mut(self.start..)
            .and_then(|rest| rest.last_mut())
        else {
            return false;
        };
        let Ok((rest, byte)) = last.split_at(last.len().saturating_sub(1)) else {
            return false;
        };
        if rest.is_empty() {
            self.slices.pop();
        } else {
            *last = rest;
        }
        self.bytes -= 1;
        self.detached = Some(byte);
        true
    }

    /// Writes the byte that [`Buffers::detach_last`] cut off.
    pub fn write_detached(&self, value: u8) {
        if let Some(byte) = &self.detached {
            byte.copy_from(&[value]);
        }
    }

    fn consume(
        &mut self,
        count: usize,
        mut each: impl FnMut(&VolatileSlice<'static>, usize),
    ) -> usize {
        let mut done = 0;
        while done < count {
            let Some(slice) = self.slices.get_mut(self.start) else {
                break;
            };
            each(slice, done);
            let step = slice.len().min(count - done);
            done += step;
            match slice.offset(step) {
                Ok(rest) if !rest.is_empty() => *slice = rest,
                _ => self.start += 1,
            }
        }
        self.bytes -= done as u64;
        done
    }
}

/// A descriptor chain that the driver made available, walked and checked to its end.
///
/// Made once per queue and filled again by each [`Ring::pop`](super::ring::Ring::pop).
#[derive(Debug)]
pub struct Chain {
    pub(super) head: u16,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

impl Chain {
    /// Guest memory may be in several mappings and a buffer may cross from one to the next.
    const SPARE_PIECES: usize = 16;

    /// An empty chain that takes every legal chain of a queue of at most `max_size`. It grows to
    /// the longest that comes.
    pub fn new(memory: &Arc<GuestMemory>, max_size: u16) -> Self {
        let capacity = Self::capacity(max_size);
        Self {
            head: 0,
            readable: Buffers::growing(memory.clone(), capacity),
            writable: Buffers::growing(memory.clone(), capacity),
        }
    }

    /// Slices that a legal chain of a queue of `max_size` has at most in each direction.
    pub fn capacity(max_size: u16) -> usize {
        usize::from(max_size) + Self::SPARE_PIECES
    }

    /// Index of the chain's first descriptor, which names it in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Cuts the last writable byte off, for [`Chain::write_status`].
    ///
    /// # Errors
    /// The chain has nothing writable.
    pub fn detach_status(&mut self) -> Result<(), DriverError> {
        if self.writable.detach_last() {
            Ok(())
        } else {
            Err(DriverError::Chain("it has no byte for the status"))
        }
    }

    /// Writes the byte that [`Chain::detach_status`] cut off.
    pub fn write_status(&self, status: u8) {
        self.writable.write_detached(status);
    }

    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}
