//! Disks by the names of their files.

use std::path::{Path, PathBuf};

use crate::{BackingFile, BlockError, DataFile, DiskOptions, ImageFormat, open_path};

/// The files that a disk is made of, as a user names them; everything else as in [`DiskOptions`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskPaths {
    /// The image.
    pub path: PathBuf,
    /// Its format; probed if absent.
    pub format: Option<ImageFormat>,
    /// The files below the image, the nearest first.
    pub backing: Vec<PathBuf>,
    /// The other files that the image's data is in, in the order in which it names them.
    pub data_files: Vec<PathBuf>,
    /// One of the image's internal snapshots, by ID or name.
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
            })
        });
        let data_files = self.data_files.iter().map(|path| {
            Ok(DataFile {
                file: open_path(path, writable)?,
                path_hint: hint(path),
            })
        });
        Ok(DiskOptions {
            format: self.format,
            read_only: !writable,
            backing: backing.collect::<Result<_, BlockError>>()?,
            data_files: data_files.collect::<Result<_, BlockError>>()?,
            internal_snapshot: self.internal_snapshot.clone(),
            ..DiskOptions::new(file, self.hint())
        })
    }
}

fn hint(path: &Path) -> String {
    path.display().to_string()
}
