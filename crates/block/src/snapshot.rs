//! Throw-away overlays: writes go to a file that has no name and dies with the disk.

use std::path::PathBuf;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use crate::host::HostFile;
use crate::storage::ImageFile;
use crate::{BlockError, SECTOR_SIZE};

/// Clusters of the overlay, in bytes. A 4 KiB write takes up one of them in the temporary file, so
/// small ones save space, but they need more tables; from 16 KiB on random writes get no faster.
const CLUSTER_SIZE: u64 = 16 << 10;
/// Largest disk for which [`CLUSTER_SIZE`] is used; larger ones get QEMU's usual clusters.
const MAX_SMALL: u64 = 1 << 40;
const LARGE_CLUSTER_SIZE: u64 = 64 << 10;

/// Puts an empty overlay over `base` and returns it with its cluster size in bytes.
pub fn overlay(
    base: FormatAccess<ImageFile>,
    name: &str,
) -> Result<(FormatAccess<ImageFile>, u64), BlockError> {
    let size = base.size().next_multiple_of(SECTOR_SIZE);
    let cluster_size = if size <= MAX_SMALL {
        CLUSTER_SIZE
    } else {
        LARGE_CLUSTER_SIZE
    };
    let dir = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let failed = |source| BlockError::Snapshot {
        path: name.to_owned(),
        dir: dir.display().to_string(),
        source,
    };
    let file = tempfile::tempfile_in(&dir).map_err(failed)?;
    let file = ImageFile::new(HostFile::new(file, "snapshot", false)?);
    Qcow2::<ImageFile>::create_builder(file)
        .size(size)
        .cluster_size(usize::try_from(cluster_size).unwrap_or(usize::MAX))
        .create_open(DenyImplicitOpenGate::default(), |file| {
            Ok(Qcow2::builder(file).backing(Some(base)).write(true))
        })
        .map(|image| (FormatAccess::new(image), cluster_size))
        .map_err(failed)
}
