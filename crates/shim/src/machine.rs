//! Makes a machine's configuration from a container's specification.

use std::path::Path;

use edgevmm_config::{
    BootConfig, ByteSize, ConfigError, ConsoleConfig, CpuConfig, DiskConfig, IdentityConfig,
    MemoryConfig, VmConfig,
};

use uuid::Uuid;

use crate::annotations::Annotations;
use crate::image::{Image, ImageError};
use crate::spec::{Resources, Spec};
use crate::volumes::Volumes;

/// Memory that the VMM needs beside the guest's: its own, the kernel's for it, and page cache to
/// read disks through.
const OVERHEAD: u64 = 24 << 20;
/// For each so many bytes of guest memory the kernel takes one for page tables.
const TABLES: u64 = 128;
/// Guest memory is a multiple of it, so that it can be in huge pages.
const GRAIN: u64 = 2 << 20;
/// Seconds from the power button to the end by force: as good as none, as whoever stops a pod sends
/// SIGKILL when its own time is over.
const STOP_TIMEOUT: u32 = 86_400;
/// A weight of one processor.
const SHARES_PER_CPU: u64 = 1024;

/// Why a container is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// By its image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// By what was to keep its writes.
    #[error(
        "The annotation edgevmm.io/overlay keeps what is written to the disk in a container image, \
         and this image has none in /disk: leave the annotation out"
    )]
    NoBase,
    /// As a whole.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its memory limit is too small for any.
    #[error(
        "A memory limit of {limit} leaves nothing for a guest, as the VMM needs {overhead} of it: \
         raise the container's limit"
    )]
    Limit {
        /// The limit.
        limit: ByteSize,
        /// What the VMM needs.
        overhead: ByteSize,
    },
    /// What annotations ask for does not fit its limit.
    #[error(
        "edgevmm.io/memory asks for {asked}, but a memory limit of {limit} leaves {left} for the \
         guest: raise the limit or ask for less"
    )]
    Memory {
        /// What was asked for.
        asked: ByteSize,
        /// The limit.
        limit: ByteSize,
        /// What it leaves.
        left: ByteSize,
    },
}

/// The machine that a container describes, named `name`, with its image mounted at `root`.
///
/// # Errors
///
/// When it describes none.
pub fn describe(
    name: &str,
    spec: &Spec,
    annotations: Annotations,
    root: &Path,
    volumes: &mut Volumes,
) -> Result<VmConfig, MachineError> {
    let image = Image::new(root);
    let disk = image.disk(annotations.disk.as_deref())?;
    if disk.is_none() && annotations.kernel.is_none() && volumes.disks.is_empty() {
        return Err(ImageError::NoDisk.into());
    }
    let file = |path: &Option<String>| path.as_deref().map(|path| image.file(path)).transpose();
    let mut disks = Vec::new();
    if let Some(path) = disk {
        let overlay = match volumes.keep_writes(&path) {
            Some(overlay) => overlay,
            None => image.overlay()?,
        };
        disks.push(DiskConfig {
            bus: annotations.disk_bus,
            overlay: Some(overlay),
            ..DiskConfig::new(path)
        });
    } else if volumes.overlay.is_some() {
        return Err(MachineError::NoBase);
    }
    disks.append(&mut volumes.disks);
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let vm = VmConfig {
        name: Some(name.to_owned()),
        cpus: CpuConfig::new(match annotations.cpus {
            Some(count) => count,
            None => cpus(&spec.linux.resources, host),
        }),
        memory: MemoryConfig {
            size: memory(&spec.linux.resources, annotations.memory)?,
            ..MemoryConfig::default()
        },
        disks,
        boot: BootConfig {
            firmware: annotations.firmware.unwrap_or_default(),
            kernel: file(&annotations.kernel)?,
            initrd: file(&annotations.initrd)?,
            cmdline: annotations.cmdline,
            ..BootConfig::default()
        },
        nets: Vec::new(),
        cloud_init: volumes.cloud_init.take(),
        console: ConsoleConfig::default(),
        identity: IdentityConfig {
            uuid: annotations.uuid.or_else(|| {
                let pod = spec.pod()?;
                Some(Uuid::new_v5(&Uuid::NAMESPACE_OID, pod.as_bytes()))
            }),
            serial: annotations.serial,
        },
        stop_timeout: STOP_TIMEOUT,
        ..VmConfig::default()
    };
    vm.validate()?;
    Ok(vm)
}

