//! An address space of devices: port I/O or memory-mapped I/O.
//!
//! A device sees offsets from the start of its range and never its address. Ranges do not
//! overlap. What PCI functions decode is not on this bus but behind the PCI host's one window,
//! so that moving a BAR moves nothing here.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device on a [`Bus`]. `data` is 1, 2, 4 or 8 bytes, little endian.
pub trait BusDevice: Send {
    /// Answers a read of `data.len()` bytes at `offset` from the range's start.
    ///
    /// `data` comes filled with ones, as an empty bus would answer.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes a write of `data` at `offset` from the range's start.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a [`Bus`] that takes the locks it needs itself, so that several vCPUs may be in it.
pub trait ConcurrentBusDevice: Send + Sync {
    /// As [`BusDevice::read`].
    fn read(&self, offset: u64, data: &mut [u8]);

    /// As [`BusDevice::write`].
    fn write(&self, offset: u64, data: &[u8]);
}

/// One vCPU at a time is in a device behind a lock.
impl<T: BusDevice> ConcurrentBusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(self).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(self).write(offset, data);
    }
}

/// A device that a bus and others (reset, state, interrupts) share.
pub type Shared<T> = Arc<Mutex<T>>;

/// Wraps a device for sharing.
pub fn shared<T>(device: T) -> Shared<T> {
    Arc::new(Mutex::new(device))
}

/// Locks a shared device. A panic aborts the process, so a poisoned lock can't be met.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a range can't be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or leaves the address space.
    #[error("The range of {len:#x} bytes at {base:#x} is empty or leaves the address space")]
    InvalidRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has part of the range.
    #[error("The range of {len:#x} bytes at {base:#x} overlaps another device's")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<dyn ConcurrentBusDevice>,
}

/// An address space of devices. Built before the vCPUs run and fixed from then on.
#[derive(Default)]
pub struct Bus {
    entries: BTreeMap<u64, Entry>,
}

impl Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|(base, e)| (base, e.len)))
            .finish()
    }
}

impl Bus {
    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// Refuses empty, wrapping and overlapping ranges.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn ConcurrentBusDevice>,
    ) -> Result<(), BusError> {
        let end = match base.checked_add(len) {
            Some(end) if len > 0 => end,
            _ => return Err(BusError::InvalidRange { base, len }),
        };
        let below = self.entries.range(..end).next_back();
        if below.is_some_and(|(b, e)| b + e.len > base) {
            return Err(BusError::Overlap { base, len });
        }
        self.entries.insert(base, Entry { len, device });
        Ok(())
    }

    /// Reads from the device at `address`; an access nobody decodes reads as ones.
    ///
    /// Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes to the device at `address`; an access nobody decodes is lost.
    ///
    /// Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn ConcurrentBusDevice)> {
        let (base, entry) = self.entries.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then_some((offset, &*entry.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap_or(0));
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn accesses_reach_the_device_by_offset() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, shared(Echo(7))).expect("free range");
        let mut data = [0; 2];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [9, 9]);
        assert!(bus.write(0x10, &[1]));
        assert!(bus.read(0x10, &mut data));
        assert_eq!(data, [1, 1]);
    }

    #[test]
    fn holes_and_straddling_accesses_read_as_ones() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, shared(Echo(0))).expect("free range");
        for (address, len) in [(0xf, 1), (0x14, 1), (0x13, 2), (u64::MAX, 8)] {
            let mut data = vec![0; len];
            assert!(!bus.read(address, &mut data));
            assert!(data.iter().all(|b| *b == 0xff));
        }
    }

    #[test]
    fn bad_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, shared(Echo(0))).expect("free range");
        for (base, len) in [(0x10, 1), (0xf, 2), (0x13, 1), (0, 0x100)] {
            let got = bus.insert(base, len, shared(Echo(0)));
            assert_eq!(got, Err(BusError::Overlap { base, len }));
        }
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            let got = bus.insert(base, len, shared(Echo(0)));
            assert_eq!(got, Err(BusError::InvalidRange { base, len }));
        }
        bus.insert(0x14, 1, shared(Echo(0))).expect("just after");
        bus.insert(0xf, 1, shared(Echo(0))).expect("just before");
    }
}
