//! The LPC bridge of Intel's ICH9 at 00:1f.0, as far as OVMF sets it up: an ISA bridge, below which
//! it looks for the serial port, with the base of the power management ports (PMBASE, ACPI_CNTL),
//! the interrupt routing of PCI pins (PIRQ) and the base of the chipset registers (RCBA).
//!
//! All of these are plain storage. The power management ports are decoded at a fixed address, the
//! one that OVMF programs; pins have fixed lines, those that it writes here; chipset registers do
//! not exist.

use super::config_space::{ConfigSpace, ConfigSpaceBuilder, Identity};
use super::{DecodedBars, PciFunction, PciSlot};

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x2918,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_0100,
    revision: 2,
};

/// PMBASE, ACPI_CNTL, PIRQA to PIRQD, PIRQE to PIRQH and RCBA, with the bits that exist.
const STORAGE: [(u8, u32); 5] = [
    (0x40 / 4, 0x0000_ff80),
    (0x44 / 4, 0x0000_0087),
    (0x60 / 4, 0x8f8f_8f8f),
    (0x68 / 4, 0x8f8f_8f8f),
    (0xf0 / 4, 0xffff_c001),
];

/// The LPC bridge.
#[derive(Debug)]
pub struct LpcBridge {
    config: ConfigSpace,
}

impl LpcBridge {
    /// Slot of the bridge: firmware looks for it nowhere else.
    pub const SLOT: u8 = 31;

    /// A bridge in the slot that was reserved for it.
    pub fn new(slot: PciSlot) -> Self {
        let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
        for (register, bits) in STORAGE {
            builder.writable(register, bits);
        }
        Self {
            config: builder.build(slot),
        }
    }

    /// The registers' values.
    pub fn state(&self) -> super::config_space::ConfigSpaceState {
        self.config.state()
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses one that this bridge can't have.
    pub fn restore(
        &self,
        state: &super::config_space::ConfigSpaceState,
    ) -> Result<(), crate::state::StateError> {
        self.config.restore(state)
    }
}

impl PciFunction for LpcBridge {
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.config.reset();
    }
}
