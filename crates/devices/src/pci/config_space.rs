//! The registers of a PCI function: type 0 header, memory BARs and the capability list
//! (PCI Local Bus 3.0, chapter 6).
//!
//! Every bit is either constant or plain storage. A BAR needs nothing more: its low bits are
//! constant zeroes, so that writing ones reads back its size. The one bit that changes by itself
//! is the interrupt bit of STATUS, see [`ConfigSpace::page`].

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::config_memory::ConfigPage;
use super::dword::dword_parts;
use super::{DecodedBar, DecodedBars, PciError, PciSlot};
use crate::state::{StateError, same};

/// Registers that exist: the header and the capabilities, 256 bytes.
const REGISTERS: usize = 64;
const FIRST_CAPABILITY: u8 = 0x40;
const CAPABILITIES_POINTER: u8 = 0x34;

/// Number of the register that holds COMMAND (low half) and STATUS (high half).
pub const COMMAND_STATUS: u8 = 1;
/// COMMAND: memory BARs are decoded.
pub const COMMAND_MEMORY: u32 = 1 << 1;
/// COMMAND: the function may master the bus.
pub const COMMAND_BUS_MASTER: u32 = 1 << 2;
/// COMMAND: the function must not assert its interrupt pin.
pub const COMMAND_INTX_DISABLE: u32 = 1 << 10;
/// STATUS: the function wants to assert its interrupt pin.
pub const STATUS_INTERRUPT: u32 = 1 << 19;
/// STATUS: there is a capability list.
const STATUS_CAPABILITIES: u32 = 1 << 20;

const REGISTER_CLASS: u8 = 2;
const REGISTER_BAR0: u8 = 4;
const REGISTER_SUBSYSTEM: u8 = 11;
const REGISTER_INTERRUPT: u8 = 15;

/// Who made a function and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class, subclass and programming interface: the low 24 bits.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

/// Puts together the configuration space of a function.
#[derive(Debug)]
pub struct ConfigSpaceBuilder {
    initial: [u32; REGISTERS],
    writable: [u32; REGISTERS],
    bar_lengths: [Option<u32>; 6],
    /// Where the next capability goes.
    next_capability: u8,
    /// Where the pointer to it is.
    last_pointer: u8,
}

impl ConfigSpaceBuilder {
    /// A header without BARs, interrupt pin or capabilities.
    pub fn new(identity: &Identity) -> Self {
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let mut builder = Self {
            initial: [0; REGISTERS],
            writable: [0; REGISTERS],
            bar_lengths: [None; 6],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES_POINTER,
        };
        builder.set(0, pair(identity.vendor, identity.device));
        builder.set(
            REGISTER_CLASS,
            identity.class << 8 | u32::from(identity.revision),
        );
        builder.set(
            REGISTER_SUBSYSTEM,
            pair(identity.subsystem_vendor, identity.subsystem),
        );
        builder.writable(
            COMMAND_STATUS,
            COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE,
        );
        builder
    }

    fn set(&mut self, register: u8, bits: u32) {
        if let Some(value) = self.initial.get_mut(usize::from(register)) {
            *value |= bits;
        }
    }

    /// Makes `bits` of a register (by number) plain storage.
    pub fn writable(&mut self, register: u8, bits: u32) {
        if let Some(value) = self.writable.get_mut(usize::from(register)) {
            *value |= bits;
        }
    }

    /// Says that the function uses interrupt pin A.
    pub fn interrupt_pin_a(&mut self) {
        self.set(REGISTER_INTERRUPT, 1 << 8);
        self.writable(REGISTER_INTERRUPT, 0xff);
    }

    /// Adds a 32-bit, non-prefetchable memory BAR of `len` bytes that is at `address` after
    /// power-on (0: not assigned).
    ///
    /// # Errors
    /// Refuses a length that is no power of two from 16 up, an address that is not a multiple of
    /// it, and a BAR that does not or already does exist.
    pub fn memory_bar(&mut self, bar: u8, len: u32, address: u32) -> Result<(), PciError> {
        let invalid = PciError::InvalidBar { bar, len, address };
        let aligned = len.is_power_of_two() && len >= 16 && address & (len - 1) == 0;
        match self.bar_lengths.get_mut(usize::from(bar)) {
            Some(free @ None) if aligned => *free = Some(len),
            _ => return Err(invalid),
        }
        self.set(REGISTER_BAR0 + bar, address);
        self.writable(REGISTER_BAR0 + bar, !(len - 1));
        Ok(())
    }

    /// Appends a capability. `body` is what follows its id and next pointer; of each byte the bits
    /// in `writable` (as long as `body` or shorter) are storage. Returns its offset.
    ///
    /// # Errors
    /// Fails when there is no room left.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, PciError> {
        let offset = self.next_capability;
        let end = usize::from(offset) + 2 + body.len();
        // What follows a capability at the very end would not have an offset of one byte.
        let next =
            u8::try_from(end.next_multiple_of(4)).map_err(|_| PciError::NoRoomForCapability(id))?;

