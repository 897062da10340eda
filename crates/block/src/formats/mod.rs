//! Image formats.

pub mod probe;
pub mod qcow2;
pub mod raw;
