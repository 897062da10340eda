//! Telling whether two images hold the same.

use std::sync::{Mutex, PoisonError};

use edgevmm_block::DiskPaths;
use serde::Serialize;

use crate::disk::Disk;
use crate::walk::in_pieces;
use crate::{ImageError, Job};

/// What two images have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Where the first byte is that differs, if there is one. What one image has beyond the end
    /// of the other is compared with zeroes.
    pub first_difference: Option<u64>,
    /// Sizes of the disks in bytes.
    pub sizes: [u64; 2],
}

impl Comparison {
    /// Whether the disks have the same content and the same size.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.first_difference.is_none() && self.sizes[0] == self.sizes[1]
    }
}

/// Compares what two disks read as, up to the first difference.
///
/// # Errors
///
/// One of them can't be read.
pub fn compare(
    one: &DiskPaths,
    other: &DiskPaths,
    job: &Job<'_>,
) -> Result<Comparison, ImageError> {
    let one = Disk::open(one.open(false)?)?;
    let other = Disk::open(other.open(false)?)?;
    let first = Mutex::new(None::<u64>);
    let known = || *first.lock().unwrap_or_else(PoisonError::into_inner);
    let size = one.size().max(other.size());
    in_pieces(
        size,
        job,
        "nothing was changed",
        |offset, len| {
            // Pieces come in order: once there is a difference, those to come are after it.
            if known().is_some() {
                return Ok((false, len));
            }
            let (one, len) = one.look(offset, len)?;
            let (other, len) = other.look(offset, len)?;
            Ok((one || other, len))
        },
        |piece, buffer| {
            let len = buffer.len();
            buffer.resize(2 * len, 0);
            let (here, there) = buffer.split_at_mut(len);
            one.read_padded(here, piece.offset)?;
            other.read_padded(there, piece.offset)?;
            if here == there {
                return Ok(());
            }
            let at = here.iter().zip(there).position(|(one, other)| one != other);
            let at = piece.offset + at.unwrap_or_default() as u64;
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            *first = Some(first.map_or(at, |first| first.min(at)));
            Ok(())
        },
    )?;
    Ok(Comparison {
        first_difference: known(),
        sizes: [one.size(), other.size()],
    })
}
