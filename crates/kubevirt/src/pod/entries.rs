//! How the guest has each disk: the runtime's annotation `edgevmm.io/disks`, an entry on each line in the
//! order of the instance's disks.

use crate::api::InstanceSpec;
use crate::api::disks::{Disk, Volume};

/// What the runtime calls the disk in the container image.
const OF_IMAGE: &str = "containerDisk";

/// How the guest has a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// On virtio.
    Virtio,
    /// On SATA.
    Sata,
    /// As a CD-ROM.
    CdRom,
}

impl Way {
    /// That of a volume, of whose disk something may be said.
    pub(crate) fn of(volume: &Volume, disk: Option<&Disk>) -> Self {
        let target = disk.and_then(|disk| disk.disk.as_ref());
        let bus = target.and_then(|target| said(target.bus.as_deref()));
        match bus {
            _ if disk.is_some_and(|disk| disk.cdrom.is_some()) => Self::CdRom,
            Some("virtio") => Self::Virtio,
            // So the runtime has files on SATA: guests look for such a file system on no other medium.
            _ if is_image(volume) => Self::Sata,
            _ => Self::CdRom,
        }
    }
}

/// The annotation; `None` without disks.
pub(super) fn of_disks(spec: &InstanceSpec) -> Option<String> {
    let entries: Vec<_> = in_order(spec)
        .into_iter()
        .map(|(volume, disk)| entry(volume, disk))
        .collect();
    (!entries.is_empty()).then(|| entries.join("\n"))
}

/// Volumes that the runtime makes disks of, each with what is said of its disk: as the instance lists
/// disks, and then those of which nothing is said. cloud-init's disk is none of them.
pub(crate) fn in_order(spec: &InstanceSpec) -> Vec<(&Volume, Option<&Disk>)> {
    let disks = &spec.domain.devices.disks;
    let volumes = || {
        spec.volumes
            .iter()
            .filter(|volume| volume.cloud_init_no_cloud.is_none())
    };
    let said = disks.iter().filter_map(|disk| {
        let volume = volumes().find(|volume| volume.name == disk.name)?;
        Some((volume, Some(disk)))
    });
    let of_none = |volume: &&Volume| disks.iter().all(|disk| disk.name != volume.name);
    let unsaid = volumes().filter(of_none).map(|volume| (volume, None));
    said.chain(unsaid).collect()
}

/// The serial number by which the guest finds a disk, when it is not cut: the volume's name when
/// nothing is said. An image's has none then.
pub(crate) fn serial<'a>(volume: &'a Volume, disk: Option<&'a Disk>) -> Option<&'a str> {
    let said = disk.and_then(|disk| said(disk.serial.as_deref()));
    said.or_else(|| volume.container_disk.is_none().then_some(&*volume.name))
}

/// Whether nothing is written to a disk, so that an empty one would be of no use.
pub(super) fn is_read_only(disk: Option<&Disk>) -> bool {
    let Some(disk) = disk else { return false };
    let target = disk.disk.as_ref();
    disk.cdrom.is_some() || target.is_some_and(|target| target.readonly == Some(true))
}

fn entry(volume: &Volume, disk: Option<&Disk>) -> String {
    let name = match volume.container_disk {
        Some(_) => OF_IMAGE,
        None => &*volume.name,
    };
    let way = match Way::of(volume, disk) {
        Way::Virtio => "bus=virtio",
        Way::Sata => "bus=sata",
        Way::CdRom => "kind=cdrom",
    };
    let mut entry = format!("{name},{way}");
    let Some(disk) = disk else { return entry };
    if disk.cdrom.is_none() && is_read_only(Some(disk)) {
        entry += ",ro";
    }
    if let Some(order) = disk.boot_order {
        entry += &format!(",bootindex={order}");
    }
    for (key, value) in [
        ("serial", said(disk.serial.as_deref())),
        ("error_policy", said(disk.error_policy.as_deref())),
    ] {
        if let Some(value) = value {
            entry += &format!(",{key}={value}");
        }
    }
    // What is made of the API's files is in memory anyway.
    if is_image(volume) && disk.cache.as_deref() == Some("none") {
        entry += ",direct";
    }
    if disk.io.as_deref() == Some("threads") {
        entry += ",aio=threads";
    }
    entry
}

/// Whether a volume has a disk image.
pub(crate) fn is_image(volume: &Volume) -> bool {
    volume.container_disk.is_some()
        || volume.persistent_volume_claim.is_some()
        || volume.data_volume.is_some()
        || volume.empty_disk.is_some()
}

fn said(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}
