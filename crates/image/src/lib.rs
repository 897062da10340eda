//! Making, converting, checking and mending disk images: what `edgevmm image` does.
//!
//! Long work takes a [`Job`], through which it tells how far it is and learns that it is wanted no
//! more. Nothing here prints, and nothing opens a file that was not named by the caller: a backing
//! file that an image asks for has to be given, as it has to for running a machine.

mod check;
mod commit;
mod compact;
mod compare;
mod convert;
mod create;
mod disk;
mod error;
mod info;
mod job;
mod map;
mod overlay;
mod resize;
mod target;
mod walk;
mod zero;

pub use check::{Checked, Clusters, check};
pub use commit::{Afterwards, commit};
pub use compact::{Compacted, compact};
pub use compare::{Comparison, compare};
pub use convert::convert;
pub use create::create;
pub use error::ImageError;
pub use info::{BackingInfo, DataFileInfo, Info, Qcow2Info, SnapshotInfo, info, snapshots};
pub use job::Job;
pub use map::{MapRange, map};
pub use overlay::{create_overlay, rebase, record_base};
pub use resize::{NewSize, resize};
pub use target::{Target, TargetFormat};
