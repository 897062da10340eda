//! qcow2 images, versions 2 and 3.
//!
//! Follows the QEMU project's qcow2 specification (`docs/interop/qcow2.rst`).

mod backing;
mod cache;
mod check;
mod codec;
mod create;
mod damage;
mod describe;
mod disk;
mod encode;
mod entry;
mod external;
mod flush;
mod freed;
mod grow;
mod header;
mod image;
mod layout;
mod open;
mod own;
mod pack;
mod payload;
mod places;
mod read;
mod refcounts;
mod snapshots;
mod space;
mod tables;
#[cfg(test)]
mod tests;
mod unpacked;
mod write;
mod zero;

pub use backing::{HeaderParts, edit_header};
pub use check::{CheckReport, Repair, check};
pub use create::{Compression, CreateOptions, DataFileName, Extension, create, create_in};
pub use describe::{DataFile, Description, Snapshot, describe};
pub use disk::Qcow2Disk;
pub use header::Header;
pub use open::{open_disk, open_layer, open_temporary};
