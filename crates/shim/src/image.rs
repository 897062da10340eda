//! Finds what a container image has for a machine: a disk in /disk, as KubeVirt's containerDisks
//! have it, or files that annotations name.
//!
//! The image is anybody's. No link in it is followed, as that could lead to a file of the host, and
//! only regular files are used.

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::beneath::{Folder, Links, read};

/// Folder of an image's disks.
const DISKS: &str = "disk";
/// Folder in the container's writable layer for what the guest writes.
const WRITES: &str = ".edgevmm";
/// What every qcow2 begins with.
const QCOW2: [u8; 4] = *b"QFI\xfb";
/// Most files in the folder of disks: those of one VMDK, with room.
const MAX_FILES: usize = 256;

/// Why an image makes no machine.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no disk in it.
    #[error(
        "The container image has no disk in /disk, so it is no VM image: put one file there \
         (qcow2, raw, ...), or name a kernel by the annotation edgevmm.io/kernel"
    )]
    NoDisk,
    /// There are several.
    #[error(
        "The container image has several files in /disk ({0}): choose one by the annotation \
         edgevmm.io/disk"
    )]
    SeveralDisks(String),
    /// There are more files than any image needs.
    #[error("The container image has more than {MAX_FILES} files in /disk")]
    ManyFiles,
    /// The file is not what it should be.
    #[error("{0} in the container image is not a regular file; links are not followed")]
    NotRegular(String),
    /// The file can't be opened.
    #[error("Can't open {path} in the container image; links are not followed")]
    Open {
        /// Path within the image.
        path: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// There is no place for what the guest writes.
    #[error("Can't make a folder for what the guest writes in the container's file system")]
    Writes(#[source] io::Error),
}

/// A container's mounted root file system.
#[derive(Debug)]
pub struct Image<'a> {
    root: &'a Path,
}

impl<'a> Image<'a> {
    /// The one mounted at `root`.
    pub fn new(root: &'a Path) -> Self {
        Self { root }
    }

    /// Path of the disk: the one of that name, or the only one there is beside those that are `named`
    /// otherwise. `None` when the image has none.
    ///
    /// # Errors
    ///
    /// When there is no such disk, or it isn't clear which one is meant.
    pub fn disk(&self, name: Option<&str>, named: &[&str]) -> Result<Option<PathBuf>, ImageError> {
        match self.check_folder(DISKS) {
            Err(ImageError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return match name {
                    Some(_) => Err(ImageError::NoDisk),
                    None => Ok(None),
                };
            }
            result => result?,
        }
        let mut names = Vec::new();
        let open = |source| ImageError::Open {
            path: format!("/{DISKS}"),
            source,
        };
        for entry in fs::read_dir(self.root.join(DISKS)).map_err(open)? {
            let file = entry.map_err(open)?.file_name();
            // The extents of a VMDK are found by their names, so none of them may be a link either.
            let path = format!("{DISKS}/{}", file.to_string_lossy());
            self.check_regular(&path)?;
            names.push(file);
            if names.len() > MAX_FILES {
                return Err(ImageError::ManyFiles);
            }
        }
        if name.is_none() && names.len() > 1 {
            names.retain(|file| !named.iter().any(|name| *file == **name));
        }
        let chosen = match (name, names.as_slice()) {
            (Some(name), _) => names.iter().find(|file| *file == name),
            (None, [only]) => Some(only),
            (None, []) => None,
            (None, several) => {
                let mut list: Vec<_> = several.iter().map(|name| name.to_string_lossy()).collect();
                list.sort();
                list.truncate(8);
                return Err(ImageError::SeveralDisks(list.join(", ")));
            }
        };
        match (chosen, name) {
            (Some(file), _) => Ok(Some(self.root.join(DISKS).join(file))),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(ImageError::NoDisk),
        }
    }

    /// Path of a file that an annotation names by its absolute path within the image.
    ///
    /// # Errors
    ///
    /// When it is no regular file.
    pub fn file(&self, path: &str) -> Result<PathBuf, ImageError> {
        let inner = path.trim_start_matches('/');
        self.check_regular(inner)?;
        Ok(self.root.join(inner))
    }

