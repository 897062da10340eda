//! The machine that the firmware runs on: one processor, identity-mapped, without interrupts.

pub mod cpu;
pub mod entry;
pub mod heap;
pub mod memory;
pub mod pci;
pub mod port;
pub mod virtio_blk;
