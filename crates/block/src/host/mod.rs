//! Files and block devices of the host, and guest memory as the kernel is told of it.
//!
//! This is the only room of the crate that hands memory to the kernel.

mod direct;
mod file;
mod flush;
pub mod lock;
mod memory;
#[cfg(test)]
pub mod record;
mod transfer;
pub mod uring;

pub use file::{HostFile, check_kind, identity, is_read_only_device};
pub use flush::Unflushed;
pub use memory::Window;
