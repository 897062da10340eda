//! The disk image in a volume that is a folder.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use edgevmm_config::{ByteSize, DiskConfig, DiskFormat};

use super::{Given, Over, Volume, VolumeError, serial};
use crate::beneath::{Folder, Links, path_of};

/// The image that is used whatever others there are: KubeVirt's.
const DISK: &str = "disk.img";
/// What the name of an overlay that we made beside an image ends in.
const OVERLAY_END: &str = ".overlay.qcow2";
/// Most files at the top of a volume.
const MAX_FILES: usize = 4096;
/// Images that a message lists.
const MAX_LISTED: usize = 8;

/// The disk of the volume, and the files that it is made of. It is made with `size` when there is
/// none yet and one is asked for.
pub(super) fn disk(
    volume: &Volume<'_>,
    folder: &Path,
    size: Option<ByteSize>,
) -> Result<(DiskConfig, Vec<Given>), VolumeError> {
    let top = match Folder::open(volume.source) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(VolumeError::SingleFile(volume.place.to_owned()));
        }
        result => result.map_err(|error| volume.failed(error))?,
    };
    let (file, format) = match (find(volume, &top)?, size) {
        (Some(found), None) => found,
        (Some(found), Some(size)) => {
            if found.0 == DISK {
                finish(&top, size).map_err(|error| volume.failed(error))?;
            }
            found
        }
        (None, Some(size)) => {
            make(&top, size).map_err(|error| volume.failed(error))?;
            (DISK.to_owned(), DiskFormat::Raw)
        }
        (None, None) => {
            return Err(VolumeError::NoImage {
                name: volume.name.clone(),
                place: volume.place.to_owned(),
            });
        }
    };
    let image = volume.given(folder, &file);
    let mut disk = DiskConfig::new(&image.link);
    disk.serial = Some(serial(&volume.name));
    disk.format = Some(format);
    disk.ro = volume.read_only;
    let mut given = vec![image];
    if !disk.ro && !matches!(format, DiskFormat::Raw | DiskFormat::Qcow2) {
        let mut overlay = volume.given(folder, &format!("{file}{OVERLAY_END}"));
        overlay.over = Some(Over {
            path: disk.path.clone(),
            format: Some(format),
        });
        disk.overlay = Some(overlay.link.clone());
        given.push(overlay);
    }
    Ok((disk, given))
}

/// Makes an empty disk, or nothing.
fn make(top: &Folder, size: ByteSize) -> io::Result<()> {
    let sized = top.create(DISK)?.set_len(size.0);
    if sized.is_err() {
        let _ = top.remove(DISK);
    }
    sized
}

/// Gives the disk its size if whoever made it was ended before that.
fn finish(top: &Folder, size: ByteSize) -> io::Result<()> {
    let disk = top.regular(Path::new(DISK), Links::Refuse)?;
    if fs::metadata(path_of(&disk))?.len() > 0 {
        return Ok(());
    }
    let disk = OpenOptions::new().write(true).open(path_of(&disk))?;
    disk.set_len(size.0)
}

/// The image at the top of a volume. Its format is told by its name alone: what a guest writes to its
/// disk must not make another format of it.
fn find(volume: &Volume<'_>, top: &Folder) -> Result<Option<(String, DiskFormat)>, VolumeError> {
    let names = top.names(MAX_FILES).map_err(|error| volume.failed(error))?;
    let mut images = Vec::new();
    for name in names.iter().filter_map(|name| name.to_str()) {
        let Some(format) = format_of(name) else {
            continue;
        };
        if name.ends_with(OVERLAY_END) {
            continue;
        }
        // One that is no regular file, or a link, is told rather than passed over.
        if let Err(error) = top.regular(Path::new(name), Links::Refuse) {
            let message = format!("{name}: {error}; links are not followed");
            return Err(volume.failed(io::Error::new(error.kind(), message)));
        }
        if name == DISK {
            return Ok(Some((name.to_owned(), format)));
        }
        images.push((name.to_owned(), format));
    }
    if images.len() > 1 {
        let names: Vec<_> = images.iter().map(|(name, _)| name.as_str()).collect();
        return Err(VolumeError::SeveralImages {
            name: volume.name.clone(),
            images: names.get(..MAX_LISTED).unwrap_or(&names).join(", "),
        });
    }
    Ok(images.pop())
}

fn format_of(name: &str) -> Option<DiskFormat> {
    if name == DISK {
        return Some(DiskFormat::Raw);
    }
    match Path::new(name).extension().and_then(OsStr::to_str)? {
        "raw" | "iso" => Some(DiskFormat::Raw),
        "qcow2" => Some(DiskFormat::Qcow2),
        "vmdk" => Some(DiskFormat::Vmdk),
        "vdi" => Some(DiskFormat::Vdi),
        "vhd" => Some(DiskFormat::Vhd),
        "vhdx" => Some(DiskFormat::Vhdx),
        _ => None,
    }
}
