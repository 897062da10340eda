//! The capability through which configuration space reaches the BAR (virtio 1.2, 4.1.4.9).

use super::layout::{BAR, BAR_LEN};
use crate::pci::config_memory::ConfigPage;

/// Offsets in the capability: the first writable field, the last one that sets up the window, and
/// the data.
const FIELDS: u16 = 4;
const LENGTH: u16 = 12;
const DATA: u16 = 16;
const END: u16 = 20;

/// What the driver did to the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WindowEvent {
    /// Changed bar or offset and may be about to change more: reads must not have effects yet.
    Moved,
    /// Wrote the length, which drivers do last: stands for the read.
    Completed,
    /// Wrote the data.
    Written,
}

/// An access that the driver asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowAccess {
    /// Offset in the BAR.
    pub(super) offset: u64,
    /// 1, 2 or 4 bytes.
    pub(super) len: usize,
    /// What made it one.
    pub(super) event: WindowEvent,
    bytes: [u8; 4],
}

impl WindowAccess {
    /// The bytes to write.
    pub(super) fn data(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The capability of one function.
#[derive(Debug)]
pub(super) struct ConfigWindow {
    page: ConfigPage,
    capability: u8,
}

impl ConfigWindow {
    /// The capability at offset `capability` of a function's configuration space.
    pub(super) fn new(page: ConfigPage, capability: u8) -> Self {
        Self { page, capability }
    }

    /// What a write of `len` bytes at `offset` of configuration space asks for; `None` when it
    /// has nothing to do with the window, or when what the fields say is invalid.
    pub(super) fn access(&self, offset: u16, len: usize) -> Option<WindowAccess> {
        let start = offset.checked_sub(u16::from(self.capability))?;
        let end = usize::from(start).checked_add(len)?;
        if end <= usize::from(FIELDS) || start >= END {
            return None;
        }
        let register = |index: u8| self.page.load(self.capability / 4 + index);
        let [bar, ..] = register(1).to_le_bytes();
        let (offset, len) = (register(2), register(3));
        let fits = offset.checked_add(len).is_some_and(|end| end <= BAR_LEN);
        if bar != BAR || !matches!(len, 1 | 2 | 4) || !offset.is_multiple_of(len) || !fits {
            return None;
        }
        Some(WindowAccess {
            offset: offset.into(),
            len: usize::try_from(len).ok()?,
            event: if end > usize::from(DATA) {
                WindowEvent::Written
            } else if end > usize::from(LENGTH) {
                WindowEvent::Completed
            } else {
                WindowEvent::Moved
            },
            bytes: register(4).to_le_bytes(),
        })
    }

    /// Shows `data` to the driver.
    pub(super) fn set_data(&self, data: [u8; 4]) {
        let value = u32::from_le_bytes(data);
        self.page.update(self.capability / 4 + 4, u32::MAX, value);
    }
}
