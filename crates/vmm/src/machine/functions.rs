//! The functions on the PCI bus beside its bridge, whatever kind they are of.

use edgevmm_devices::ahci::{Ahci, AhciState};
use edgevmm_devices::bus::{Shared, lock};
use edgevmm_devices::pci::watchdog::{Watchdog, WatchdogState};
use edgevmm_devices::state::{StateError, same};
use edgevmm_devices::virtio::transport::{VirtioPci, VirtioPciState};
use serde::{Deserialize, Serialize};

/// A function on the PCI bus.
#[derive(Debug)]
pub enum Function {
    /// A virtio device.
    Virtio(Shared<VirtioPci>),
    /// A SATA adapter.
    Sata(Shared<Ahci>),
    /// A watchdog.
    Watchdog(Shared<Watchdog>),
}

/// State of a [`Function`].
#[derive(Debug, Serialize, Deserialize)]
pub enum FunctionState {
    /// Of a virtio device.
    Virtio(VirtioPciState),
    /// Of a SATA adapter.
    Sata(AhciState),
    /// Of a watchdog.
    Watchdog(WatchdogState),
}

impl FunctionState {
    /// A number for each kind, for messages.
    fn kind(&self) -> u8 {
        match self {
            Self::Virtio(_) => 0,
            Self::Sata(_) => 1,
            Self::Watchdog(_) => 2,
        }
    }
}

impl Function {
    /// Stops the function with nothing in flight and gives its state.
    pub fn suspend(&self) -> FunctionState {
        match self {
            Self::Virtio(function) => FunctionState::Virtio(lock(function).suspend()),
            Self::Sata(function) => FunctionState::Sata(lock(function).suspend()),
            Self::Watchdog(watchdog) => {
                let mut watchdog = lock(watchdog);
                watchdog.hold();
                FunctionState::Watchdog(watchdog.state())
            }
        }
    }

    /// Takes up a saved state, suspended.
    ///
    /// # Errors
    /// Refuses a state that the function can't be in.
    pub fn restore(&self, state: &FunctionState) -> Result<(), StateError> {
        match (self, state) {
            (Self::Virtio(function), FunctionState::Virtio(state)) => lock(function).restore(state),
            (Self::Sata(function), FunctionState::Sata(state)) => lock(function).restore(state),
            (Self::Watchdog(watchdog), FunctionState::Watchdog(state)) => {
                lock(watchdog).restore(state)
            }
            (Self::Virtio(_), saved) => same("kind of a PCI function", saved.kind(), 0_u8),
            (Self::Sata(_), saved) => same("kind of a PCI function", saved.kind(), 1_u8),
            (Self::Watchdog(_), saved) => same("kind of a PCI function", saved.kind(), 2_u8),
        }
    }

    /// Has the time stand still for a function that minds it, while vCPUs halt.
    pub fn pause(&self) {
        if let Self::Watchdog(watchdog) = self {
            lock(watchdog).hold();
        }
    }

    /// Goes on after [`Function::pause`], [`Function::suspend`] or [`Function::restore`].
    pub fn resume(&self) {
        match self {
            Self::Virtio(function) => lock(function).resume(),
            Self::Sata(function) => lock(function).resume(),
            Self::Watchdog(watchdog) => lock(watchdog).release(),
        }
    }
}

/// A device that firmware may boot from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BootDevice {
    /// A virtio disk.
    Virtio {
        /// Its slot.
        slot: u8,
    },
    /// A disk or CD-ROM drive of a SATA adapter.
    Sata {
        /// Slot of the adapter.
        slot: u8,
        /// Port of the drive.
        port: usize,
    },
    /// A network interface.
    Net {
        /// Its slot.
        slot: u8,
    },
}

impl BootDevice {
    /// The slots of those at the front of a boot order that are virtio disks, which the project's
    /// own firmware boots from.
    pub fn virtio_slots(order: &[Self]) -> Vec<u8> {
        let slot = |device: &Self| match *device {
            Self::Virtio { slot } => Some(slot),
            Self::Sata { .. } | Self::Net { .. } => None,
        };
        order.iter().map_while(slot).collect()
    }

    /// Its path in OpenFirmware's form, as SeaBIOS knows it.
    pub fn path(self) -> String {
        match self {
            Self::Virtio { slot } => format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0"),
            Self::Sata { slot, port } => {
                format!("/pci@i0cf8/pci8086,2922@{slot:x}/drive@{port:x}/disk@0")
            }
            Self::Net { slot } => format!("/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_in_hexadecimal() {
        let path = BootDevice::Virtio { slot: 10 }.path();
        assert_eq!(path, "/pci@i0cf8/scsi@a/disk@0,0");
        let path = BootDevice::Sata { slot: 31, port: 5 }.path();
        assert_eq!(path, "/pci@i0cf8/pci8086,2922@1f/drive@5/disk@0");
        let path = BootDevice::Net { slot: 3 }.path();
        assert_eq!(path, "/pci@i0cf8/ethernet@3/ethernet-phy@0");
    }

    #[test]
    fn what_follows_a_drive_does_not_go_before_it() {
        let virtio = |slot| BootDevice::Virtio { slot };
        let order = [
            virtio(2),
            virtio(1),
            BootDevice::Sata { slot: 4, port: 0 },
            virtio(3),
        ];
        assert_eq!(BootDevice::virtio_slots(&order), [2, 1]);
    }
}
