//! Targets of `edgevmm-block`: images that somebody hostile made.
//!
//! An input is one image or several files of one, in the form of [`packed`], and what to do with
//! the disk. Nothing here may panic, and so nothing may the crate.

pub mod packed;
mod qcow2;
mod read;
mod seal;

pub use qcow2::{qcow2, qcow2_check, qcow2_write};
pub use read::{ova, probe, vdi, vhd, vhdx, vmdk};
