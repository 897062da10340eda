//! Images of other hypervisors, which are only read.

use std::sync::Arc;

use super::OpenLayer;
use super::ova;
use super::range::FileRange;
use super::refusal::{refusal, unsupported};
use super::vdi::VdiDisk;
use super::vhd::VhdDisk;
use super::vhdx::VhdxDisk;
use super::vmdk;
use crate::host::HostFile;
use crate::layer::Layer;
use crate::{BlockError, ImageFormat};

/// As [`open_layer`](super::open_layer), for formats that are not qcow2 or raw. `part` chooses a
/// disk of an archive.
pub fn open_layer(
    mut format: ImageFormat,
    file: Arc<HostFile>,
    data_files: &[Arc<HostFile>],
    part: Option<&str>,
) -> Result<OpenLayer, BlockError> {
    let name = file.name().to_owned();
    let mut range = FileRange::whole(file).map_err(|source| BlockError::File {
        op: "examine",
        path: name.clone(),
        source,
    })?;
    if let Some(part) = part
        && format != ImageFormat::Ova
    {
        return Err(BlockError::NoSnapshot {
            path: name,
            snapshot: part.to_owned(),
        });
    }
    if format == ImageFormat::Ova {
        (range, format) = ova::find_disk(range, part).map_err(refusal(format, &name))?;
    }
    if format != ImageFormat::Vmdk
        && let Some(given) = data_files.first()
    {
        return Err(BlockError::DataFileNotWanted {
            path: name,
            given: given.name().to_owned(),
        });
    }
    let layer: std::io::Result<Arc<dyn Layer>> = match format {
        ImageFormat::Vmdk => Ok(Arc::new(vmdk::open(range, data_files)?)),
        ImageFormat::Vhd => VhdDisk::open(range).map(|disk| Arc::new(disk) as _),
        ImageFormat::Vhdx => VhdxDisk::open(range).map(|disk| Arc::new(disk) as _),
        ImageFormat::Vdi => VdiDisk::open(range).map(|disk| Arc::new(disk) as _),
        ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Ova => {
            Err(unsupported("it is no image of another hypervisor"))
        }
    };
    Ok(OpenLayer {
        layer: layer.map_err(refusal(format, &name))?,
        backing: None,
        extensions: Vec::new(),
    })
}
