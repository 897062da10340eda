//! QEMU's firmware configuration device (`docs/specs/fw_cfg` of QEMU), by ports.
//!
//! Firmware selects an item by its key and reads it byte by byte or, in one go, by DMA. Files
//! have names in a directory item. Left out: writes through the data port (refused since QEMU
//! 2.4) and the memory-mapped variant.
//!
//! A DMA request is bounded: it moves at most the item and [`MAX_PADDING`] bytes of zeroes behind
//! it, and touches guest memory only when all of the range is guest memory.

mod items;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use self::items::ItemTable;
pub use self::items::{Content, FwCfgError, FwCfgItems, NAME_MAX, NumberedItems, Producer};
use crate::GuestMemory;
use crate::bus::BusDevice;

/// Length of the port range.
pub const PORT_RANGE: u64 = 12;
/// Zeroes that one DMA read may get behind an item's end.
pub const MAX_PADDING: usize = 0x1_0000;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;
/// What the DMA register reads as, big endian.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

const CONTROL_ERROR: u32 = 1 << 0;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;
const CONTROL_KEY_SHIFT: u32 = 16;

/// A DMA request as it lies in guest memory.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DmaRequest {
    control: U32,
    length: U32,
    address: U64,
}

/// Only why the guest is told "error"; never shown to a user.
struct Refused;

/// State of a [`FwCfg`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    key: u16,
    position: u64,
    dma_high: u32,
    /// Contents of the writable files by name.
    written: BTreeMap<String, Vec<u8>>,
}

/// The firmware configuration device.
#[derive(Debug)]
pub struct FwCfg {
    memory: Arc<GuestMemory>,
    table: ItemTable,
    key: u16,
    position: u64,
    dma_high: u32,
    /// What the selected item's producer made.
    produced: Option<Arc<[u8]>>,
}

impl FwCfg {
    /// A device that offers `items` and moves them to `memory`.
    pub fn new(memory: Arc<GuestMemory>, items: FwCfgItems) -> Self {
        Self {
            memory,
            table: items.into_table(),
            key: 0,
            position: 0,
            dma_high: 0,
            produced: None,
        }
    }

    /// A device that goes on from `state`.
    ///
    /// # Errors
    /// Fails when `state` holds a writable file that `items` has not, or not of that length.
    pub fn restore(
        memory: Arc<GuestMemory>,
        items: FwCfgItems,
        state: FwCfgState,
    ) -> Result<Self, FwCfgError> {
        let mut device = Self::new(memory, items);
        for (name, saved) in state.written {
            let key = device.table.names.get(&name);
            match key.and_then(|key| device.table.items.get_mut(key)) {
                Some(Content::Writable(bytes)) if bytes.len() == saved.len() => *bytes = saved,
                _ => return Err(FwCfgError::StateMismatch(name)),
            }
        }
        device.select(state.key);
        device.position = state.position;
        device.dma_high = state.dma_high;
        Ok(device)
    }

    /// The state to go on from.
    pub fn state(&self) -> FwCfgState {
        let written = self.table.names.keys().filter_map(|name| {
            let bytes = self.written_file(name)?;
            Some((name.clone(), bytes.to_vec()))
        });
        FwCfgState {
            key: self.key,
            position: self.position,
            dma_high: self.dma_high,
            written: written.collect(),
        }
    }

    /// Deselects. Writable files keep what was written to them.
    pub fn reset(&mut self) {
        self.select(0);
        self.dma_high = 0;
    }

    /// What a writable file holds now; `None` when there is no writable file `name`.
    pub fn written_file(&self, name: &str) -> Option<&[u8]> {
        match self.table.items.get(self.table.names.get(name)?)? {
            Content::Writable(bytes) => Some(bytes),
            Content::Fixed(_) | Content::Produced { .. } => None,
        }
    }

    fn select(&mut self, key: u16) {
        self.key = key;
        self.position = 0;
        self.produced = match self.table.items.get(&key) {
            Some(Content::Produced { producer, .. }) => Some(producer()),
            _ => None,
        };
    }

    /// Declared length of the selected item and the bytes it has; nothing for an unknown key.
    fn selected(&self) -> (usize, &[u8]) {
        match self.table.items.get(&self.key) {
            Some(Content::Fixed(bytes)) => (bytes.len(), bytes),
            Some(Content::Writable(bytes)) => (bytes.len(), bytes),
            Some(content @ Content::Produced { .. }) => {
                (content.len(), self.produced.as_deref().unwrap_or_default())
            }
            None => (0, &[]),
        }
    }

