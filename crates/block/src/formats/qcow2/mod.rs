//! qcow2 images, versions 2 and 3: read, written, made, checked and repaired.
//!
//! Follows the QEMU project's specification (`docs/interop/qcow2.rst`): all cluster sizes and widths
//! of refcounts, clusters compressed with zlib or zstd, subclusters, backing files, external data
//! files (raw ones too), internal snapshots. Left out:
//!
//! - Encrypted images are refused.
//! - Internal snapshots are listed and read, and images that have some are written, but none is
//!   made, applied or deleted.
//! - Persistent bitmaps are not maintained: an image that has some is marked accordingly when it is
//!   opened for writing, and their space is lost until the image is repaired.
//! - Lazy refcounts: what allows them is kept, but refcounts are always kept right. An image that
//!   was not closed by somebody who did otherwise is mended when it is opened for writing.
//! - Disks grow, and do not shrink.
//!
//! How it works: [`image`] is the state of an open image, behind one lock, with the mapping in
//! [`tables`] and the free space in [`space`]. [`read`], [`write`](mod@write) and [`zero`] are the
//! requests, [`flush`] brings metadata to the file in an order that no power failure can harm, and
//! [`freed`] keeps space from being used again too early.

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
mod missing;
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
