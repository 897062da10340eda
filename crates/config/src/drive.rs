//! How a guest sees a disk: as what, and on which bus.

use serde::{Deserialize, Serialize};

use crate::{DiskConfig, VmConfig};

/// Drives that one SATA adapter has room for.
pub const SATA_PORTS: usize = 6;

/// What the guest takes a disk for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskKind {
    /// A disk.
    #[default]
    Disk,
    /// A CD-ROM drive with the image in it.
    Cdrom,
}

/// How the guest reaches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// virtio-blk.
    Virtio,
    /// A SATA adapter (AHCI), for guests without virtio drivers.
    Sata,
}

impl DiskConfig {
    /// Whether it is a CD-ROM drive.
    #[must_use]
    pub fn is_cdrom(&self) -> bool {
        self.kind == DiskKind::Cdrom
    }

    /// Whether it is a CD-ROM drive without a disc.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.is_cdrom() && self.path.as_os_str().is_empty()
    }

    /// Its bus: virtio for disks and SATA for CD-ROM drives, unless another is asked for.
    #[must_use]
    pub fn bus(&self) -> DiskBus {
        self.bus.unwrap_or(match self.kind {
            DiskKind::Disk => DiskBus::Virtio,
            DiskKind::Cdrom => DiskBus::Sata,
        })
    }
}

impl VmConfig {
    /// The disks with the names by which they are told apart at run time: "disk0" for the first
    /// disk, "cdrom0" for the first CD-ROM drive.
    pub fn named_disks(&self) -> impl Iterator<Item = (String, &DiskConfig)> {
        let (mut disks, mut cdroms) = (0, 0);
        self.disks.iter().map(move |disk| {
            let (kind, count) = match disk.kind {
                DiskKind::Disk => ("disk", &mut disks),
                DiskKind::Cdrom => ("cdrom", &mut cdroms),
            };
            let name = format!("{kind}{count}");
            *count += 1;
            (name, disk)
        })
    }

    /// PCI functions that the disks take.
    pub(crate) fn disk_functions(&self) -> usize {
        let on_sata = self.disks.iter().filter(|disk| disk.bus() == DiskBus::Sata);
        let on_sata = on_sata.count();
        self.disks.len() - on_sata + on_sata.div_ceil(SATA_PORTS)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_kind_is_counted_by_itself() {
        let yaml = "disks: [{path: a}, {path: b, kind: cdrom}, {path: c, bus: sata}, {path: '', kind: cdrom}]";
        let vm = VmConfig::parse(yaml).unwrap();
        vm.validate().unwrap();
        let names: Vec<_> = vm.named_disks().map(|(name, _)| name).collect();
        assert_eq!(names, ["disk0", "cdrom0", "disk1", "cdrom1"]);
        assert_eq!(vm.disk_functions(), 2);
        assert!(vm.disks[3].is_empty());
    }
}
