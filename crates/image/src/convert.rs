//! Making an image of another one's content.

use std::os::unix::fs::MetadataExt;

use edgevmm_block::DiskPaths;

use crate::disk::Disk;
use crate::target::{NewImage, Target};
use crate::walk::in_pieces;
use crate::{ImageError, Job};

/// Makes an image of the content of `source`, without what is zeroes.
///
/// The new image has its name once it is complete and durable; before, and if this fails, there is
/// nothing, or what was there already.
///
/// # Errors
///
/// The source can't be read, or the target not be made or written.
pub fn convert(source: &DiskPaths, target: &Target, job: &Job<'_>) -> Result<(), ImageError> {
    check_distinct(source, target)?;
    let source = Disk::open(source.open(false)?)?;
    let new = NewImage::create(target, source.size())?;
    copy(&source, &new, job)?;
    new.finish()
}

/// Copies all of a disk but its zeroes.
pub fn copy(source: &Disk, new: &NewImage, job: &Job<'_>) -> Result<(), ImageError> {
    in_pieces(
        source.size(),
        job,
        "nothing was made",
        |offset, len| source.look(offset, len),
        |piece, buffer| {
            source.read(buffer, piece.offset)?;
            new.put(buffer, piece.offset)
        },
    )
}

/// Refuses to put an image in the place of one that it is made of.
fn check_distinct(source: &DiskPaths, target: &Target) -> Result<(), ImageError> {
    let identity = |path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let Some(taken) = identity(&target.path) else {
        return Ok(());
    };
    let files = std::iter::once(&source.path).chain(&source.backing);
    let mut files = files.chain(&source.data_files);
    if files.any(|path| identity(path) == Some(taken)) {
        return Err(ImageError::Unfit {
            path: target.path.display().to_string(),
            reason: "is what the new image would be made of; choose another name".into(),
        });
    }
    Ok(())
}
