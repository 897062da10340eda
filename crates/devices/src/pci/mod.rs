//! PCI: one bus of functions, their configuration space, and the host bridge that reaches them.
//!
//! PCI Local Bus 3.0 as far as a driver can see it; configuration space by ports 0xcf8/0xcfc
//! and by ECAM. Left out: bridges, multi-function devices, I/O and 64-bit BARs, expansion ROMs,
//! PCI Express capabilities, power management and hot plug. COMMAND's bus master bit is storage:
//! it does not keep a device from guest memory.
//!
//! # Locks
//! A vCPU thread that reads configuration space takes no lock at all. One that writes it, or
//! that accesses a BAR, takes the lock of the one function concerned; while holding it the host
//! may take the lock of its table of decoded BARs, never the other way round. A function may
//! wait for its device's thread with its lock held, so no device thread may take a function's
//! lock: devices talk back through [`crate::virtio::Notifier`], which takes none.

mod bridge;
pub mod config_memory;
pub mod config_space;
pub(crate) mod dword;
mod fronts;
mod host;
mod lpc;
pub mod msi;
pub mod msix;
#[cfg(test)]
mod tests;
pub mod watchdog;

pub use bridge::BridgeModel;
pub use fronts::{PciConfigPorts, PciEcam, PciWindow};
pub use host::{PciHost, PciHostState, PciSlot};
pub use lpc::LpcBridge;

use std::io;

/// Why a PCI function can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// The memory of configuration space can't be had.
    #[error("Failed to map memory for PCI configuration space")]
    ConfigMemory(#[source] io::Error),
    /// A function's timer can't be had.
    #[error("Failed to make a timer for a PCI function")]
    Timer(#[source] io::Error),
    /// There is no such slot.
    #[error("The PCI bus has no slot {0}")]
    NoSuchSlot(u8),
    /// Another function has the slot.
    #[error("Slot {0} of the PCI bus is taken")]
    SlotTaken(u8),
    /// The capabilities don't fit.
    #[error("Capability {0:#x} does not fit into PCI configuration space")]
    NoRoomForCapability(u8),
    /// The BAR's number, size or address is invalid, or it exists already.
    #[error("BAR {bar} can't be {len:#x} bytes at {address:#x}")]
    InvalidBar {
        /// BAR index.
        bar: u8,
        /// Length in bytes.
        len: u32,
        /// Initial address.
        address: u32,
    },
    /// More MSI-X vectors than the specification allows, or none.
    #[error("A function can't have {0} MSI-X vectors")]
    InvalidVectorCount(u16),
}

/// A PCI function as the host bridge sees it.
///
/// Configuration reads have no side effects. They are answered from the function's page of
/// [`config_memory::ConfigMemory`], which the VMM may also map into the guest read-only, and so
/// never reach the function.
pub trait PciFunction: Send {
    /// Writes `data` to configuration space: 1 to 4 bytes within one aligned dword.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// The memory BARs that are decoded now.
    fn decoded(&self) -> DecodedBars;

    /// Reads from a memory BAR. `data` comes filled with ones.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes to a memory BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Returns to the state after power-on.
    fn reset(&mut self);
}

/// One decoded memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodedBar {
    /// BAR index, 0 to 5.
    pub bar: u8,
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The decoded BARs of a function, without allocation: at most six.
pub type DecodedBars = [Option<DecodedBar>; 6];
