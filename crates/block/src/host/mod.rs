//! Files and block devices of the host, and guest memory as the kernel is told of it.

mod file;
pub mod lock;
mod memory;

pub use file::{HostFile, Unflushed, check_kind};
pub use memory::Window;
