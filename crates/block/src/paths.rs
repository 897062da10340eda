//! Disks by the names of their files.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::{
    BackingFile, BlockError, DataFile, DiskOptions, ImageFormat, info, open_path, vmdk_data_files,
};

/// The files that a disk is made of, as a user names them; everything else as in [`DiskOptions`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskPaths {
    /// The image.
    pub path: PathBuf,
    /// Its format; probed if absent.
    pub format: Option<ImageFormat>,
    /// The files below the image, the nearest first.
    pub backing: Vec<PathBuf>,
    /// The other files that the image's data is in, in the order in which it names them. If there
    /// are none, those are taken that a VMDK descriptor has beside it under its own name.
    pub data_files: Vec<PathBuf>,
    /// One of the image's internal snapshots, by ID or name; one of the disks in an OVA, by name.
    pub internal_snapshot: Option<String>,
}

impl DiskPaths {
    /// The image at `path`, which is all there is.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }

    /// The image's name for messages.
    pub fn hint(&self) -> String {
        hint(&self.path)
    }

    /// Opens the files, those of the image for writing if the disk is to be `writable`.
    ///
    /// # Errors
    ///
    /// As [`open_path`].
    pub fn open(&self, writable: bool) -> Result<DiskOptions, BlockError> {
        let file = open_path(&self.path, writable)?;
        let mut backing: Vec<BackingFile> = Vec::with_capacity(self.backing.len());
        for path in &self.backing {
            let above = backing.last().map_or(&file, |above| &above.file);
            let may_be_vmdk = backing_may_be_vmdk(above)?;
            let file = open_path(path, false)?;
            let data_files = if may_be_vmdk {
                vmdk_data_files(path, &file)?
            } else {
                Vec::new()
            };
            backing.push(BackingFile {
                file,
                format: None,
                path_hint: hint(path),
                data_files,
                internal_snapshot: None,
            });
        }
        let data_files = if self.data_files.is_empty() && self.may_be_vmdk() {
            vmdk_data_files(&self.path, &file)?
        } else {
            let open = |path: &PathBuf| {
                Ok(DataFile {
                    file: open_path(path, writable)?,
                    path_hint: hint(path),
                })
            };
            let opened = self.data_files.iter().map(open);
            opened.collect::<Result<_, BlockError>>()?
        };
        Ok(DiskOptions {
            place: Some(self.path.clone()),
            format: self.format,
            read_only: !writable,
            backing,
            data_files,
            internal_snapshot: self.internal_snapshot.clone(),
            ..DiskOptions::new(file, self.hint())
        })
    }

    fn may_be_vmdk(&self) -> bool {
        matches!(self.format, None | Some(ImageFormat::Vmdk))
    }
}

/// Whether the image `above` leaves it open that the one below it is a VMDK. What is below an image
/// that says otherwise may look like one, as a guest can write on its raw disk what it likes.
fn backing_may_be_vmdk(above: &File) -> Result<bool, BlockError> {
    let above = above.try_clone().map_err(|source| BlockError::File {
        op: "open",
        path: "image".into(),
        source,
    })?;
    let format = info(above, "image").ok().and_then(|it| it.backing_format);
    Ok(format.is_none_or(|format| format == ImageFormat::Vmdk.qemu_name()))
}

fn hint(path: &Path) -> String {
    path.display().to_string()
}
