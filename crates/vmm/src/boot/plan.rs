//! What starts the guest at a reset, and what comes after it if it can't.

use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use edgevmm_devices::pci::BridgeModel;

use super::BootError;
use super::cloudhv::CloudHv;
use super::firmware::Firmware;
use super::kernel::Kernel;
use crate::kvm::regs::Entry;
use vm_memory::MmapRegion;

/// One way to start the guest.
#[derive(Debug)]
pub enum Boot {
    /// SeaBIOS finds a disk to boot.
    Bios(Firmware),
    /// UEFI by PVH finds a disk to boot.
    CloudHv(CloudHv),
    /// A kernel, straight.
    Kernel(Kernel),
}

impl Boot {
    /// What it is called in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Boot::Bios(_) => "bios",
            Boot::CloudHv(_) => "uefi",
            Boot::Kernel(_) => "none",
        }
    }

    /// The host bridge that it looks for.
    pub fn bridge(&self) -> BridgeModel {
        match self {
            Boot::Bios(_) | Boot::Kernel(_) => BridgeModel::Q35,
            Boot::CloudHv(_) => BridgeModel::CloudHypervisor,
        }
    }

    /// Whether it gets PCI's configuration ports. A kernel that finds none takes ECAM for
    /// everything, which it reads from memory, where through the ports each read is an exit.
    pub fn config_ports(&self) -> bool {
        match self {
            Boot::Bios(_) | Boot::CloudHv(_) => true,
            Boot::Kernel(_) => false,
        }
    }

    /// Whether it asks for its tables through fw_cfg; others find them in memory.
    pub fn fw_cfg(&self) -> bool {
        match self {
            Boot::Bios(_) => true,
            Boot::CloudHv(_) | Boot::Kernel(_) => false,
        }
    }

    /// Whether it gives PCI functions their addresses; else they have them from the start.
    pub fn places_bars(&self) -> bool {
        match self {
            Boot::Bios(_) | Boot::CloudHv(_) => true,
            Boot::Kernel(_) => false,
        }
    }

    /// The ROM that it runs from, and its guest-physical address.
    pub fn rom(&self) -> Option<(u64, Arc<MmapRegion>)> {
        match self {
            Boot::Bios(firmware) => Some(firmware.rom()),
            Boot::CloudHv(_) | Boot::Kernel(_) => None,
        }
    }

    fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        match self {
            Boot::Bios(firmware) => firmware.load(memory),
            Boot::CloudHv(firmware) => firmware.load(memory),
            Boot::Kernel(kernel) => kernel.load(memory),
        }
    }
}

/// The ways to start the guest, in the order in which they are tried. The order is settled when
/// the machine is built; one that gives up is not tried again.
#[derive(Debug)]
pub struct BootPlan {
    current: Boot,
    /// Those that are left, the next one last.
    later: Vec<Boot>,
    /// How many were given up.
    given_up: u32,
}

impl BootPlan {
    /// Starts with `first`; when that gives up, with those of `others` in turn.
    pub fn new(first: Boot, others: Vec<Boot>) -> Self {
        let mut later = others;
        later.reverse();
        Self {
            current: first,
            later,
            given_up: 0,
        }
    }

    /// What starts the guest at the next reset.
    pub fn current(&self) -> &Boot {
        &self.current
    }

    /// All that may still start the guest.
    pub fn all(&self) -> impl Iterator<Item = &Boot> {
        std::iter::once(&self.current).chain(self.later.iter().rev())
    }

    /// How many ways were given up: with the config it tells [`BootPlan::current`].
    pub fn given_up(&self) -> u32 {
        self.given_up
    }

    /// Gives up the current way for the next one. Says whether there is one.
    pub fn fall_back(&mut self) -> bool {
        match self.later.pop() {
            Some(next) => {
                self.current = next;
                self.given_up += 1;
                true
            }
            None => false,
        }
    }

    /// Writes to guest memory what a start at power-on needs.
    ///
    /// # Errors
    /// Fails when it does not fit or can't be read.
    pub fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        self.current.load(memory)
    }
}
