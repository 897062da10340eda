//! Disks by the names of their files.

use std::path::{Path, PathBuf};

use crate::{
    BackingFile, BlockError, DataFile, DiskOptions, ImageFormat, open_path, vmdk_data_files,
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
        let backing = self.backing.iter().map(|path| {
            Ok(BackingFile {
                file: open_path(path, false)?,
                format: None,
                path_hint: hint(path),
                data_files: Vec::new(),
                internal_snapshot: None,
            })
        });
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
            format: self.format,
            read_only: !writable,
            backing: backing.collect::<Result<_, BlockError>>()?,
            data_files,
            internal_snapshot: self.internal_snapshot.clone(),
            ..DiskOptions::new(file, self.hint())
        })
    }

    fn may_be_vmdk(&self) -> bool {
        matches!(self.format, None | Some(ImageFormat::Vmdk))
    }
}

fn hint(path: &Path) -> String {
    path.display().to_string()
}
