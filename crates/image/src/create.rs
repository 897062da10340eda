//! Making empty images.

use crate::ImageError;
use crate::target::{NewImage, Target};

/// Makes an empty image for a disk of `size` bytes.
///
/// # Errors
///
/// The size is no multiple of 512, the format can't have it, or the host can't store it.
pub fn create(target: &Target, size: u64) -> Result<(), ImageError> {
    check_size(&target.path.display().to_string(), size)?;
    NewImage::create(target, size)?.finish()
}

/// Checks the size of a disk in bytes.
pub fn check_size(path: &str, size: u64) -> Result<(), ImageError> {
    let problem = if size == 0 {
        "can't have no bytes at all; give a size, like 10G".to_owned()
    } else if !size.is_multiple_of(edgevmm_block::SECTOR_SIZE) {
        let next = size.next_multiple_of(edgevmm_block::SECTOR_SIZE);
        format!("can't have {size} bytes, which are no whole sectors; make it {next}")
    } else {
        return Ok(());
    };
    Err(ImageError::Unfit {
        path: path.to_owned(),
        reason: problem,
    })
}