    /// Whether the content of a file in it is a qcow2, whatever its name says.
    ///
    /// # Errors
    ///
    /// When it can't be read.
    pub fn is_qcow2(&self, path: &str) -> Result<bool, ImageError> {
        let inner = path.trim_start_matches('/');
        let start = || -> io::Result<Vec<u8>> {
            let file = Folder::open(self.root)?.regular(Path::new(inner), Links::Refuse)?;
            let mut start = Vec::new();
            read(&file)?
                .take(QCOW2.len() as u64)
                .read_to_end(&mut start)?;
            Ok(start)
        };
        let start = start().map_err(|source| open_error(inner, source))?;
        Ok(start == QCOW2)
    }

    /// Path for the overlay of the disk, or of the further disk `name`, in a folder that only we can enter. The image may not have
    /// brought anything along there.
    ///
    /// # Errors
    ///
    /// When there is something at that place already, or the file system can't be written.
    pub fn overlay(&self, name: Option<&str>) -> Result<PathBuf, ImageError> {
        let folder = self.root.join(WRITES);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(ImageError::Writes)?,
        }
        self.check_folder(WRITES)?;
        let path = match name {
            Some(name) => format!("{WRITES}/of-{name}.qcow2"),
            None => format!("{WRITES}/disk.qcow2"),
        };
        match self.check_regular(&path) {
            Err(ImageError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
        Ok(self.root.join(path))
    }

    fn check_regular(&self, path: &str) -> Result<(), ImageError> {
        let folder = Folder::open(self.root);
        let file = folder.and_then(|folder| folder.regular(Path::new(path), Links::Refuse));
        match file {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Err(ImageError::NotRegular(format!("/{path}")))
            }
            Err(source) => Err(open_error(path, source)),
        }
    }

    fn check_folder(&self, path: &str) -> Result<(), ImageError> {
        let folder = Folder::open(self.root);
        let found = folder.and_then(|folder| folder.folder(Path::new(path), Links::Refuse));
        found.map(drop).map_err(|source| open_error(path, source))
    }
}

fn open_error(path: &str, source: io::Error) -> ImageError {
    ImageError::Open {
        path: format!("/{path}"),
        source,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;

    use super::*;

    fn root(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("disk")).unwrap();
        for file in files {
            fs::write(root.path().join("disk").join(file), "x").unwrap();
        }
        root
    }

    #[test]
    fn the_only_disk_is_found() {
        let root = root(&["a.qcow2"]);
        let disk = Image::new(root.path()).disk(None, &[]).unwrap();
        assert_eq!(disk, Some(root.path().join("disk/a.qcow2")));
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(Image::new(empty.path()).disk(None, &[]).unwrap(), None);
    }

    #[test]
    fn one_of_several_is_chosen_by_name() {
        let root = root(&["a.vmdk", "a-flat.vmdk"]);
        let image = Image::new(root.path());
        let error = image.disk(None, &[]).unwrap_err().to_string();
        assert!(error.contains("a-flat.vmdk, a.vmdk"), "{error}");
        let disk = image.disk(Some("a.vmdk"), &[]).unwrap();
        assert_eq!(disk, Some(root.path().join("disk/a.vmdk")));
        assert!(image.disk(Some("b"), &[]).is_err());
    }

    #[test]
    fn links_and_pipes_are_refused() {
        let link = root(&[]);
        symlink("/etc/passwd", link.path().join("disk/a")).unwrap();
        assert!(Image::new(link.path()).disk(None, &[]).is_err());
        assert!(Image::new(link.path()).file("/disk/a").is_err());
        let pipe = root(&[]);
        nix::unistd::mkfifo(&pipe.path().join("disk/a"), Mode::S_IRWXU).unwrap();
        let error = Image::new(pipe.path()).disk(None, &[]).unwrap_err();
        assert!(matches!(error, ImageError::NotRegular(_)), "{error}");
        let folder = tempfile::tempdir().unwrap();
        symlink("/etc", folder.path().join("disk")).unwrap();
        assert!(Image::new(folder.path()).disk(None, &[]).is_err());
        symlink("/tmp", folder.path().join(".edgevmm")).unwrap();
        assert!(Image::new(folder.path()).overlay(None).is_err());
    }

    #[test]
    fn an_overlay_has_a_place_again_and_again() {
        let root = root(&[]);
        let image = Image::new(root.path());
        let path = image.overlay(None).unwrap();
        fs::write(&path, "x").unwrap();
        assert_eq!(image.overlay(None).unwrap(), path);
        fs::remove_file(&path).unwrap();
        symlink("/etc/passwd", &path).unwrap();
        assert!(image.overlay(None).is_err());
    }
}
