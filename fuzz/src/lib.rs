//! What each fuzz target does with its input.
//!
//! The functions are also run by the project's tests, on every seed: `images` in crates/block,
//! `config` in crates/config, `seed` in crates/cloudinit, `agent` in crates/agent, `lease` in
//! crates/lease, `ahci` and `legacy` in crates/devices and `fast` in firmware/fast.

pub mod agent;
pub mod ahci;
pub mod config;
pub mod fast;
pub mod images;
pub mod lease;
pub mod legacy;
pub mod seed;
