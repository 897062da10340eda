//! Looking for damage, and mending it.

use std::fs::File;

use crate::BlockError;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    No,
    /// Give back clusters that are in use by nothing.
    Leaks,
    /// Whatever can be mended.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Damage: what it says of the disk's data is wrong, or will be once somebody writes.
    pub corruptions: u64,
    /// Clusters that nothing uses and that are not free either.
    pub leaks: u64,
    /// How many corruptions of those found are mended now.
    pub corruptions_fixed: u64,
    /// How many leaks of those found are mended now.
    pub leaks_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// How many of them have data in the image.
    pub allocated_clusters: u64,
    /// How many of those are compressed.
    pub compressed_clusters: u64,
    /// How many of those do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end: u64,
    /// The first findings in words; not all if there are many.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong with the image (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == self.corruptions_fixed && self.leaks == self.leaks_fixed
    }
}

/// Checks an image, locking it meanwhile; `file` is writable unless `repair` is [`Repair::No`].
///
/// `progress` is told now and then how many bytes of metadata are checked, and of how many.
///
/// # Errors
///
/// [`BlockError::BadImage`] if the header is beyond use, [`BlockError::Locked`], or what the host
/// says. Damage found is no error.
pub fn check(
    file: File,
    path_hint: &str,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, BlockError> {
    let _ = (file, repair, progress);
    Err(super::unfinished(path_hint))
}

/// Makes the refcounts of an image right.
pub fn mend_refcounts(file: &crate::host::HostFile) -> Result<(), BlockError> {
    Err(super::unfinished(file.name()))
}
