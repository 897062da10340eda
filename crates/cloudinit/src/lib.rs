//! Seeds for cloud-init (NoCloud, config drive), written as ISO 9660 images in memory.
//!
//! [`Seed`] says what the guest shall be told and becomes a disk image that cloud-init finds by its
//! label. Below it, [`Iso`] writes any tree of small files.

mod config_drive;
mod datetime;
mod iso9660;
mod nocloud;
mod seed;
mod sshkey;
mod userdata;

pub use iso9660::{Iso, IsoError};
pub use seed::{DataSource, Seed, SeedError};
pub use sshkey::{SshKeyError, parse_authorized_keys};
pub use userdata::{UserDataError, UserDataFormat};