/// As many vCPUs as the container may use processors, or has a weight for; one when nothing is
/// said, and no more than the host has.
fn cpus(resources: &Resources, host: usize) -> u8 {
    let cpu = &resources.cpu;
    let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok());
    let wanted = match (quota, cpu.period) {
        (Some(quota), Some(period)) if quota > 0 && period > 0 => quota.div_ceil(period),
        _ => cpu.shares.unwrap_or(0).div_ceil(SHARES_PER_CPU),
    };
    let most = u64::try_from(host).unwrap_or(1).clamp(1, 254);
    u8::try_from(wanted.clamp(1, most)).unwrap_or(1)
}

/// Guest memory that a limit on the container leaves: it counts all that the VMM uses.
pub fn guest_memory(limit: u64) -> u64 {
    let left = limit.saturating_sub(OVERHEAD + limit / TABLES);
    left - left % GRAIN
}

fn memory(resources: &Resources, asked: Option<ByteSize>) -> Result<ByteSize, MachineError> {
    let Some(limit) = resources.memory.bytes() else {
        return Ok(asked.unwrap_or_else(|| MemoryConfig::default().size));
    };
    let left = ByteSize(guest_memory(limit));
    let limit = ByteSize(limit);
    match asked {
        Some(asked) if asked > left => Err(MachineError::Memory { asked, limit, left }),
        Some(asked) => Ok(asked),
        None if left < ByteSize::mib(16) => Err(MachineError::Limit {
            limit,
            overhead: ByteSize(OVERHEAD),
        }),
        None => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use crate::spec::{Cpu, Memory};

    use super::*;

    fn resources(limit: Option<i64>, quota: Option<i64>, shares: Option<u64>) -> Resources {
        Resources {
            memory: Memory { limit },
            cpu: Cpu {
                shares,
                quota,
                period: Some(100_000),
            },
            ..Resources::default()
        }
    }

    #[test]
    fn vcpus_follow_limits_then_weights() {
        let count = |quota, shares| cpus(&resources(None, quota, shares), 4);
        assert_eq!(count(Some(150_000), Some(1)), 2);
        assert_eq!(count(Some(-1), Some(3000)), 3);
        assert_eq!(count(None, None), 1);
        assert_eq!(count(Some(i64::MAX), None), 4);
    }

    #[test]
    fn memory_follows_the_limit_and_fits_it() {
        let size = |limit, asked| memory(&resources(limit, None, None), asked);
        assert_eq!(size(None, None).unwrap(), ByteSize::mib(1024));
        assert_eq!(size(Some(256 << 20), None).unwrap(), ByteSize::mib(230));
        let asked = Some(ByteSize::mib(128));
        assert_eq!(size(Some(256 << 20), asked).unwrap(), ByteSize::mib(128));
        let asked = Some(ByteSize::mib(256));
        let error = size(Some(256 << 20), asked).unwrap_err().to_string();
        assert!(error.contains("230M"), "{error}");
        size(Some(32 << 20), None).unwrap_err();
    }

    #[test]
    fn a_container_disk_becomes_a_machine() {
        let root = tempfile::tempdir().unwrap();
        let make = |mut volumes| {
            let annotations = Annotations::default();
            describe(
                "vm",
                &Spec::default(),
                annotations,
                root.path(),
                &mut volumes,
            )
        };
        let volume = || Volumes {
            disks: vec![DiskConfig::new("/volume")],
            ..Volumes::default()
        };
        let error = make(Volumes::default()).unwrap_err().to_string();
        assert!(error.contains("/disk"), "{error}");
        let vm = make(volume()).unwrap();
        assert_eq!(vm.disks[0].path, Path::new("/volume"));
        std::fs::create_dir(root.path().join("disk")).unwrap();
        std::fs::write(root.path().join("disk/d.raw"), "x").unwrap();
        let vm = make(volume()).unwrap();
        assert_eq!(vm.disks[0].path, root.path().join("disk/d.raw"));
        assert_eq!(vm.disks[1].path, Path::new("/volume"));
        assert!(vm.disks[0].overlay.is_some() && vm.nets.is_empty());
    }

    proptest! {
        #[test]
        fn guest_and_vmm_fit_every_limit(limit: u64) {
            let guest = guest_memory(limit);
            prop_assert!(guest == 0 || guest + OVERHEAD <= limit);
        }
    }
}
