//! QEMU's firmware configuration device (`docs/specs/fw_cfg` of QEMU), by ports.
//!
//! Firmware selects an item by its key and reads it byte by byte or, in one go, by DMA. Files
//! have names in a directory item. Left out: items that the guest can write (a DMA write is an
//! error), writes through the data port (refused since QEMU 2.4) and the memory-mapped variant.
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

pub use self::items::{FwCfgError, FwCfgItems, NAME_MAX, NumberedItems};
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
}

/// The firmware configuration device.
#[derive(Debug)]
pub struct FwCfg {
    memory: Arc<GuestMemory>,
    items: BTreeMap<u16, Vec<u8>>,
    state: FwCfgState,
}

impl FwCfg {
    /// A device that offers `items` and moves them to `memory`.
    pub fn new(memory: Arc<GuestMemory>, items: FwCfgItems) -> Self {
        Self {
            memory,
            items: items.into_table(),
            state: FwCfgState::default(),
        }
    }

    /// Takes up a saved state: the guest may have selected any item, also one that is not there.
    pub fn restore(&mut self, state: &FwCfgState) {
        self.state = state.clone();
    }

    /// The state to go on from.
    pub fn state(&self) -> FwCfgState {
        self.state.clone()
    }

    /// Deselects.
    pub fn reset(&mut self) {
        self.state = FwCfgState::default();
    }

    fn select(&mut self, key: u16) {
        self.state.key = key;
        self.state.position = 0;
    }

    /// The next up to `len` bytes of the selected item; an unknown one is empty.
    fn rest(&self, len: usize) -> &[u8] {
        let item = self.items.get(&self.state.key);
        let start = usize::try_from(self.state.position).unwrap_or(usize::MAX);
        let rest = item.and_then(|bytes| bytes.get(start..));
        let rest = rest.unwrap_or_default();
        rest.get(..len).unwrap_or(rest)
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.rest(1).first().copied().unwrap_or(0);
        self.state.position = self.state.position.saturating_add(1);
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
            return Err(Refused);
        } else if control & CONTROL_SKIP == 0 {
            return Ok(());
        }
        let position = self.state.position;
        self.state.position = position.saturating_add(u64::from(request.length));
        Ok(())
    }

    fn dma_read(&self, address: GuestAddress, length: usize) -> Result<(), Refused> {
        let bytes = self.rest(length);
        let padding = length - bytes.len();
        if padding > MAX_PADDING || !self.memory.check_range(address, length) {
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
            (DMA_HIGH, [a, b, c, d]) => self.state.dma_high = u32::from_be_bytes([*a, *b, *c, *d]),
            (DMA_LOW, [a, b, c, d]) => {
                let low = u32::from_be_bytes([*a, *b, *c, *d]);
                let high = std::mem::take(&mut self.state.dma_high);
                self.dma((u64::from(high) << 32) | u64::from(low));
            }
            _ => {}
        }
    }
}
