//! The virtual machine monitor: KVM, memory, boot, firmware tables and life cycle.

pub mod layout;
