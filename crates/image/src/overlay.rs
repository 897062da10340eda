//! Overlays: making them, and putting them on another base.

use std::path::Path;

use edgevmm_block::qcow2::{self, Description};
use edgevmm_block::{
    DiskOptions, DiskPaths, Existing, ImageFormat, MapKind, NewFile, open_path, overlay,
};

use crate::create::check_size;
use crate::disk::Disk;
use crate::walk::{Piece, in_pieces};
use crate::{ImageError, Job};

/// Unit in which content is compared: the cluster of most images.
const UNIT: usize = 64 << 10;

/// Makes an empty overlay at `path` over `base`, which it records and must not change from then on.
/// Its disk is of `size` bytes, or as large as the base's.
///
/// # Errors
///
/// The base can't be opened or is larger than `size`, or the overlay can't be made.
pub fn create_overlay(
    base: &DiskPaths,
    path: &Path,
    size: Option<u64>,
    existing: Existing,
) -> Result<(), ImageError> {
    if let Some(size) = size {
        check_size(&path.display().to_string(), size)?;
    }
    let new = NewFile::create(path, existing)?;
    Ok(overlay::create(new, base, size)?)
}

/// What the overlay at `path` says of itself.
pub fn describe(path: &Path) -> Result<Description, ImageError> {
    let name = path.display().to_string();
    let description = qcow2::describe(open_path(path, false)?, &name)?;
    if description.backing.is_none() {
        return Err(ImageError::Unfit {
            path: name,
            reason: "is no overlay: it has no base".into(),
        });
    }
    Ok(description)
}

/// Puts the overlay at `path`, which is over `from`, over `onto`, or over nothing. Its content
/// stays: what differs between the two goes into the overlay first.
///
/// If this fails or is interrupted, the overlay is over `from` still, and has the same content.
///
/// # Errors
///
/// An image can't be opened, `from` is not what the overlay was made over, or the overlay can't be
/// written.
pub fn rebase(
    path: &Path,
    from: &DiskPaths,
    onto: Option<&DiskPaths>,
    job: &Job<'_>,
) -> Result<(), ImageError> {
    describe(path)?;
    let top = DiskOptions {
        place: Some(path.to_owned()),
        format: Some(ImageFormat::Qcow2),
        ..DiskOptions::new(open_path(path, true)?, path.display().to_string())
    };
    let old = Disk::open(overlay::over(top, from.open(false)?))?;
    // Locked until its fingerprint is recorded.
    let new = onto.map(|onto| Disk::open(onto.open(false)?)).transpose()?;
    in_pieces(
        old.size(),
        job,
        "the overlay is over its old base still",
        |offset, len| {
            let entry = old.map(offset, len)?;
            Ok((is_below(entry.kind, entry.depth), entry.len))
        },
        |piece, buffer| take_over(&old, new.as_ref(), piece, buffer),
    )?;
    old.flush()?;
    drop(old);
    record_base(path, onto)
}

/// Whether a range is not the overlay's own.
fn is_below(kind: MapKind, depth: usize) -> bool {
    kind == MapKind::Unallocated || depth > 0
}

/// Writes into an overlay what it has not itself, and the new base has other than the old.
fn take_over(
    old: &Disk,
    new: Option<&Disk>,
    piece: Piece,
    buffer: &mut Vec<u8>,
) -> Result<(), ImageError> {
    let len = buffer.len();
    buffer.resize(2 * len, 0);
    let (before, after) = buffer.split_at_mut(len);
    old.read(before, piece.offset)?;
    match new {
        Some(new) => new.read_padded(after, piece.offset)?,
        None => after.fill(0),
    }
    let units = before.chunks_mut(UNIT).zip(after.chunks(UNIT));
    for ((before, after), number) in units.zip(0..) {
        if before == after {
            continue;
        }
        let unit = Piece {
            offset: piece.offset + number * UNIT as u64,
            len: before.len() as u64,
        };
        // Writing a part of a cluster makes all of it the overlay's own, with the old content.
        old.entries(unit, |at, entry| {
            if !is_below(entry.kind, entry.depth) {
                return Ok(());
            }
            // Within the unit, which fits.
            let start = usize::try_from(at - unit.offset).unwrap_or(usize::MAX);
            let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
            let own = before.get_mut(start..).unwrap_or_default();
            let len = len.min(own.len());
            old.write_or_zero(&mut own[..len], at)
        })?;
    }
    Ok(())
}

/// Records `onto` as what the overlay at `path` is over, and what it is like now, or that it is
/// over nothing. Its own content stays; whether the disk's does is for the caller to know.
///
/// # Errors
///
/// An image can't be opened, or the overlay not be written.
pub fn record_base(path: &Path, onto: Option<&DiskPaths>) -> Result<(), ImageError> {
    let name = path.display().to_string();
    let file = open_path(path, true)?;
    let Some(onto) = onto else {
        return Ok(overlay::set_base(file, path, None)?);
    };
    // Locked meanwhile.
    let disk = Disk::open(onto.open(false)?)?;
    let own = qcow2::describe(open_path(path, false)?, &name)?;
    if own.data_file.is_some_and(|data| data.raw) {
        return Err(ImageError::Unfit {
            path: name,
            reason: "has a raw data file, which can have no base".into(),
        });
    }
    overlay::set_base(file, path, Some(onto))?;
    drop(disk);
    Ok(())
}
