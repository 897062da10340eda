//! What firmware and operating system read of the machine: ACPI, SMBIOS and the memory map.
//!
//! Pure functions from a description to bytes. Each comes in two forms: placed, for a kernel that
//! is started directly, and as `fw_cfg` files, for firmware that places them itself.

pub mod acpi;
pub mod e820;
pub mod loader;
pub mod smbios;

/// A `fw_cfg` file: its name and content.
pub type FirmwareFile = (&'static str, Vec<u8>);

/// Bytes at a guest-physical address.
pub type PlacedBytes = (u64, Vec<u8>);
