//! qcow2 images, versions 2 and 3.
//!
//! Follows the QEMU project's qcow2 specification (`docs/interop/qcow2.rst`).

mod backing;
mod check;
mod create;
mod describe;

pub use backing::{HeaderParts, edit_header};
pub use check::{CheckReport, Repair, check};
pub use create::{Compression, CreateOptions, DataFileName, Extension, create};
pub use describe::{DataFile, Description, Snapshot, describe};

use std::sync::Arc;

use super::OpenLayer;
use crate::BlockError;
use crate::host::HostFile;

/// As [`open_layer`](super::open_layer).
pub fn open_layer(
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    snapshot: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    let _ = (data_files, snapshot);
    Err(unfinished(file.name()))
}

fn unfinished(path: &str) -> BlockError {
    BlockError::BadImage {
        path: path.to_owned(),
        reason: "not there yet".into(),
    }
}
