//! What starts the guest at a reset, and what comes after it if it can't.

use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use edgevmm_devices::pci::BridgeModel;

use super::BootError;
use super::cloudhv::CloudHv;
use super::fast::Fast;
use super::firmware::Firmware;
use super::kernel::Kernel;
use super::ovmf::{Ovmf, VarsFile};
use crate::kvm::regs::Entry;
use vm_memory::MmapRegion;

/// One way to start the guest.
#[derive(Debug)]
pub enum Boot {
    /// SeaBIOS finds a disk to boot.
    Bios(Firmware),
    /// UEFI by PVH finds a disk to boot.
    CloudHv(CloudHv),
    /// The project's own firmware finds a disk's Linux, or declines.
    Fast(Fast),
    /// UEFI in a flash finds a disk to boot.
    Ovmf(Ovmf),
    /// A kernel, straight.
    Kernel(Kernel),
}

impl Boot {
    /// What it is called in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Boot::Bios(_) => "bios",
            Boot::CloudHv(_) | Boot::Ovmf(_) => "uefi",
            Boot::Fast(_) => "fast",
            Boot::Kernel(_) => "none",
        }
    }

    /// The host bridge that it looks for.
    pub fn bridge(&self) -> BridgeModel {
        match self {
            Boot::Bios(_) | Boot::Ovmf(_) | Boot::Fast(_) | Boot::Kernel(_) => BridgeModel::Q35,
            Boot::CloudHv(_) => BridgeModel::CloudHypervisor,
        }
    }

    /// Whether it gets PCI's configuration ports. A kernel that finds none takes ECAM for
    /// everything, which it reads from memory, where through the ports each read is an exit.
    pub fn config_ports(&self) -> bool {
        match self {
            Boot::Bios(_) | Boot::CloudHv(_) | Boot::Ovmf(_) => true,
            Boot::Fast(_) | Boot::Kernel(_) => false,
        }
    }

    /// Whether it asks for its tables through fw_cfg; others find them in memory.
    pub fn fw_cfg(&self) -> bool {
        match self {
            Boot::Bios(_) | Boot::Ovmf(_) => true,
            Boot::CloudHv(_) | Boot::Fast(_) | Boot::Kernel(_) => false,
        }
    }

    /// Whether it boots from the network by an option ROM; others have drivers of their own.
    pub fn net_rom(&self) -> bool {
        matches!(self, Boot::Bios(_))
    }

    /// Whether it gives PCI functions their addresses; else they have them from the start.
    pub fn places_bars(&self) -> bool {
        match self {
            Boot::Bios(_) | Boot::CloudHv(_) | Boot::Ovmf(_) | Boot::Fast(_) => true,
            Boot::Kernel(_) => false,
        }
    }

    /// Whether it says at a port what it decides.
    pub fn reports(&self) -> bool {
        matches!(self, Boot::Fast(_))
    }

    /// The ROMs that it runs from, and their guest-physical addresses.
    pub fn roms(&self) -> Vec<(u64, Arc<MmapRegion>)> {
        match self {
            Boot::Bios(firmware) => vec![firmware.rom()],
            Boot::Ovmf(firmware) => firmware.roms(),
            Boot::CloudHv(_) | Boot::Fast(_) | Boot::Kernel(_) => Vec::new(),
        }
    }

    /// The flash with its variables, and its guest-physical address.
    pub fn flash(&self) -> Option<(u64, Arc<VarsFile>)> {
        match self {
            Boot::Ovmf(firmware) => firmware.flash(),
            Boot::Bios(_) | Boot::CloudHv(_) | Boot::Fast(_) | Boot::Kernel(_) => None,
        }
    }

    /// Whether it places ECAM itself, and PCI functions below it, as OVMF does.
    pub fn places_ecam(&self) -> bool {
        matches!(self, Boot::Ovmf(_))
    }

    fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        match self {
            Boot::Bios(firmware) => firmware.load(memory),
            Boot::CloudHv(firmware) => firmware.load(memory),
            Boot::Fast(firmware) => firmware.load(memory),
            Boot::Ovmf(_) => Ok(Entry::ResetVector),
            Boot::Kernel(kernel) => kernel.load(memory),
        }
    }
}

/// The ways to start the guest, in the order in which they are tried. The order is settled when
/// the machine is built.
#[derive(Debug)]
pub struct BootPlan {
    first: Boot,
    others: Vec<Boot>,
    /// How many were given up since the machine was reset.
    given_up: usize,
}

impl BootPlan {
    /// Starts with `first`; when that gives up, with those of `others` in turn.
    pub fn new(first: Boot, others: Vec<Boot>) -> Self {
        Self {
            first,
            others,
            given_up: 0,
        }
    }

    /// What starts the guest at the next reset.
    pub fn current(&self) -> &Boot {
        let later = self.given_up.checked_sub(1);
        let later = later.and_then(|index| self.others.get(index));
        later.unwrap_or(&self.first)
    }

    /// All that may start the guest.
    pub fn all(&self) -> impl Iterator<Item = &Boot> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Has firmware that needs to know boot from the disks in these PCI slots.
    pub fn set_boot_slots(&mut self, slots: &[u8]) {
        for boot in std::iter::once(&mut self.first).chain(&mut self.others) {
            if let Boot::Fast(fast) = boot {
                fast.set_boot_slots(slots);
            }
        }
    }

    /// How many ways were given up: with the config it tells [`BootPlan::current`].
    pub fn given_up(&self) -> u32 {
        u32::try_from(self.given_up).unwrap_or(u32::MAX)
    }

    /// Gives up the current way for the next one. Says whether there is one.
    pub fn fall_back(&mut self) -> bool {
        let more = self.given_up < self.others.len();
        if more {
            self.given_up += 1;
        }
        more
    }

    /// Begins with the first way again: what it stumbled over may be gone.
    pub fn start_over(&mut self) {
        self.given_up = 0;
    }

    /// Writes to guest memory what a start at power-on needs.
    ///
    /// # Errors
    /// Fails when it does not fit or can't be read.
    pub fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        let later = self.given_up.checked_sub(1);
        match later.and_then(|index| self.others.get_mut(index)) {
            Some(later) => later.load(memory),
            None => self.first.load(memory),
        }
    }
}
