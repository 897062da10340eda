//! Device models: buses, PCI, virtio and the legacy PC.
//!
//! Devices know neither KVM nor files' paths. What they need of the machine they get through
//! the traits in [`platform`]; what they need of the host (disks, taps, console ends) through
//! the backend traits beside each device. Each device keeps its config (fixed at build time)
//! apart from its state (a serialisable struct).

pub mod ahci;
pub mod bus;
pub mod channel;
pub mod console;
pub mod disk;
pub mod legacy;
pub mod pci;
pub mod platform;
pub mod state;
#[cfg(test)]
mod testing;
pub mod virtio;

/// Guest memory as every device sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
