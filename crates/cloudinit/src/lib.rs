//! NoCloud seeds for cloud-init, written as ISO 9660 images in memory.
//!
//! [`Seed`] says what the guest shall be told and becomes a disk image that cloud-init finds by its
//! label. Below it, [`Iso`] writes any tree of small files.

mod datetime;
mod iso9660;
mod nocloud;
mod sshkey;
mod userdata;

pub use iso9660::{Iso, IsoError};
pub use nocloud::{Seed, SeedError};
pub use sshkey::{SshKeyError, parse_authorized_keys};
pub use userdata::{UserDataError, UserDataFormat};
