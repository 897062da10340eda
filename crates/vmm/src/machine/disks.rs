//! A machine's disks as devices: which there are, what they may do, and the ways to them.

use std::sync::Arc;

use edgevmm_block::BlockBackend;
use edgevmm_config::{ByteSize, DiskAio, DiskConfig, DiskErrorPolicy, VmConfig};
use edgevmm_devices::disk::{Aio, BlockHandle, ErrorPolicy, Rate, RateLimits, Rates};
use edgevmm_devices::platform::MachineControl;
use edgevmm_devices::virtio::block::{Block, BlockConfig};
use uuid::Uuid;

use super::storage::{StorageError, check_aio, open_disk, seed_disk};

/// Request queues of a disk by default: more than this gains little and each is a thread.
const QUEUES_MAX: u16 = 4;

/// A disk that is open and not a device yet.
#[derive(Debug)]
pub struct OpenDisk {
    config: BlockConfig,
    backend: Arc<dyn BlockBackend>,
    /// Its place in the boot order; `None` is not booted from.
    pub boot_order: Option<u32>,
}

/// A disk of a machine.
#[derive(Debug)]
pub struct Disk {
    /// Its name, such as "disk0" for the first.
    pub name: String,
    /// Its image.
    pub backend: Arc<dyn BlockBackend>,
    /// The way to the device.
    pub handle: BlockHandle,
}

/// Opens all disks of `config`, and the seed that it asks for.
///
/// # Errors
/// Fails when one of them can't be had.
pub fn open(config: &VmConfig, uuid: Uuid) -> Result<Vec<OpenDisk>, StorageError> {
    let queues = u16::from(config.cpus.count).clamp(1, QUEUES_MAX);
    let mut disks = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        check_aio(disk)?;
        disks.push(OpenDisk {
            config: BlockConfig {
                queues: disk.queues.unwrap_or(queues),
                ..block_config(format!("disk{index}"), disk)
            },
            backend: open_disk(disk)?,
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
            backend: seed_disk(cloud_init, uuid)?,
            boot_order: None,
        });
    }
    Ok(disks)
}

impl OpenDisk {
    /// Its name, such as "disk0" for the first.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Its image.
    pub fn backend(&self) -> &dyn BlockBackend {
        &*self.backend
    }

    /// Makes the device.
    pub fn into_device(self, control: Arc<dyn MachineControl>) -> (Block, Disk) {
        let name = self.config.name.clone();
        let block = Block::new(self.config, Arc::clone(&self.backend), control);
        let disk = Disk {
            name,
            backend: self.backend,
            handle: block.handle(),
        };
        (block, disk)
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
