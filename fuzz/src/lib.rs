//! What each fuzz target does with its input.
//!
//! The functions are also run by the project's tests, on every seed: `images` in crates/block,
//! `config` in crates/config and `seed` in crates/cloudinit.

pub mod config;
pub mod images;
pub mod seed;