        set_byte(&mut self.initial, self.last_pointer.into(), offset);
        self.set(COMMAND_STATUS, STATUS_CAPABILITIES);
        let start = usize::from(offset);
        set_byte(&mut self.initial, start, id);
        for (index, byte) in (start + 2..).zip(body) {
            set_byte(&mut self.initial, index, *byte);
        }
        for (index, byte) in (start + 2..end).zip(writable) {
            set_byte(&mut self.writable, index, *byte);
        }
        self.last_pointer = offset + 1;
        self.next_capability = next;
        Ok(offset)
    }

    /// Writes the registers to the page of `slot`.
    pub fn build(self, slot: PciSlot) -> ConfigSpace {
        let config = ConfigSpace {
            page: slot.page,
            window: slot.window,
            initial: self.initial,
            writable: self.writable,
            bar_lengths: self.bar_lengths,
        };
        config.reset();
        config
    }
}

/// Bits of a register that change by themselves.
fn volatile(register: u8) -> u32 {
    if register == COMMAND_STATUS {
        STATUS_INTERRUPT
    } else {
        0
    }
}

fn set_byte(registers: &mut [u32; REGISTERS], offset: usize, byte: u8) {
    if let Some(register) = registers.get_mut(offset / 4) {
        let shift = offset % 4 * 8;
        *register = *register & !(0xff << shift) | u32::from(byte) << shift;
    }
}

/// The configuration space of a function.
#[derive(Debug)]
pub struct ConfigSpace {
    page: ConfigPage,
    window: Range<u64>,
    initial: [u32; REGISTERS],
    writable: [u32; REGISTERS],
    bar_lengths: [Option<u32>; 6],
}

impl ConfigSpace {
    /// The registers themselves. Whoever owns the function may change constant bits through
    /// this, from any thread.
    pub fn page(&self) -> &ConfigPage {
        &self.page
    }

    /// Writes `data` at `offset` as far as bits are writable.
    pub fn write(&self, offset: u16, data: &[u8]) {
        for part in dword_parts(offset.into(), data.len()) {
            let register = u8::try_from(part.dword / 4).ok();
            let Some(register) = register.filter(|r| usize::from(*r) < REGISTERS) else {
                continue;
            };
            let (value, mask) = part.insert(data);
            let writable = self.writable.get(usize::from(register));
            let mask = mask & writable.copied().unwrap_or(0);
            if mask != 0 {
                self.page.update(register, mask, value);
            }
        }
    }

    /// The BARs that are decoded: memory decoding is on and they lie inside of the host's window.
    pub fn decoded(&self) -> DecodedBars {
        let enabled = self.page.load(COMMAND_STATUS) & COMMAND_MEMORY != 0;
        let mut decoded = DecodedBars::default();
        for (bar, (slot, len)) in (0..).zip(decoded.iter_mut().zip(self.bar_lengths)) {
            let Some(len) = len.filter(|_| enabled) else {
                continue;
            };
            let base = u64::from(self.page.load(REGISTER_BAR0 + bar) & !0xf);
            let len = u64::from(len);
            if base >= self.window.start && base + len <= self.window.end {
                *slot = Some(DecodedBar { bar, base, len });
            }
        }
        decoded
    }

    /// Gives a register of constant bits another value, which it also has after each reset.
    pub fn set_constant(&mut self, register: u8, value: u32) {
        if let Some(initial) = self.initial.get_mut(usize::from(register)) {
            *initial = value;
            self.page.update(register, u32::MAX, value);
        }
    }

    /// Puts every register back to its value after power-on.
    pub fn reset(&self) {
        for (register, value) in (0..).zip(self.initial) {
            self.page.update(register, u32::MAX, value);
        }
    }

    /// The registers' values.
    pub fn state(&self) -> ConfigSpaceState {
        ConfigSpaceState {
            registers: (0..).map(|r| self.page.load(r)).take(REGISTERS).collect(),
        }
    }

    /// Takes up a saved state, but for the interrupt bit of STATUS, which whoever owns the
    /// function brings up to date.
    ///
    /// # Errors
    /// Refuses the state of a function that differs in what no driver can write.
    pub fn restore(&self, state: &ConfigSpaceState) -> Result<(), StateError> {
        let saved = &state.registers;
        same("number of PCI registers", saved.len(), REGISTERS)?;
        let fixed = self.initial.iter().zip(&self.writable);
        for (register, (saved, (initial, writable))) in (0_u8..).zip(saved.iter().zip(fixed)) {
            let changes = writable | volatile(register);
            same("PCI register", saved & !changes, initial & !changes)?;
        }
        for (register, saved) in (0_u8..).zip(saved) {
            let mask = !volatile(register);
            self.page.update(register, mask, *saved);
        }
        Ok(())
    }
}

/// State of a [`ConfigSpace`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    /// All the registers by number.
    pub registers: Vec<u32>,
}
