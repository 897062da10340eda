//! Making an image of another one's content.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use edgevmm_block::{BlockError, DiskOptions, DiskPaths, Existing, ImageFormat, open_path};

use crate::disk::Disk;
use crate::target::{NewImage, Target, TargetFormat};
use crate::walk::in_pieces;
use crate::zero::first_run;
use crate::{ImageError, Job};

/// Least zeroes that a block device is told of as such, in bytes.
const GRANULE: usize = 64 << 10;

/// Makes an image of the content of `source`, without what is zeroes.
///
/// The new image has its name once it is complete and durable; before, and if this fails, there is
/// nothing, or what was there already. Only a block device, which takes a raw image and may be
/// longer than that, is written in place.
///
/// # Errors
///
/// The source can't be read, or the target not be made or written.
pub fn convert(source: &DiskPaths, target: &Target, job: &Job<'_>) -> Result<(), ImageError> {
    check_distinct(source, target)?;
    let source = Disk::open(source.open(false)?)?;
    if std::fs::metadata(&target.path).is_ok_and(|it| it.file_type().is_block_device()) {
        return fill(&source, target, job);
    }
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

/// Copies a disk onto a block device, from its beginning on.
fn fill(source: &Disk, target: &Target, job: &Job<'_>) -> Result<(), ImageError> {
    let name = target.path.display().to_string();
    let unfit = |reason: String| ImageError::Unfit {
        path: name.clone(),
        reason,
    };
    if !matches!(target.format, TargetFormat::Raw) {
        return Err(unfit(
            "is a block device, which only takes a raw image".into(),
        ));
    }
    if target.existing == Existing::Keep {
        return Err(BlockError::Exists { path: name }.into());
    }
    let device = Disk::open(DiskOptions {
        format: Some(ImageFormat::Raw),
        ..DiskOptions::new(open_path(&target.path, true)?, name.clone())
    })?;
    let (size, room) = (source.size(), device.size());
    if room < size {
        return Err(unfit(format!(
            "has {room} bytes, too few for a disk of {size}"
        )));
    }
    in_pieces(
        size,
        job,
        "the device has a part of the disk and is of no use as it is",
        |offset, len| {
            let (data, len) = source.look(offset, len)?;
            if !data {
                device.write_zeroes(offset, len)?;
            }
            Ok((data, len))
        },
        |piece, buffer| {
            source.read(buffer, piece.offset)?;
            let (mut data, mut at) = (&mut buffer[..], piece.offset);
            while !data.is_empty() {
                let (len, _) = first_run(data, GRANULE);
                let (run, rest) = data.split_at_mut(len);
                device.write_or_zero(run, at)?;
                at += len as u64;
                data = rest;
            }
            Ok(())
        },
    )?;
    device.flush()
}

/// Refuses to put an image in the place of one that it is made of.
fn check_distinct(source: &DiskPaths, target: &Target) -> Result<(), ImageError> {
    let identity = |path| {
        let metadata = std::fs::metadata(path).ok()?;
        // A device may have several nodes.
        let device = metadata.file_type().is_block_device();
        Some(if device {
            (metadata.rdev(), 0)
        } else {
            (metadata.dev(), metadata.ino())
        })
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