    /// The next up to `len` bytes of the selected item: those it has, and how many zeroes follow
    /// to make up its declared length.
    fn rest(&self, len: usize) -> (&[u8], usize) {
        let (declared, bytes) = self.selected();
        let start = usize::try_from(self.position).unwrap_or(usize::MAX);
        let wanted = len.min(declared.saturating_sub(start));
        let present = bytes.get(start..).unwrap_or_default();
        let present = &present[..present.len().min(wanted)];
        (present, wanted - present.len())
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.rest(1).0.first().copied().unwrap_or(0);
        self.position = self.position.saturating_add(1);
        byte
    }

    fn dma(&mut self, address: u64) {
        let address = GuestAddress(address);
        let mut raw = [0; size_of::<DmaRequest>()];
        if self.memory.read_slice(&mut raw, address).is_err() {
            tracing::debug!(
                "The guest's fw_cfg DMA request at {:#x} is not memory",
                address.0
            );
            return;
        }
        let Ok(request) = DmaRequest::read_from_bytes(&raw) else {
            return;
        };
        let control = match self.carry_out(&request) {
            Ok(()) => U32::ZERO,
            Err(Refused) => U32::new(CONTROL_ERROR),
        };
        // The range was readable, so writing can only fail for memory that is read-only.
        if self
            .memory
            .write_slice(control.as_bytes(), address)
            .is_err()
        {
            tracing::debug!(
                "The guest's fw_cfg DMA request at {:#x} is read-only",
                address.0
            );
        }
    }

    fn carry_out(&mut self, request: &DmaRequest) -> Result<(), Refused> {
        let control = request.control.get();
        let address = GuestAddress(request.address.get());
        let length = usize::try_from(request.length.get()).map_err(|_| Refused)?;
        if control & CONTROL_SELECT != 0 {
            let key = u16::try_from(control >> CONTROL_KEY_SHIFT).map_err(|_| Refused)?;
            self.select(key);
        }
        if control & CONTROL_READ != 0 {
            self.dma_read(address, length)?;
        } else if control & CONTROL_WRITE != 0 {
            self.dma_write(address, length)?;
        } else if control & CONTROL_SKIP == 0 {
            return Ok(());
        }
        self.position = self.position.saturating_add(u64::from(request.length));
        Ok(())
    }

    fn dma_read(&self, address: GuestAddress, length: usize) -> Result<(), Refused> {
        let (bytes, zeroes) = self.rest(length);
        let padding = length - bytes.len();
        if padding - zeroes > MAX_PADDING || !self.memory.check_range(address, length) {
            return Err(Refused);
        }
        self.memory
            .write_slice(bytes, address)
            .map_err(|_| Refused)?;
        let mut at = address.0 + bytes.len() as u64;
        let mut left = padding;
        let zero_page = [0; 4096];
        while left > 0 {
            let chunk = left.min(zero_page.len());
            self.memory
                .write_slice(&zero_page[..chunk], GuestAddress(at))
                .map_err(|_| Refused)?;
            at += chunk as u64;
            left -= chunk;
        }
        Ok(())
    }

    fn dma_write(&mut self, address: GuestAddress, length: usize) -> Result<(), Refused> {
        let start = usize::try_from(self.position).map_err(|_| Refused)?;
        let end = start.checked_add(length).ok_or(Refused)?;
        let Some(Content::Writable(bytes)) = self.table.items.get_mut(&self.key) else {
            return Err(Refused);
        };
        let target = bytes.get_mut(start..end).ok_or(Refused)?;
        if !self.memory.check_range(address, length) {
            return Err(Refused);
        }
        self.memory.read_slice(target, address).map_err(|_| Refused)
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, &mut *data) {
            (DATA, [byte]) => *byte = self.read_data(),
            (DMA_HIGH.., _) => {
                let start = usize::try_from(offset - DMA_HIGH).unwrap_or(DMA_SIGNATURE.len());
                for (byte, sign) in data.iter_mut().zip(DMA_SIGNATURE.iter().skip(start)) {
                    *byte = *sign;
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECTOR, [low, high]) => self.select(u16::from_le_bytes([*low, *high])),
            (DMA_HIGH, [a, b, c, d]) => self.dma_high = u32::from_be_bytes([*a, *b, *c, *d]),
            (DMA_LOW, [a, b, c, d]) => {
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                let high = std::mem::take(&mut self.dma_high);
                self.dma((u64::from(high) << 32) | u64::from(low));
            }
            _ => {}
        }
    }
}
