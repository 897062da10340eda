//! Files that the kubelet writes from the API, as a disk or to be read by us.
//!
//! The kubelet writes them to a folder of its own, `..2026_01_01...`, to which the link `..data` leads
//! and from each key at the top another one. Links are followed at the top and within the volume only.
//! Names at the top that begin with two dots are its own.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use edgevmm_cloudinit::Iso;
use edgevmm_config::{DiskBus, DiskConfig, DiskFormat, DiskKind};

use super::{LABEL, Volume, VolumeError, serial};
use crate::beneath::{Folder, Links, read};

/// Most bytes in all files of a volume: the API holds 1.5 MB in one object.
const MAX_BYTES: u64 = 16 << 20;
/// Most files in a folder.
const MAX_FILES: usize = 1024;
/// Most files in a volume.
const MAX_ALL: usize = 4096;
/// Levels of folders.
const MAX_DEPTH: usize = 7;

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its path within the volume.
    pub path: String,
    /// What it says.
    pub text: Vec<u8>,
}

/// Makes the disk of a volume with files from the API: a CD-ROM where disks are on SATA, as systems
/// that need that look for such a file system on no other medium.
pub(super) fn disk(
    volume: &Volume<'_>,
    folder: &Path,
    bus: Option<DiskBus>,
) -> Result<DiskConfig, VolumeError> {
    let failed = |source| VolumeError::Iso {
        name: volume.name.clone(),
        source,
    };
    let mut iso = Iso::new(LABEL, 0).map_err(failed)?;
    for file in read_files(volume)? {
        iso.add(&file.path, file.text).map_err(failed)?;
    }
    let image = iso.build().map_err(failed)?;
    let path = folder.join(format!("{}.iso", volume.name));
    write_private(&path, &image).map_err(|error| volume.failed(error))?;
    let mut disk = DiskConfig::new(path);
    disk.serial = Some(serial(&volume.name));
    if bus == Some(DiskBus::Sata) {
        disk.kind = DiskKind::Cdrom;
    } else {
        disk.format = Some(DiskFormat::Raw);
        disk.ro = true;
    }
    Ok(disk)
}

/// Writes a file that nobody else may read, and the folder that it is in.
///
/// # Errors
///
/// When it can't be written.
pub fn write_private(path: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(folder)?;
    }
    // Another start of the same container may have left one.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(text)
}

/// Reads all files of a volume.
///
/// # Errors
///
/// When they can't be read, or are too many or too large for what the API can hold.
pub fn read_files(volume: &Volume<'_>) -> Result<Vec<File>, VolumeError> {
    let failed = |source| volume.failed(source);
    let folder = Folder::open(volume.source).map_err(failed)?;
    let mut walk = Walk {
        files: Vec::new(),
        left: MAX_BYTES,
    };
    walk.folder(&folder, "", Links::FollowBeneath, MAX_DEPTH)
        .map_err(failed)?;
    Ok(walk.files)
}

struct Walk {
    files: Vec<File>,
    left: u64,
}

impl Walk {
    fn folder(
        &mut self,
        folder: &Folder,
        prefix: &str,
        links: Links,
        depth: usize,
    ) -> io::Result<()> {
        for name in folder.names(MAX_FILES)? {
            let Some(text) = name.to_str() else {
                return Err(io::Error::other(format!("the name {name:?} is not UTF-8")));
            };
            if prefix.is_empty() && text.starts_with("..") {
                continue;
            }
            let path = format!("{prefix}{text}");
            let told = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
            let name = Path::new(&name);
            if folder.is_folder(name, links).map_err(told)? {
                let Some(depth) = depth.checked_sub(1) else {
                    return Err(told(io::Error::other("it has too many levels of folders")));
                };
                let inner = folder.folder(name, links).map_err(told)?;
                self.folder(&inner, &format!("{path}/"), Links::Refuse, depth)?;
            } else {
                let text = self.file(folder, name, links).map_err(told)?;
                self.files.push(File { path, text });
            }
            if self.files.len() > MAX_ALL {
                let message = format!("it has more than {MAX_ALL} files");
                return Err(io::Error::other(message));
            }
        }
        Ok(())
    }

    fn file(&mut self, folder: &Folder, name: &Path, links: Links) -> io::Result<Vec<u8>> {
        let file = read(&folder.regular(name, links)?)?;
        let mut text = Vec::new();
        file.take(self.left + 1).read_to_end(&mut text)?;
        let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
        let left = self.left.checked_sub(size);
        self.left = left.ok_or_else(|| {
            io::Error::other(format!("all files are larger than {MAX_BYTES} bytes"))
        })?;
        Ok(text)
    }
}
