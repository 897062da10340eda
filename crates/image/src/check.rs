//! Looking for damage in images, and mending it.

use std::io::ErrorKind;

use edgevmm_block::qcow2::{self, CheckReport, Repair};
use edgevmm_block::{BlockError, DiskPaths, ImageFormat, open_path, probe};
use serde::Serialize;

use crate::disk::Disk;
use crate::{ImageError, Job};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The image's format.
    pub format: String,
    /// Damage found: what the image says of its data is wrong, or will be once it is written.
    pub corruptions: u64,
    /// How much of it is mended.
    pub corruptions_fixed: u64,
    /// Clusters found that are in use by nothing and not free either.
    pub leaks: u64,
    /// How many of them are given back.
    pub leaks_fixed: u64,
    /// Clusters of a qcow2's disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clusters: Option<Clusters>,
    /// The first findings in words.
    pub messages: Vec<String>,
}

/// How the clusters of a qcow2's disk are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Clusters {
    /// All.
    pub total: u64,
    /// Those with data in the image.
    pub allocated: u64,
    /// Those of them that are compressed.
    pub compressed: u64,
    /// Those of them that do not follow the one before in the file.
    pub fragmented: u64,
}

impl Checked {
    /// Whether damage is left.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.corruptions > self.corruptions_fixed
    }

    /// Whether leaks are left.
    #[must_use]
    pub fn has_leaks(&self) -> bool {
        self.leaks > self.leaks_fixed
    }
}

impl From<CheckReport> for Checked {
    fn from(report: CheckReport) -> Self {
        Self {
            format: ImageFormat::Qcow2.to_string(),
            corruptions: report.corruptions,
            corruptions_fixed: report.corruptions_fixed,
            leaks: report.leaks,
            leaks_fixed: report.leaks_fixed,
            clusters: Some(Clusters {
                total: report.total_clusters,
                allocated: report.allocated_clusters,
                compressed: report.compressed_clusters,
                fragmented: report.fragmented_clusters,
            }),
            messages: report.messages,
        }
    }
}

/// Checks an image by itself, without what lies below it.
///
/// Of a qcow2 all metadata is checked. Of formats that are only read, it is what reading needs that
/// is checked; a raw image has nothing to check. Only a qcow2 can be mended.
///
/// # Errors
///
/// The image is beyond reading, in use by a writer, or can't be mended as it is.
pub fn check(paths: &DiskPaths, repair: Repair, job: &Job<'_>) -> Result<Checked, ImageError> {
    let file = open_path(&paths.path, repair != Repair::No)?;
    let format = match paths.format {
        Some(format) => format,
        None => probe(&file)?,
    };
    if format == ImageFormat::Qcow2 {
        let mut progress = |done, total| job.report(done, total);
        return Ok(qcow2::check(file, &paths.hint(), repair, &mut progress)?.into());
    }
    if repair != Repair::No {
        return Err(ImageError::Unfit {
            path: paths.hint(),
            reason: format!("is {format}, which can't be mended; only qcow2 can"),
        });
    }
    let mut checked = Checked {
        format: format.to_string(),
        ..Checked::default()
    };
    match read_tables(paths, job) {
        Err(ImageError::Io { source, .. }) if is_damage(&source) => {
            checked.corruptions = 1;
            checked.messages.push(cause(&source));
        }
        done => done?,
    }
    Ok(checked)
}

/// Has everything looked up that tells where the disk's data is.
fn read_tables(paths: &DiskPaths, job: &Job<'_>) -> Result<(), ImageError> {
    let disk = Disk::open(paths.open(false)?)?;
    let (mut at, size) = (0, disk.size());
    while at < size {
        job.check("nothing was changed")?;
        job.report(at, size);
        at += disk.map(at, size - at)?.len;
    }
    job.report(size, size);
    Ok(())
}

/// Whether a request failed for what the image says, rather than for the host.
fn is_damage(error: &BlockError) -> bool {
    use ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        BlockError::Io { source, .. } => matches!(source.kind(), InvalidData | UnexpectedEof),
        BlockError::BadImage { .. } => true,
        _ => false,
    }
}

fn cause(error: &BlockError) -> String {
    match error {
        BlockError::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
