//! The devices of a legacy PC.

pub mod acpi_pm;
pub mod boot_port;
pub mod clock;
pub mod cmos;
pub mod debug_port;
pub mod fw_cfg;
pub mod i8042;
pub mod pflash;
pub mod pvpanic;
pub mod serial;
