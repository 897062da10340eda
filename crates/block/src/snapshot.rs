//! Throw-away overlays: writes go to a file that has no name and dies with the disk.

use std::path::PathBuf;
use std::sync::Arc;

use crate::formats::qcow2::{self, CreateOptions, Qcow2Disk};
use crate::host::HostFile;
use crate::stack::Stack;
use crate::{BlockError, SECTOR_SIZE};

/// Clusters of the overlay, in bytes. A 4 KiB write takes up one of them in the temporary file, so
/// small ones save space, but they need more tables; from 16 KiB on random writes get no faster.
const CLUSTER_SIZE: u64 = 16 << 10;
/// Largest disk for which [`CLUSTER_SIZE`] is used; larger ones get QEMU's usual clusters.
const MAX_SMALL: u64 = 1 << 40;
const LARGE_CLUSTER_SIZE: u64 = 64 << 10;

/// Puts an empty overlay over `base`, the image called `name`.
pub fn overlay(base: Stack, name: &str) -> Result<Qcow2Disk, BlockError> {
    let size = base.size().next_multiple_of(SECTOR_SIZE);
    let cluster_size = if size <= MAX_SMALL {
        CLUSTER_SIZE
    } else {
        LARGE_CLUSTER_SIZE
    };
    let dir = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let file = tempfile::tempfile_in(&dir).map_err(|source| BlockError::Snapshot {
        path: name.to_owned(),
        dir: dir.display().to_string(),
        source,
    })?;
    let file = Arc::new(HostFile::new(file, "the snapshot's temporary file", false)?);
    let options = CreateOptions {
        size,
        cluster_size,
        ..CreateOptions::default()
    };
    qcow2::create_in(&file, &options)?;
    qcow2::open_temporary(file, base)
}
