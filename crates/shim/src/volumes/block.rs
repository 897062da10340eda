//! Block devices of the container (`volumeDevices`).
//!
//! A specification has no path of the host for them, only their numbers; sysfs tells what the kernel
//! calls them.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use edgevmm_config::{DiskConfig, DiskFormat};
use nix::sys::stat::makedev;

use super::{VolumeError, name_of_place, serial};
use crate::disks::Disk;
use crate::spec::{Device, Spec};

/// Devices that a machine gets by its VMM, if at all: plugins hand them out to place pods.
const VMM_DEVICES: [&str; 6] = [
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/vhost-net",
    "/dev/vhost-vsock",
    "/dev/fuse",
    "/dev/null",
];

/// The disks that a container's devices are.
pub(super) fn disks(spec: &Spec) -> Result<Vec<Disk>, VolumeError> {
    let devices = spec.linux.devices.iter();
    let devices = devices.filter(|device| !VMM_DEVICES.contains(&device.path.as_str()));
    devices.map(|device| disk(spec, device)).collect()
}

fn disk(spec: &Spec, device: &Device) -> Result<Disk, VolumeError> {
    if device.kind != "b" {
        return Err(VolumeError::Device(device.path.clone()));
    }
    let path = find(device).map_err(|source| VolumeError::NoDevice {
        place: device.path.clone(),
        numbers: format!("{}:{}", device.major, device.minor),
        source,
    })?;
    let place = device.path.strip_prefix("/dev").unwrap_or(&device.path);
    let name = name_of_place(place);
    let mut config = DiskConfig::new(path);
    config.serial = Some(serial(&name));
    config.format = Some(DiskFormat::Raw);
    config.ro = !spec.linux.resources.may_write(device);
    let place = device.path.clone();
    Ok(Disk {
        name,
        place,
        config,
    })
}

/// The device's node on the host.
fn find(device: &Device) -> io::Result<PathBuf> {
    let (Ok(major), Ok(minor)) = (u64::try_from(device.major), u64::try_from(device.minor)) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.unwrap_or_default());
    let metadata = fs::metadata(&path)?;
    if metadata.file_type().is_block_device() && metadata.rdev() == makedev(major, minor) {
        return Ok(path);
    }
    let message = format!("{} is another device", path.display());
    Err(io::Error::other(message))
}
