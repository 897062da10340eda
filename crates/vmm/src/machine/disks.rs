//! A machine's disks as devices: which there are, what they may do, and the ways to them.

use std::sync::Arc;

use edgevmm_block::BlockBackend;
use edgevmm_config::{ByteSize, DiskAio, DiskBus, DiskConfig, DiskErrorPolicy, VmConfig};
use edgevmm_devices::ahci::{Drive, DriveConfig, MediaHandle};
use edgevmm_devices::disk::{Aio, BlockHandle, ErrorPolicy, Rate, RateLimits, Rates};
use edgevmm_devices::platform::MachineControl;
use edgevmm_devices::virtio::block::{Block, BlockConfig};
use uuid::Uuid;

use super::storage::{StorageError, check_aio, open_disc, open_disk, seed_disk};

/// Request queues of a disk by default: more than this gains little and each is a thread.
const QUEUES_MAX: u16 = 4;

/// A disk that is open and not a device yet.
#[derive(Debug)]
pub struct OpenDisk {
    config: BlockConfig,
    image: Image,
    /// Its place in the boot order; `None` is not booted from.
    pub boot_order: Option<u32>,
}

/// What a disk is made of.
#[derive(Debug)]
enum Image {
    Virtio(Arc<dyn BlockBackend>),
    Sata(Arc<dyn BlockBackend>),
    CdRom(Option<Arc<dyn BlockBackend>>),
}

/// A disk as a device.
#[derive(Debug)]
pub enum DiskDevice {
    /// One of its own.
    Virtio(Box<Block>),
    /// One on a SATA adapter.
    Sata(Box<Drive>),
}

/// A disk of a machine.
#[derive(Debug)]
pub struct Disk {
    /// Its name, such as "disk0" for the first.
    pub name: String,
    /// Its image; none of a CD-ROM drive, where it may change.
    pub backend: Option<Arc<dyn BlockBackend>>,
    /// The way to the device.
    pub handle: BlockHandle,
    /// The way to what is in it, of a CD-ROM drive.
    pub media: Option<MediaHandle>,
}

/// Opens all disks of `config`, and the seed that it asks for.
///
/// # Errors
/// Fails when one of them can't be had.
pub fn open(config: &VmConfig, uuid: Uuid) -> Result<Vec<OpenDisk>, StorageError> {
    let queues = u16::from(config.cpus.count).clamp(1, QUEUES_MAX);
    let mut disks = Vec::new();
    for (name, disk) in config.named_disks() {
        check_aio(disk)?;
        disks.push(OpenDisk {
            config: BlockConfig {
                queues: disk.queues.unwrap_or(queues),
                ..block_config(name, disk)
            },
            image: open_image(disk)?,
            // Those without a place follow those with one.
            boot_order: Some(disk.bootindex.unwrap_or(u32::MAX)),
        });
    }
    if let Some(cloud_init) = &config.cloud_init {
        disks.push(OpenDisk {
            config: BlockConfig {
                name: "seed".into(),
                serial: "cloud-init".into(),
                ..BlockConfig::default()
            },
            image: Image::Virtio(seed_disk(cloud_init, uuid)?),
            boot_order: None,
        });
    }
    Ok(disks)
}

fn open_image(disk: &DiskConfig) -> Result<Image, StorageError> {
    Ok(if disk.is_cdrom() {
        let disc = (!disk.is_empty()).then(|| open_disc(&disk.path, disk.direct));
        Image::CdRom(disc.transpose()?)
    } else {
        let image = open_disk(disk)?;
        match disk.bus() {
            DiskBus::Virtio => Image::Virtio(image),
            DiskBus::Sata => Image::Sata(image),
        }
    })
}

impl OpenDisk {
    /// Its name, such as "disk0" for the first.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Its image; none of a CD-ROM drive, where it may change.
    pub fn backend(&self) -> Option<&dyn BlockBackend> {
        match &self.image {
            Image::Virtio(image) | Image::Sata(image) => Some(&**image),
            Image::CdRom(_) => None,
        }
    }

    /// Makes the device.
    pub fn into_device(self, control: Arc<dyn MachineControl>) -> (DiskDevice, Disk) {
        let name = self.config.name.clone();
        let (device, backend, handle, media) = match self.image {
            Image::Virtio(image) => {
                let block = Block::new(self.config, Arc::clone(&image), control);
                let handle = block.handle();
                (
                    DiskDevice::Virtio(Box::new(block)),
                    Some(image),
                    handle,
                    None,
                )
            }
            Image::Sata(image) => {
                let drive = Drive::disk(drive_config(self.config), Arc::clone(&image), control);
                let handle = drive.handle();
                (DiskDevice::Sata(Box::new(drive)), Some(image), handle, None)
            }
            Image::CdRom(disc) => {
                let config = DriveConfig {
                    // A scratch on the disc is nothing to pause a machine for.
                    error_policy: ErrorPolicy::Report,
                    ..drive_config(self.config)
                };
                let drive = Drive::cdrom(config, disc, control);
                let (handle, media) = (drive.handle(), drive.media());
                (DiskDevice::Sata(Box::new(drive)), None, handle, media)
            }
        };
        let disk = Disk {
            name,
            backend,
            handle,
            media,
        };
        (device, disk)
    }
}

fn drive_config(config: BlockConfig) -> DriveConfig {
    DriveConfig {
        name: config.name,
        serial: config.serial,
        aio: config.aio,
        error_policy: config.error_policy,
        rate_limits: config.rate_limits,
    }
}

fn block_config(name: String, disk: &DiskConfig) -> BlockConfig {
    let bytes = |size: Option<ByteSize>| size.map(|size| size.0);
    let rates = |total, read, write, burst| {
        let rate = |limit: Option<u64>| limit.map(|per_second| Rate { per_second, burst });
        Rates {
            total: rate(total),
            read: rate(read),
            write: rate(write),
        }
    };
    BlockConfig {
        name,
        serial: disk.serial.clone().unwrap_or_default(),
        queues: 1,
        aio: match disk.aio {
            DiskAio::Auto | DiskAio::IoUring => Aio::Auto,
            DiskAio::Threads => Aio::Threads,
        },
        error_policy: match disk.error_policy {
            DiskErrorPolicy::Stop => ErrorPolicy::Stop,
            DiskErrorPolicy::Report => ErrorPolicy::Report,
            DiskErrorPolicy::Ignore => ErrorPolicy::Ignore,
            DiskErrorPolicy::EnoSpace => ErrorPolicy::EnoSpace,
        },
        rate_limits: RateLimits {
            bytes: rates(
                bytes(disk.bps),
                bytes(disk.bps_read),
                bytes(disk.bps_write),
                bytes(disk.bps_burst),
            ),
            requests: rates(disk.iops, disk.iops_read, disk.iops_write, disk.iops_burst),
        },
    }
}
