//! The host bridge at 00:00.0: what firmware wants to see of an Intel Q35 (MCH), or the bridge by
//! which UEFI built for Cloud Hypervisor knows its machine.
//!
//! PAM is plain storage, as the memory it would shadow is always RAM. PCIEXBAR is storage, too,
//! where ECAM is decoded at a fixed address, the one that SeaBIOS programs; OVMF moves it.

use super::config_space::{ConfigSpace, ConfigSpaceBuilder, ConfigSpaceState, Identity};
use super::{DecodedBars, PciFunction, PciSlot};
use crate::state::StateError;

/// SeaBIOS recognises the machine by the device and looks for fw_cfg only with this subsystem.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x29c0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_0000,
    revision: 0,
};

/// PCIEXBAR: base address (multiple of 256 MiB below 64 GiB), length and enable bit.
const PCIEXBAR: [(u8, u32); 2] = [(0x60 / 4, 0xf000_0007), (0x64 / 4, 0xf)];
/// PAM0 to PAM6 at 0x90 to 0x96. SeaBIOS copies itself below 1 MiB when PAM0 reads as 0.
const PAM: [(u8, u32); 2] = [(0x90 / 4, 0xffff_ffff), (0x94 / 4, 0x00ff_ffff)];

/// Which host bridge a machine shows. Firmware takes from it what it is to do without asking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BridgeModel {
    /// Intel Q35, as QEMU has it: SeaBIOS, OVMF.
    #[default]
    Q35,
    /// Cloud Hypervisor's: CLOUDHV.fd of edk2.
    CloudHypervisor,
}

impl BridgeModel {
    fn device(self) -> u16 {
        match self {
            Self::Q35 => IDENTITY.device,
            Self::CloudHypervisor => 0x0d57,
        }
    }
}

#[derive(Debug)]
pub(super) struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    pub(super) fn new(slot: PciSlot) -> Self {
        let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
        for (register, bits) in PCIEXBAR.into_iter().chain(PAM) {
            builder.writable(register, bits);
        }
        Self {
            config: builder.build(slot),
        }
    }

    /// Shows `model` from now on.
    pub(super) fn set_model(&mut self, model: BridgeModel) {
        let vendor = u32::from(IDENTITY.vendor);
        let id = vendor | u32::from(model.device()) << 16;
        self.config.set_constant(0, id);
    }

    /// Where PCIEXBAR puts ECAM, if it does.
    pub(super) fn ecam(&self) -> Option<u64> {
        const ENABLE: u32 = 1;
        let [low, high] = PCIEXBAR.map(|(register, _)| self.config.page().load(register));
        (low & ENABLE != 0).then_some(u64::from(high) << 32 | u64::from(low & 0xf000_0000))
    }

    pub(super) fn state(&self) -> ConfigSpaceState {
        self.config.state()
    }

    pub(super) fn restore(&self, state: &ConfigSpaceState) -> Result<(), StateError> {
        self.config.restore(state)
    }
}

impl PciFunction for HostBridge {
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
