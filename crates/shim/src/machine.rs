//! Makes a machine's configuration from a container's specification.

use std::path::Path;

use edgevmm_config::{
    BootConfig, ByteSize, ConfigError, ConsoleConfig, CpuConfig, DiskConfig, DiskFormat,
    IdentityConfig, MemoryConfig, VmConfig,
};

use uuid::Uuid;

use crate::annotations::Annotations;
use crate::disks::{self, Disk, DisksError, IN_IMAGE, OF_IMAGE};
use crate::image::{Image, ImageError};
use crate::spec::{Resources, Spec};
use crate::volumes::{self, Volumes};

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
    /// By what was to keep its writes, of which there are none.
    #[error(
        "The annotation edgevmm.io/overlay keeps what is written to the disk in the container image, \
         which edgevmm.io/disks has read-only: leave one of both out"
    )]
    ReadOnlyBase,
    /// By what is said of its disks.
    #[error(transparent)]
    Disks(#[from] DisksError),
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
    let mut disks = of_image(&image, &annotations, volumes)?;
    disks.append(&mut volumes.disks);
    if disks.is_empty() && annotations.kernel.is_none() {
        return Err(ImageError::NoDisk.into());
    }
    let disks = annotations.disks.arrange(disks, annotations.disk_bus)?;
    let file = |path: &Option<String>| path.as_deref().map(|path| image.file(path)).transpose();
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let vm = VmConfig {
        name: Some(name.to_owned()),
        cpus: annotations
            .cpus
            .unwrap_or_else(|| CpuConfig::new(cpus(&spec.linux.resources, host))),
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
        watchdog: annotations.watchdog,
        stop_timeout: STOP_TIMEOUT,
        ..VmConfig::default()
    };
    vm.validate()?;
    Ok(vm)
}

/// The disks in the container image: the one that it is about, and others that are named.
fn of_image(
    image: &Image<'_>,
    annotations: &Annotations,
    volumes: &mut Volumes,
) -> Result<Vec<Disk>, MachineError> {
    let named = annotations.disks.files_of_image();
    let first = image.disk(annotations.disk.as_deref(), &named)?;
    if first.is_none() && volumes.overlay.is_some() {
        return Err(MachineError::NoBase);
    }
    let mut disks = Vec::new();
    if let Some(path) = &first {
        let (mut disk, read_only) = disk_of_image(image, annotations, path, OF_IMAGE)?;
        if !read_only {
            disk.config.overlay = Some(match volumes.keep_writes(path) {
                Some(overlay) => overlay,
                None => image.overlay(None)?,
            });
        } else if volumes.overlay.is_some() {
            return Err(MachineError::ReadOnlyBase);
        }
        disks.push(disk);
    }
    for name in named {
        let path = match image.disk(Some(name), &[]) {
            Ok(Some(path)) if first.as_ref() != Some(&path) => path,
            // What is not there is told as any other disk that is not.
            Ok(_) | Err(ImageError::NoDisk) => continue,
            Err(error) => return Err(error.into()),
        };
        let (mut disk, read_only) = disk_of_image(image, annotations, &path, name)?;
        disk.config.serial = Some(volumes::serial(name));
        if !read_only {
            disk.config.overlay = Some(image.overlay(Some(name))?);
        }
        disks.push(disk);
    }
    Ok(disks)
}

/// A disk at `path` in the container image, and whether it is only read.
fn disk_of_image(
    image: &Image<'_>,
    annotations: &Annotations,
    path: &Path,
    name: &str,
) -> Result<(Disk, bool), MachineError> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let mut disk = Disk {
        name: name.to_owned(),
        place: format!("{IN_IMAGE}{file}"),
        config: DiskConfig::new(path),
    };
    let wish = annotations.disks.of(&disk.name, &disk.place);
    if wish.is_some_and(DiskConfig::is_cdrom) && image.is_qcow2(&disk.place)? {
        disk.config.format = Some(DiskFormat::Qcow2);
    }
    Ok((disk, disks::is_read_only(wish)))
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

    use crate::disks::Wishes;
    use crate::spec::{Cpu, Memory};
    use crate::volumes::Given;

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
            disks: vec![Disk {
                name: "data".to_owned(),
                place: "/data".to_owned(),
                config: DiskConfig::new("/volume"),
            }],
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

    #[test]
    fn disks_are_as_the_annotation_says() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("disk")).unwrap();
        let file = |name: &str, text| std::fs::write(root.path().join("disk").join(name), text);
        file("a.raw", "x").unwrap();
        let make = |text: &str, kept: bool| {
            let annotations = Annotations {
                disks: Wishes::parse(text).unwrap(),
                ..Annotations::default()
            };
            let given = Given {
                folder: "/state".into(),
                file: "o".to_owned(),
                link: "/bundle/o".into(),
                over: None,
            };
            let mut volumes = Volumes {
                overlay: kept.then_some(given),
                ..Volumes::default()
            };
            let made = describe(
                "vm",
                &Spec::default(),
                annotations,
                root.path(),
                &mut volumes,
            );
            made.map(|vm| vm.disks).map_err(|error| error.to_string())
        };
        let disks = make("containerDisk,ro,bootindex=3", false).unwrap();
        assert!(disks[0].ro && disks[0].overlay.is_none());
        assert_eq!(disks[0].bootindex, Some(3));
        let error = make("containerDisk,ro", true).unwrap_err();
        assert!(
            error.contains("edgevmm.io/overlay") && error.contains("read-only"),
            "{error}"
        );
        // The only file is what the image is about, whatever it is called.
        let disks = make("/disk/a.raw,bus=sata", true).unwrap();
        assert_eq!(disks[0].overlay.as_deref(), Some(Path::new("/bundle/o")));

        file("b.iso", "x").unwrap();
        file("c.raw", "x").unwrap();
        assert!(
            make("/disk/b.iso,kind=cdrom", false)
                .unwrap_err()
                .contains("(a.raw, c.raw)")
        );
        let disks = make("/disk/b.iso,kind=cdrom\n/disk/c.raw", false).unwrap();
        let paths: Vec<_> = disks
            .iter()
            .map(|disk| disk.path.file_name().unwrap())
            .collect();
        assert_eq!(paths, ["b.iso", "c.raw", "a.raw"]);
        let overlays: Vec<_> = disks.iter().map(|disk| disk.overlay.clone()).collect();
        assert!(overlays[0].is_none() && overlays[1] != overlays[2] && overlays[1].is_some());
        let error = make("/disk/../a,ro", false).unwrap_err();
        assert!(error.contains("several files"), "{error}");
        let error = make("/disk/b.iso\n/disk/c.raw\n/disk/d.raw", false).unwrap_err();
        assert!(
            error.contains("`/disk/d.raw`") && error.contains("containerDisk, b.iso"),
            "{error}"
        );
        std::fs::write(root.path().join("disk/b.iso"), b"QFI\xfb, version 3").unwrap();
        let error = make("/disk/b.iso,kind=cdrom\n/disk/c.raw", false).unwrap_err();
        assert!(error.contains("raw image"), "{error}");
    }

    proptest! {
        #[test]
        fn guest_and_vmm_fit_every_limit(limit: u64) {
            let guest = guest_memory(limit);
            prop_assert!(guest == 0 || guest + OVERHEAD <= limit);
        }
    }
}
