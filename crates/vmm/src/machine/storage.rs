//! Opens what a machine's disks are made of.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgevmm_block::{BlockBackend, BlockError, DiskOptions, DiskPaths, ImageFormat};
use edgevmm_cloudinit::{Seed, SeedError};
use edgevmm_config::{CloudInitConfig, DiskConfig, DiskFormat, ImageConfig};
use nix::sys::memfd::{MFdFlags, memfd_create};
use uuid::Uuid;

/// Largest file that goes into a seed: cloud-init's own limit is far below.
const SEED_FILE_MAX: u64 = 1 << 20;

/// Why a machine's disks can't be had.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A disk can't be opened.
    #[error("Can't use the disk {}", path.display())]
    Disk {
        /// Path of the image.
        path: PathBuf,
        /// Why.
        #[source]
        source: BlockError,
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

/// Opens a disk with the other files that it was given, and no others.
///
/// # Errors
/// Fails when a file is missing, may not be used, or is no image.
pub fn open_disk(disk: &DiskConfig) -> Result<Arc<dyn BlockBackend>, StorageError> {
    let error = |source| StorageError::Disk {
        path: disk.path.clone(),
        source,
    };
    let files = disk_paths(&disk.image()).open(!disk.ro && !disk.snapshot);
    let options = DiskOptions {
        read_only: disk.ro,
        direct: disk.direct,
        snapshot: disk.snapshot,
        ..files.map_err(error)?
    };
    edgevmm_block::open(options).map_err(error)
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
    edgevmm_block::open(options).map_err(|source| StorageError::Disk {
        path: PathBuf::from(name),
        source,
    })
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
