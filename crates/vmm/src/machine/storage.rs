//! Opens what a machine's disks are made of.

use std::fs::{DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgevmm_block::{
    BlockBackend, BlockError, DiskOptions, DiskPaths, Existing, ImageFormat, NewFile,
};
use edgevmm_cloudinit::{DataSource, Seed, SeedError};
use edgevmm_config::{ByteSize, CloudInitConfig, DiskAio, DiskConfig, DiskFormat, ImageConfig};
use nix::sys::memfd::{MFdFlags, memfd_create};
use uuid::Uuid;

/// Largest file that goes into a seed: cloud-init's own limit is far below.
const SEED_FILE_MAX: u64 = 1 << 20;

/// Bytes of a block of an ISO image.
const ISO_BLOCK: u64 = 2048;
/// Where an ISO image describes itself.
const ISO_DESCRIPTOR: u64 = 16 * ISO_BLOCK;

/// Why a machine's disks can't be had.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A disk can't be opened; the reason names its image.
    #[error(transparent)]
    Image(BlockError),
    /// A disk can't be opened, for a reason that names no image.
    #[error("Can't use the disk {}", path.display())]
    Disk {
        /// Path of the image.
        path: PathBuf,
        /// Why.
        #[source]
        source: BlockError,
    },
    /// An overlay can't be made.
    #[error(
        "Can't make the overlay {} for what the guest writes (overlay=FILE chooses another place, \
         `ro` or `snapshot` needs none)", path.display()
    )]
    MakeOverlay {
        /// Path of the overlay.
        path: PathBuf,
        /// Why.
        #[source]
        source: BlockError,
    },
    /// The folder for an overlay can't be made.
    #[error("Can't make the folder {} for an overlay", path.display())]
    OverlayFolder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// An overlay is larger than it is to be.
    #[error(
        "The overlay {} has {now} already, and can't be made smaller: ask for as much or more",
        path.display()
    )]
    OverlaySize {
        /// Path of the overlay.
        path: PathBuf,
        /// Its size.
        now: ByteSize,
    },
    /// A size was asked for of an overlay that there is none of.
    #[error(
        "The disk {} has no overlay whose size could be chosen: add overlay=FILE, or make the \
         image larger by `edgevmm image resize`", .0.display()
    )]
    NoOverlay(PathBuf),
    /// A disk asks for what the host does not have.
    #[error(
        "The disk {} asks for io_uring, which this host lacks or forbids: leave out `aio` to do \
         without, or allow it (sysctl kernel.io_uring_disabled, and seccomp in containers)",
        path.display()
    )]
    IoUring {
        /// Path of the image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A file for the seed can't be read.
    #[error("Can't read the {what} {}", path.display())]
    SeedFile {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The seed can't be made of what was given.
    #[error("Can't make the cloud-init seed")]
    Seed(#[source] SeedError),
    /// The seed can't be stored.
    #[error("Can't store the cloud-init seed")]
    StoreSeed(#[source] std::io::Error),
}

impl StorageError {
    /// The image at `path` can't be used, which is said once.
    pub(super) fn disk(path: &Path, source: BlockError) -> StorageError {
        match source {
            BlockError::OutOfRange { .. }
            | BlockError::ReadOnly
            | BlockError::Unsupported { .. }
            | BlockError::Io { .. }
            | BlockError::Cancelled
            | BlockError::Flush(_) => StorageError::Disk {
                path: path.to_owned(),
                source,
            },
            named => StorageError::Image(named),
        }
    }
}

/// The files of an image.
#[must_use]
pub fn disk_paths(image: &ImageConfig) -> DiskPaths {
    let format = image.format.map(|format| match format {
        DiskFormat::Raw => ImageFormat::Raw,
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
        DiskFormat::Vmdk => ImageFormat::Vmdk,
        DiskFormat::Ova => ImageFormat::Ova,
        DiskFormat::Vhd => ImageFormat::Vhd,
        DiskFormat::Vhdx => ImageFormat::Vhdx,
        DiskFormat::Vdi => ImageFormat::Vdi,
    });
    DiskPaths {
        path: image.path.clone(),
        format,
        backing: image.backing.clone(),
        data_files: image.data_file.clone(),
        // A qcow2 has snapshots, an archive has members.
        internal_snapshot: image
            .internal_snapshot
            .clone()
            .or_else(|| image.member.clone()),
    }
}

/// Where a disk's writes are kept, if not in its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The file.
    pub path: PathBuf,
    /// Whether it is there already.
    pub exists: bool,
}

/// The overlay that a disk is used with: the one that was asked for, or else, for an image of a
/// format that is only read, the one beside it. A disk that is only read needs none.
///
/// # Errors
/// Fails when the image can't be looked at.
pub fn overlay_of(disk: &DiskConfig) -> Result<Option<Overlay>, StorageError> {
    let path = match (&disk.overlay, disk.internal_snapshot.is_some()) {
        (Some(path), _) => path.clone(),
        (None, true) => return Ok(None),
        (None, false) => {
            let error = disk_error(disk);
            let image = disk_paths(&disk.image());
            let probe = || edgevmm_block::probe(&edgevmm_block::open_path(&image.path, false)?);
            if image
                .format
                .map_or_else(probe, Ok)
                .map_err(error)?
                .is_writable()
            {
                return Ok(None);
            }
            let mut name = disk.path.clone().into_os_string();
            name.push(".overlay.qcow2");
            name.into()
        }
    };
    let exists = path.exists();
    let needed = !disk.ro && !disk.snapshot;
    Ok((exists || needed).then_some(Overlay { path, exists }))
}

/// Checks that the host has what a disk asks for in `aio`.
///
/// # Errors
/// Fails when it has not.
pub fn check_aio(disk: &DiskConfig) -> Result<(), StorageError> {
    if disk.aio != DiskAio::IoUring {
        return Ok(());
    }
    edgevmm_block::engine::check_io_uring().map_err(|source| StorageError::IoUring {
        path: disk.path.clone(),
        source,
    })
}

/// Opens a disk with the other files that it was given, and no others. Its overlay is made if it
/// has to be.
///
/// # Errors
/// Fails when a file is missing, may not be used, or is no image.
pub fn open_disk(disk: &DiskConfig) -> Result<Arc<dyn BlockBackend>, StorageError> {
    let error = disk_error(disk);
    let image = disk_paths(&disk.image());
    let overlay = overlay_of(disk)?;
    let written = !disk.ro && !disk.snapshot;
    let Some(overlay) = overlay else {
        if disk.overlay_size.is_some() {
            return Err(StorageError::NoOverlay(disk.path.clone()));
        }
        let options = image.open(written).map_err(&error)?;
        return edgevmm_block::open(with_choices(disk, options)).map_err(error);
    };
    let size = disk.overlay_size.map(|size| size.0);
    if !overlay.exists {
        make_overlay(&overlay.path, &image, size)?;
    }
    let name = overlay.path.display().to_string();
    let file = edgevmm_block::open_path(&overlay.path, written).map_err(&error)?;
    let top = DiskOptions {
        place: Some(overlay.path.clone()),
        format: Some(ImageFormat::Qcow2),
        ..DiskOptions::new(file, name)
    };
    let base = image.open(false).map_err(&error)?;
    let options = with_choices(disk, edgevmm_block::overlay::over(top, base));
    let opened = edgevmm_block::open(options).map_err(&error)?;
    if let Some(size) = size {
        grow(&overlay.path, &*opened, size)?;
    }
    Ok(opened)
}

/// Opens a disc for a CD-ROM drive: a file or block device as it is, whatever it looks like.
///
/// # Errors
/// Fails when it is missing, empty or may not be read.
pub fn open_disc(path: &Path, direct: bool) -> Result<Arc<dyn BlockBackend>, StorageError> {
    let file = edgevmm_block::open_path(path, false);
    use_disc(
        file.map_err(|source| StorageError::disk(path, source))?,
        path,
        direct,
    )
}

/// As `open_disc`, of a file that is open, and was at `path`.
///
/// # Errors
/// Fails when it is empty or no file of data.
pub fn use_disc(
    file: File,
    path: &Path,
    direct: bool,
) -> Result<Arc<dyn BlockBackend>, StorageError> {
    let error = |source| StorageError::disk(path, source);
    edgevmm_block::check_opened(&file, path, false).map_err(error)?;
    warn_if_cut_short(path, &file);
    let options = DiskOptions {
        format: Some(ImageFormat::Raw),
        read_only: true,
        direct,
        ..DiskOptions::new(file, path.display().to_string())
    };
    edgevmm_block::open(options).map_err(error)
}

/// Tells of an ISO image that lacks its end, as an interrupted download does. The guest gets errors
/// there.
fn warn_if_cut_short(path: &Path, file: &File) {
    let mut descriptor = [0; 88];
    let read = file.read_exact_at(&mut descriptor, ISO_DESCRIPTOR);
    let (Ok(()), Ok(metadata)) = (read, file.metadata()) else {
        return;
    };
    if !metadata.is_file() || descriptor[..6] != *b"\x01CD001" {
        return;
    }
    let [.., a, b, c, d, _, _, _, _] = descriptor;
    let blocks = u32::from_le_bytes([a, b, c, d]);
    let (wanted, found) = (u64::from(blocks) * ISO_BLOCK, metadata.len());
    if found < wanted {
        tracing::warn!(
            "The ISO image {} has {found} bytes of {wanted}: its end is missing",
            path.display()
        );
    }
}

fn with_choices(disk: &DiskConfig, options: DiskOptions) -> DiskOptions {
    DiskOptions {
        read_only: disk.ro,
        direct: disk.direct,
        snapshot: disk.snapshot,
        ..options
    }
}

fn disk_error(disk: &DiskConfig) -> impl Fn(BlockError) -> StorageError {
    let path = disk.path.clone();
    move |source| StorageError::disk(&path, source)
}

/// Makes an overlay, and the folders that it is in, which are for nobody else.
fn make_overlay(path: &Path, base: &DiskPaths, size: Option<u64>) -> Result<(), StorageError> {
    let error = |source| StorageError::MakeOverlay {
        path: path.to_owned(),
        source,
    };
    if let Some(folder) = path.parent().filter(|folder| *folder != Path::new("")) {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(folder);
        made.map_err(|source| StorageError::OverlayFolder {
            path: folder.to_owned(),
            source,
        })?;
    }
    let new = NewFile::create(path, Existing::Keep).map_err(error)?;
    edgevmm_block::overlay::create(new, base, size).map_err(error)
}

/// Makes a disk as large as is asked for.
fn grow(path: &Path, disk: &dyn BlockBackend, size: u64) -> Result<(), StorageError> {
    let now = disk.size();
    if size < now {
        return Err(StorageError::OverlaySize {
            path: path.to_owned(),
            now: ByteSize(now),
        });
    }
    if size == now {
        return Ok(());
    }
    disk.resize(size)
        .map_err(|source| StorageError::disk(path, source))
}

/// Makes the cloud-init seed as a read-only disk in memory.
///
/// The instance ID is the machine's UUID: cloud-init runs its once-per-instance part again when
/// an image comes up as another machine.
///
/// # Errors
/// Fails when a file can't be read or says nothing that cloud-init would take.
pub fn seed_disk(
    config: &CloudInitConfig,
    uuid: Uuid,
) -> Result<Arc<dyn BlockBackend>, StorageError> {
    let read =
        |what, path: &Option<PathBuf>| path.as_ref().map(|path| read_small(what, path)).transpose();
    let keys = read("SSH public key", &config.ssh_key)?;
    let seed = Seed {
        data_source: match config.datasource {
            edgevmm_config::DataSource::NoCloud => DataSource::NoCloud,
            edgevmm_config::DataSource::ConfigDrive => DataSource::ConfigDrive,
        },
        user_data: read("user-data", &config.user_data)?,
        ssh_keys: keys
            .iter()
            .map(|keys| String::from_utf8_lossy(keys).into_owned())
            .collect(),
        hostname: config.hostname.clone(),
        instance_id: uuid.to_string(),
        network_config: read("network configuration", &config.network_config)?,
    };
    let image = seed.build().map_err(StorageError::Seed)?;
    let fd = memfd_create(c"edgevmm-seed", MFdFlags::MFD_CLOEXEC)
        .map_err(|e| StorageError::StoreSeed(e.into()))?;
    let mut file = File::from(fd);
    file.write_all(&image).map_err(StorageError::StoreSeed)?;
    let name = "cloud-init seed";
    let options = DiskOptions {
        format: Some(ImageFormat::Raw),
        read_only: true,
        ..DiskOptions::new(file, name)
    };
    edgevmm_block::open(options).map_err(|source| StorageError::disk(Path::new(name), source))
}

fn read_small(what: &'static str, path: &Path) -> Result<Vec<u8>, StorageError> {
    let error = |source| StorageError::SeedFile {
        what,
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    let mut bytes = Vec::new();
    file.take(SEED_FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    if bytes.len() as u64 > SEED_FILE_MAX {
        let message = format!("it is larger than the {SEED_FILE_MAX} bytes that are taken");
        return Err(error(std::io::Error::other(message)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::machine::with_sources;

    #[test]
    fn a_refused_image_is_named_once() {
        let folder = tempfile::tempdir().unwrap();
        let images: [(&str, Option<&[u8]>); 4] = [
            ("missing", None),
            ("empty", Some(&[])),
            ("damaged", Some(b"QFI\xfb\0\0\0\x09 and no more")),
            ("short", Some(b"QFI\xfb")),
        ];
        for (name, content) in images {
            let path = folder.path().join(name);
            if let Some(content) = content {
                std::fs::write(&path, content).unwrap();
            }
            let disk = DiskConfig {
                format: Some(DiskFormat::Qcow2),
                ..DiskConfig::new(path.clone())
            };
            let error = open_disk(&disk).unwrap_err();
            let text = with_sources(&error);
            assert_eq!(text.matches(path.to_str().unwrap()).count(), 1, "{text}");
        }
    }
}
