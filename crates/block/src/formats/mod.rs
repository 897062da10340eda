//! Image formats.

mod blocks;
mod foreign;
mod ova;
mod pages;
pub mod probe;
pub mod qcow2;
mod range;
pub mod raw;
mod refusal;
mod vdi;
mod vhd;
mod vhdx;
pub mod vmdk;

use std::sync::Arc;

use crate::host::HostFile;
use crate::layer::Layer;
use crate::{BlockError, ImageFormat};

/// The file below an image, as the image names it; nothing has opened or looked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// Its name.
    pub name: String,
    /// Its format by QEMU's name for it; absent if the image does not tell.
    pub format: Option<String>,
}

/// An image opened for reading.
#[derive(Debug)]
pub struct OpenLayer {
    /// The image.
    pub layer: Arc<dyn Layer>,
    /// What it wants below it.
    pub backing: Option<Backing>,
    /// What its header has that its format gives no meaning to.
    pub extensions: Vec<qcow2::Extension>,
}

/// Opens the image in `file`, which is locked already, for reading.
///
/// `data_files` are the other files that its data is in, in the order in which the image names
/// them, locked as well. `snapshot` chooses one of its internal snapshots by ID or name.
///
/// # Errors
///
/// The image breaks its format's rules, or has not as many data files, or no such snapshot.
pub fn open_layer(
    format: ImageFormat,
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    snapshot: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    match format {
        ImageFormat::Raw => raw::open_layer(file, &data_files, snapshot),
        ImageFormat::Qcow2 => qcow2::open_layer(file, data_files, snapshot),
        _ => foreign::open_layer(format, file, &data_files, snapshot),
    }
}
