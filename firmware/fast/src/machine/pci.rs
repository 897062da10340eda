//! PCI by ECAM: one bus, BARs placed from a window's start up (PCI Local Bus 3.0, 6.2.5).

use super::memory;

const SLOTS: u8 = 32;
const BARS: u64 = 6;
const VENDOR: u64 = 0;
const DEVICE: u64 = 2;
const COMMAND: u64 = 4;
const COMMAND_MEMORY_AND_MASTER: u16 = 0b110;
const STATUS: u64 = 6;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR: u64 = 0x10;
const BAR_IO: u32 = 1;
const BAR_FLAGS: u32 = 0xf;
const BAR_64: u32 = 0b100;
const CAPABILITIES: u64 = 0x34;
const ABSENT: u16 = 0xffff;
/// More capabilities have no room.
const CAPABILITIES_MAX: u32 = 48;

/// A function of the bus.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    config: u64,
}

impl Function {
    /// The function in `slot`, if there is one.
    pub fn find(ecam: u64, slot: u8) -> Option<Self> {
        let config = ecam + (u64::from(slot) << 15);
        let function = Self { config };
        (function.vendor() != ABSENT).then_some(function)
    }

    /// Its vendor.
    pub fn vendor(self) -> u16 {
        self.read(VENDOR)
    }

    /// Its device id.
    pub fn device(self) -> u16 {
        self.read(DEVICE)
    }

    /// Reads configuration space.
    pub fn read<T: Copy>(self, offset: u64) -> T {
        memory::read(self.config + offset)
    }

    /// Where a BAR is.
    pub fn bar(self, bar: u8) -> Option<u64> {
        let offset = BAR + 4 * u64::from(bar);
        let value: u32 = self.read(offset);
        let memory = u64::from(bar) < BARS && value & BAR_IO == 0;
        memory.then_some(u64::from(value & !BAR_FLAGS))
    }

    /// Has it decode its BARs and reach memory.
    pub fn enable(self) {
        let command: u16 = self.read(COMMAND);
        memory::write(self.config + COMMAND, command | COMMAND_MEMORY_AND_MASTER);
    }

    /// Offsets of its capabilities of this kind.
    pub fn capabilities(self, kind: u8) -> impl Iterator<Item = u64> {
        let listed = self.read::<u16>(STATUS) & STATUS_CAPABILITIES != 0;
        let mut next: u8 = if listed { self.read(CAPABILITIES) } else { 0 };
        let mut left = CAPABILITIES_MAX;
        let all = core::iter::from_fn(move || {
            let at = u64::from(next & !3);
            left = left.checked_sub(1)?;
            (at != 0).then(|| {
                next = self.read(at + 1);
                at
            })
        });
        all.filter(move |at| self.read::<u8>(*at) == kind)
    }
}

/// Gives the memory BARs of all functions addresses from `window` up.
pub fn place_bars(ecam: u64, window: u64) {
    let mut next = window;
    for function in (0..SLOTS).filter_map(|slot| Function::find(ecam, slot)) {
        let mut bars = 0..BARS;
        while let Some(bar) = bars.next() {
            let register = function.config + BAR + 4 * bar;
            memory::write(register, u32::MAX);
            let mask: u32 = memory::read(register);
            if mask & !BAR_FLAGS == 0 || mask & BAR_IO != 0 {
                memory::write(register, 0_u32);
                continue;
            }
            let len = u64::from(!(mask & !BAR_FLAGS)) + 1;
            next = next.next_multiple_of(len);
            memory::write(register, next as u32);
            next += len;
            if mask & BAR_64 != 0 {
                bars.next();
                memory::write(register + 4, 0_u32);
            }
        }
    }
}
