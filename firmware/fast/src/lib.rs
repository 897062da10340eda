//! What the firmware does with a disk's bytes: finds the Linux that the disk would boot, and where
//! in memory it goes. No hardware, no `unsafe`; the program around it has both.
//!
//! Everything read is hostile. Readers are bounded in memory, depth and steps, and whatever they
//! don't understand on the way to the kernel is a [`Decline`]: another firmware boots then, as it
//! would have without this one. Nothing is ever written to a disk.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;
// The fuzz targets name this crate as others see it.
#[cfg(test)]
extern crate self as edgevmm_fast;

pub mod bls;
pub mod choice;
pub mod decline;
pub mod disk;
pub mod grub;
pub mod linux;
pub mod parameters;
pub mod partitions;
pub mod pe;
#[cfg(test)]
mod seeds;
pub mod start_info;
#[cfg(test)]
mod testing;
pub mod volume;

pub use decline::{Decline, Reason};
