//! Chains of images: which file lies below which, as which format.
//!
//! The image says that it has a backing file and of which format; only the caller says which file
//! that is. Where the two disagree the disk is refused, because a wrong guess would show the guest
//! something else than it left, and later writes would make that permanent.

use imago::FormatAccess;
use imago::raw::Raw;

use crate::formats::imago_qcow2::{self as qcow2, Header};
use crate::formats::probe::probe_file;
use crate::host::HostFile;
use crate::host::lock;
use crate::storage::ImageFile;
use crate::{BackingFile, BlockError, ImageFormat};

/// One image, examined but not opened yet.
#[derive(Debug)]
pub struct Layer {
    /// Its file.
    pub file: ImageFile,
    /// Its header, if it is a qcow2 image.
    pub header: Option<Header>,
}

impl Layer {
    /// Examines an image of `format`, which is probed if absent.
    pub fn new(file: ImageFile, format: Option<ImageFormat>) -> Result<Self, BlockError> {
        let format = match format {
            Some(format) => format,
            None => probe_file(file.host())?,
        };
        let header = match format {
            ImageFormat::Raw => None,
            ImageFormat::Qcow2 => Some(qcow2::read_header(&file)?),
            _ => {
                return Err(BlockError::UnsupportedFormat {
                    path: file.host().name().to_owned(),
                    format: "an image of another hypervisor",
                    hint: "convert it with `qemu-img convert -O qcow2`",
                });
            }
        };
        Ok(Self { file, header })
    }

    /// Opens the image on top of `backing` for reading.
    pub fn open_read_only(
        self,
        backing: Option<FormatAccess<ImageFile>>,
    ) -> Result<FormatAccess<ImageFile>, BlockError> {
        match self.header {
            Some(header) => qcow2::open_read_only(self.file, &header, backing),
            None => {
                let name = self.file.host().name().to_owned();
                Raw::open_image(self.file, false)
                    .map(FormatAccess::new)
                    .map_err(|source| BlockError::File {
                        op: "open",
                        path: name,
                        source,
                    })
            }
        }
    }
}

/// Examines, locks and opens everything below `top`.
pub fn open_backing(
    top: &Layer,
    files: Vec<BackingFile>,
    direct: bool,
) -> Result<Option<FormatAccess<ImageFile>>, BlockError> {
    let mut layers = Vec::with_capacity(files.len());
    let mut above = top;
    for given in files {
        let layer = examine(above, given, direct)?;
        layers.push(layer);
        above = layers.last().unwrap_or(top);
    }
    if let Some(wanted) = above
        .header
        .as_ref()
        .and_then(|header| header.backing.clone())
    {
        return Err(BlockError::BackingNotGiven {
            path: above.file.host().name().to_owned(),
            wanted,
        });
    }
    let mut opened = None;
    for layer in layers.into_iter().rev() {
        lock::lock(layer.file.host(), false)?;
        opened = Some(layer.open_read_only(opened)?);
    }
    Ok(opened)
}

/// Examines the file given as the one below `above`.
fn examine(above: &Layer, given: BackingFile, direct: bool) -> Result<Layer, BlockError> {
    let Some(header) = above
        .header
        .as_ref()
        .filter(|header| header.backing.is_some())
    else {
        return Err(BlockError::BackingNotWanted {
            path: above.file.host().name().to_owned(),
            given: given.path_hint,
        });
    };
    let file = ImageFile::new(HostFile::new(given.file, &given.path_hint, direct)?);
    let format = backing_format(&file, header.backing_format.as_deref(), given.format)?;
    Layer::new(file, Some(format))
}

/// Settles the format of a backing file.
///
/// A guest may have written a qcow2 header into what was its raw disk. So content that looks like
/// qcow2 is raw only where the image above says so, and is never qcow2 against its word.
fn backing_format(
    file: &ImageFile,
    named: Option<&str>,
    given: Option<ImageFormat>,
) -> Result<ImageFormat, BlockError> {
    let mismatch = |found, who, expected: String, hint| BlockError::BackingFormat {
        path: file.host().name().to_owned(),
        found,
        who,
        expected,
        hint,
    };
    let named = match named {
        None => None,
        Some("raw" | "file" | "host_device") => Some(ImageFormat::Raw),
        Some("qcow2") => Some(ImageFormat::Qcow2),
        Some(other) => {
            let found = given.map_or_else(|| probe_file(file.host()), Ok)?;
            return Err(mismatch(
                found,
                "the image above it",
                format!("{other:?}"),
                "only raw and qcow2 are supported",
            ));
        }
    };
    if let (Some(named), Some(given)) = (named, given)
        && named != given
    {
        return Err(mismatch(
            given,
            "the image above it",
            named.to_string(),
            "give the file the image was made for, or correct it with `qemu-img rebase -u -F`",
        ));
    }
    if named == Some(ImageFormat::Raw) {
        return Ok(ImageFormat::Raw);
    }
    let found = probe_file(file.host())?;
    let (who, expected) = match (named, given) {
        (Some(named), _) => ("the image above it", named),
        (None, Some(given)) => ("its format option", given),
        (None, None) => return Ok(found),
    };
    if found != expected {
        return Err(mismatch(
            found,
            who,
            expected.to_string(),
            "give the file the image was made for, or record the format in the image above with \
             `qemu-img rebase -u -F`",
        ));
    }
    Ok(found)
}
