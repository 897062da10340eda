//! Making disks larger, and raw ones smaller.

use edgevmm_block::{BlockError, DiskPaths, ImageFormat, probe};

use crate::ImageError;
use crate::create::check_size;
use crate::disk::Disk;

/// What a disk's size is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more.
    By(u64),
}

/// Gives a disk another size and returns it, in bytes. What is new reads as zeroes. With `shrink` a
/// raw image's end may be cut off, with whatever is in it.
///
/// # Errors
///
/// The disk would be smaller and may not be, or its format or the host can't have that size.
pub fn resize(paths: &DiskPaths, size: NewSize, shrink: bool) -> Result<u64, ImageError> {
    let options = paths.open(true)?;
    let format = match options.format {
        Some(format) => format,
        None => probe(&options.file)?,
    };
    let unfit = |reason: String| ImageError::Unfit {
        path: paths.hint(),
        reason,
    };
    let file = options
        .file
        .try_clone()
        .map_err(|source| BlockError::File {
            op: "open",
            path: paths.hint(),
            source,
        })?;
    let disk = Disk::open(options)?;
    let now = disk.size();
    let size = match size {
        NewSize::To(size) => size,
        NewSize::By(more) => now
            .checked_add(more)
            .ok_or_else(|| unfit(format!("can't have {more} bytes more than {now}")))?,
    };
    check_size(&paths.hint(), size)?;
    if size >= now {
        disk.resize(size)?;
        return Ok(size);
    }
    if format != ImageFormat::Raw {
        return Err(unfit(format!(
            "has {now} bytes, and only raw images can be made smaller; convert it with \
             `edgevmm image convert --to raw` first"
        )));
    }
    if !shrink {
        return Err(unfit(format!(
            "has {now} bytes; what is beyond {size} would be lost: make the guest's partitions \
             and filesystems smaller first, then add --shrink"
        )));
    }
    file.set_len(size)
        .and_then(|()| file.sync_all())
        .map_err(|source| BlockError::File {
            op: "cut",
            path: paths.hint(),
            source,
        })?;
    Ok(size)
}
