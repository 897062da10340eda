//! The memory behind configuration space: one bus as ECAM lays it out.
//!
//! The whole MiB is mapped in one piece, so that the VMM can give it to the guest as one
//! read-only memory slot and configuration reads cost no exit. Only functions that exist have
//! a page of their own; all the others share a run of pages filled with ones.
//!
//! The guest may read at any time, so this is an array of atomics for us.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::dword::dword_parts;

/// Number of slots on the bus.
pub const SLOTS: u8 = 32;
/// Length of the configuration space of one function in bytes.
pub const FUNCTION_LEN: usize = 0x1000;
/// Length of the configuration space of one slot's eight functions in bytes.
pub const SLOT_LEN: usize = 8 * FUNCTION_LEN;
/// Length of the configuration space of the bus in bytes.
pub const BUS_LEN: usize = SLOTS as usize * SLOT_LEN;

/// Configuration space of one bus.
#[derive(Debug)]
pub struct ConfigMemory {
    base: NonNull<AtomicU32>,
    /// One slot's worth of ones, then a page for each slot.
    file: File,
    /// One bit for each slot that has its page.
    present: AtomicU32,
}

// SAFETY: the mapping is only accessed as atomics and lives as long as the value.
unsafe impl Send for ConfigMemory {}
// SAFETY: as above.
unsafe impl Sync for ConfigMemory {}

impl ConfigMemory {
    /// Maps a bus without functions.
    ///
    /// # Errors
    /// Fails when the host has no memory or address space left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the name is a C string, the result is checked.
        let fd = unsafe { libc::memfd_create(c"pci-config".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let pages = usize::from(SLOTS) * FUNCTION_LEN;
        file.set_len((SLOT_LEN + pages) as u64)?;
        file.write_all_at(&[0xff; SLOT_LEN], 0)?;

        // SAFETY: a new mapping where the kernel likes; nothing is replaced.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BUS_LEN,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Self {
            base,
            file,
            present: AtomicU32::new(0),
        };
        for slot in 0..usize::from(SLOTS) {
            memory.map(slot * SLOT_LEN, SLOT_LEN, libc::PROT_READ, 0)?;
        }
        Ok(memory)
    }

    /// Replaces part of the mapping by the file's `from..from + len`.
    fn map(&self, at: usize, len: usize, protection: i32, from: usize) -> io::Result<()> {
        let from = from.try_into().map_err(io::Error::other)?;
        if at.checked_add(len).is_none_or(|end| end > BUS_LEN) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the replaced range is inside of our own mapping, checked above. Readers see
        // either the old or the new page.
        let got = unsafe {
            libc::mmap(
                self.base.as_ptr().byte_add(at).cast(),
                len,
                protection,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.file.as_raw_fd(),
                from,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Gives function 0 of `slot` its page; `None` when it has one or there is no such slot.
    ///
    /// # Errors
    /// Fails when the host has no memory or address space left.
    pub fn add_page(self: &Arc<Self>, slot: u8) -> io::Result<Option<ConfigPage>> {
        let bit = 1_u32.checked_shl(slot.into()).unwrap_or(0);
        if bit == 0 || self.present.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            return Ok(None);
        }
        let slot = usize::from(slot);
        self.map(
            slot * SLOT_LEN,
            FUNCTION_LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            SLOT_LEN + slot * FUNCTION_LEN,
        )?;
        Ok(Some(ConfigPage {
            memory: self.clone(),
            first_word: slot * SLOT_LEN / 4,
        }))
    }

    /// Address of the first byte in this process. Valid as long as the value lives; never to be
    /// written through.
    pub fn host_address(&self) -> NonZero<usize> {
        self.base.addr()
    }

    /// Reads at `offset` from the start of the bus; what is beyond reads as ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for part in dword_parts(offset, data.len()) {
            let word = usize::try_from(part.dword / 4).ok();
            let word = word.and_then(|index| self.word(index));
            let value = word.map_or(u32::MAX, |word| word.load(Ordering::Acquire));
            part.extract(value, data);
        }
    }

    /// The dword with number `index`. Storing is for [`ConfigPage`] only: elsewhere the mapping
    /// is read-only.
    fn word(&self, index: usize) -> Option<&AtomicU32> {
        if index >= BUS_LEN / 4 {
            return None;
        }
        // SAFETY: inside of the mapping, aligned, mapped for as long as self lives, and accessed
        // atomically by everybody. Loads of this size are fine on read-only memory.
        Some(unsafe { self.base.add(index).as_ref() })
    }
}

impl Drop for ConfigMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody borrows it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), BUS_LEN) };
    }
}

/// The configuration space of one function: registers are dwords, numbered from 0.
///
/// Only the first 256 bytes are reached through this; extended space stays zero, which says that
/// there are no extended capabilities.
#[derive(Debug, Clone)]
pub struct ConfigPage {
    memory: Arc<ConfigMemory>,
    first_word: usize,
}

impl ConfigPage {
    /// The value of a register.
    pub fn load(&self, register: u8) -> u32 {
        self.register(register)
            .map_or(u32::MAX, |word| word.load(Ordering::SeqCst))
    }

    /// Sets the bits of a register that are in `mask` to those of `value`.
    pub fn update(&self, register: u8, mask: u32, value: u32) {
        if let Some(word) = self.register(register) {
            // Whoever changes other bits of it at the same time is on another thread: see the
            // interrupt bit of STATUS.
            let merge = |old| Some((old & !mask) | (value & mask));
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, merge);
        }
    }

    fn register(&self, register: u8) -> Option<&AtomicU32> {
        self.memory.word(self.first_word + usize::from(register))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_pages_that_were_added_are_not_ones() {
        let memory = Arc::new(ConfigMemory::new().unwrap());
        let page = memory.add_page(3).unwrap().unwrap();
        page.update(0, u32::MAX, 0x1234_5678);
        page.update(1, 0x00ff_ff00, u32::MAX);
        assert_eq!(page.load(1), 0x00ff_ff00);

        let mut data = [0; 8];
        memory.read(3 * SLOT_LEN as u64, &mut data);
        assert_eq!(data, [0x78, 0x56, 0x34, 0x12, 0, 0xff, 0xff, 0]);
        for function in (0..256).filter(|function| *function != 3 * 8) {
            let mut data = [0; 4];
            memory.read(function * FUNCTION_LEN as u64, &mut data);
            assert_eq!(data, [0xff; 4], "{function}");
        }
    }

    #[test]
    fn a_slot_is_given_once() {
        let memory = Arc::new(ConfigMemory::new().unwrap());
        assert!(memory.add_page(31).unwrap().is_some());
        assert!(memory.add_page(31).unwrap().is_none());
        assert!(memory.add_page(32).unwrap().is_none());
        assert!(memory.add_page(255).unwrap().is_none());
    }

    #[test]
    fn reads_off_the_end_are_ones() {
        let memory = Arc::new(ConfigMemory::new().unwrap());
        let page = memory.add_page(0).unwrap().unwrap();
        page.update(0, u32::MAX, 0);
        for offset in [BUS_LEN as u64 - 2, BUS_LEN as u64, u64::MAX] {
            let mut data = [0xff; 8];
            memory.read(offset, &mut data);
            assert_eq!(data, [0xff; 8]);
        }
    }
}
