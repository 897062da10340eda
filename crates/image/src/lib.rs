//! Making, converting, checking and mending disk images: what `edgevmm image` does.
//!
//! Long work takes a [`Job`], through which it tells how far it is and learns that it is wanted no
//! more. Nothing here prints, and nothing opens a file that was not named by the caller: a backing
//! file that an image asks for has to be given, as it has to for running a machine.

mod compare;
mod convert;
mod create;
mod disk;
mod error;
mod job;
mod map;
mod target;
mod walk;
mod zero;

pub use compare::{Comparison, compare};
pub use convert::convert;
pub use create::create;
pub use error::ImageError;
pub use job::Job;
pub use map::{MapRange, map};
pub use target::{Target, TargetFormat};
