//! The virtual machine monitor: KVM, memory, boot, firmware tables and life cycle.

pub mod kvm;
pub mod layout;
pub mod memory;
pub mod tables;
