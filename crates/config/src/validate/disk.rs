//! What must hold of disks.

use super::{ConfigError, Unique, check_path, is_printable};
use crate::{ByteSize, DiskBus, DiskConfig, DiskErrorPolicy, DiskFormat};

/// Longest serial number of a virtio disk, in bytes.
pub const MAX_SERIAL: usize = 20;
/// Most request queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// Bytes in a disk's sector.
const SECTOR_SIZE: u64 = 512;

/// Checks each disk, and that no two get in each other's way.
pub fn check_disks(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    let mut serials = Unique::new("The disk serial number");
    for (number, disk) in disks.iter().enumerate() {
        check_disk(disk)?;
        serials.add(disk.serial.as_deref())?;
        let earlier = || disks.iter().take(number);
        if earlier()
            .filter(|other| other.path == disk.path)
            .any(|other| other.is_written() || disk.is_written())
        {
            return Err(ConfigError::SharedDisk(disk.path.clone()));
        }
        let writes = |disk: &DiskConfig| !disk.ro && !disk.snapshot;
        if let Some(overlay) = &disk.overlay
            && earlier()
                .filter(|other| other.overlay.as_ref() == Some(overlay))
                .any(|other| writes(other) || writes(disk))
        {
            return Err(ConfigError::SharedOverlay(overlay.clone()));
        }
    }
    Ok(())
}

fn check_disk(disk: &DiskConfig) -> Result<(), ConfigError> {
    let path = || disk.path.clone();
    if disk.is_cdrom() {
        check_cdrom(disk)?;
    } else {
        check_path("disk", &disk.path)?;
    }
    if disk.bus() == DiskBus::Sata && disk.queues.is_some() {
        return Err(ConfigError::DriveKey {
            what: "SATA disk",
            path: path(),
            key: "queues",
        });
    }
    disk.backing
        .iter()
        .try_for_each(|backing| check_path("backing file", backing))?;
    disk.data_file
        .iter()
        .try_for_each(|data| check_path("data file", data))?;
    if disk.format == Some(DiskFormat::Raw) && !disk.backing.is_empty() {
        return Err(ConfigError::RawBacking(path()));
    }
    check_overlay(disk)?;
    if disk
        .serial
        .as_deref()
        .is_some_and(|serial| !is_printable(serial, MAX_SERIAL))
    {
        return Err(ConfigError::DiskSerial(path()));
    }
    check_limits(disk)?;
    match disk.queues {
        None | Some(1..=MAX_QUEUES) => Ok(()),
        Some(queues) => Err(ConfigError::DiskQueues {
            path: path(),
            queues,
        }),
    }
}

/// Checks that a CD-ROM drive is asked for nothing that only disks have. Its image is read as it
/// is, and errors are the guest's to deal with.
fn check_cdrom(disk: &DiskConfig) -> Result<(), ConfigError> {
    let format = disk.format.is_some_and(|format| format != DiskFormat::Raw);
    let unfit = [
        ("bus", disk.bus() != DiskBus::Sata),
        ("format", format),
        ("backing", !disk.backing.is_empty()),
        ("data_file", !disk.data_file.is_empty()),
        ("member", disk.member.is_some()),
        ("internal_snapshot", disk.internal_snapshot.is_some()),
        ("overlay", disk.overlay.is_some()),
        ("overlay_size", disk.overlay_size.is_some()),
        ("snapshot", disk.snapshot),
        ("error_policy", disk.error_policy != DiskErrorPolicy::Stop),
    ];
    let found = unfit.into_iter().find(|(_, unfit)| *unfit);
    found.map_or(Ok(()), |(key, _)| {
        Err(ConfigError::DriveKey {
            what: "CD-ROM drive",
            path: disk.path.clone(),
            key,
        })
    })
}

fn check_limits(disk: &DiskConfig) -> Result<(), ConfigError> {
    let bytes = |size: Option<ByteSize>| size.map(|size| size.0);
    let limited = |limits: &[(&str, Option<u64>)]| limits.iter().any(|limit| limit.1.is_some());
    let on_bytes = [
        ("bps", bytes(disk.bps)),
        ("bps_read", bytes(disk.bps_read)),
        ("bps_write", bytes(disk.bps_write)),
    ];
    let on_requests = [
        ("iops", disk.iops),
        ("iops_read", disk.iops_read),
        ("iops_write", disk.iops_write),
    ];
    let bursts = [
        ("bps_burst", bytes(disk.bps_burst), limited(&on_bytes)),
        ("iops_burst", disk.iops_burst, limited(&on_requests)),
    ];
    let wrong = |key, reason| {
        Err(ConfigError::DiskLimit {
            path: disk.path.clone(),
            key,
            reason,
        })
    };
    let values = on_bytes.into_iter().chain(on_requests);
    for (key, value) in values.chain(bursts.map(|(key, value, _)| (key, value))) {
        if value == Some(0) {
            return wrong(key, "use at least 1, or leave it out for no limit");
        }
    }
    for (key, value, limited) in bursts {
        if value.is_some() && !limited {
            return wrong(
                key,
                "there is no limit that it could be a burst of: add one",
            );
        }
    }
    Ok(())
}

fn check_overlay(disk: &DiskConfig) -> Result<(), ConfigError> {
    let path = || disk.path.clone();
    if let Some(overlay) = &disk.overlay {
        check_path("overlay", overlay)?;
    }
    if disk.internal_snapshot.is_some() {
        if disk.overlay.is_some() || disk.overlay_size.is_some() {
            return Err(ConfigError::SnapshotOverlay(path()));
        }
        if !disk.ro && !disk.snapshot {
            return Err(ConfigError::SnapshotWritten(path()));
        }
    }
    match disk.overlay_size {
        Some(size) if size.0 == 0 || !size.0.is_multiple_of(SECTOR_SIZE) => {
            Err(ConfigError::OverlaySize { path: path(), size })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::VmConfig;

    fn check(yaml: &str) -> Result<(), String> {
        VmConfig::parse(yaml)
            .unwrap()
            .validate()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sound_disks_pass() {
        for yaml in [
            "disks: [{path: a, ro: true}, {path: a, snapshot: true}]",
            "disks: [{path: a, overlay: o, overlay_size: 20G}, {path: a, overlay: p}]",
            "disks: [{path: a, overlay: o, ro: true}, {path: a, overlay: o, snapshot: true}]",
            "disks: [{path: a, internal_snapshot: s, ro: true, data_file: [d]}]",
            "disks: [{path: a, bps: 1M, bps-burst: 5M, iops_write: 1, iops_burst: 9}]",
            "disks: [{path: a, aio: io_uring, error-policy: enospace}]",
            "disks: [{path: a, bus: sata}, {path: b, kind: cdrom, ro: true}, {path: b, kind: cdrom}]",
            "disks: [{path: a, kind: cdrom, bus: sata, format: raw}, {path: '', kind: cdrom}, {path: '', kind: cdrom}]",
        ] {
            assert_eq!(check(yaml), Ok(()), "{yaml}");
        }
    }

    #[test]
    fn each_rule_has_its_message() {
        for (yaml, expected) in [
            ("disks: [{path: ''}]", "path of the disk is empty"),
            ("disks: [{path: '', kind: cdrom}]", "nothing to boot"),
            (
                "disks: [{path: a, kind: cdrom, overlay: o}]",
                "CD-ROM drive a can't have `overlay`",
            ),
            (
                "disks: [{path: a, kind: cdrom, bus: virtio}]",
                "CD-ROM drive a can't have `bus`",
            ),
            (
                "disks: [{path: a, kind: cdrom, format: qcow2}]",
                "CD-ROM drive a can't have `format`",
            ),
            (
                "disks: [{path: a, bus: sata, queues: 2}]",
                "SATA disk a can't have `queues`",
            ),
            (
                "disks: [{path: a, kind: cdrom}, {path: a}]",
                "a is there twice",
            ),
            (
                "disks: [{path: a}, {path: a, ro: true}]",
                "a is there twice",
            ),
            (
                "disks: [{path: a, serial: 123456789012345678901}]",
                "serial number of disk a",
            ),
            ("disks: [{path: a, serial: é}]", "serial number of disk a"),
            (
                "disks: [{path: a, serial: s}, {path: b, serial: s}]",
                "serial number s is there",
            ),
            (
                "disks: [{path: a, bootindex: 1}, {path: b, bootindex: 1}]",
                "boot index 1 is there",
            ),
            (
                "disks: [{path: a, format: raw, backing: [b]}]",
                "Disk a is raw",
            ),
            ("disks: [{path: a, queues: 0}]", "use 1 to 16"),
            (
                "disks: [{path: a, iops_read: 0}]",
                "a can't have `iops_read`: use at least 1",
            ),
            (
                "disks: [{path: a, iops: 5, bps_burst: 1M}]",
                "`bps_burst`: there is no limit",
            ),
            (
                "disks: [{path: a}, {path: a, overlay: o}]",
                "a is there twice",
            ),
            (
                "disks: [{path: a, overlay: o}, {path: b, overlay: o}]",
                "overlay o is there twice",
            ),
            (
                "disks: [{path: a, overlay: ''}]",
                "path of the overlay is empty",
            ),
            (
                "disks: [{path: a, data_file: ['']}]",
                "path of the data file is empty",
            ),
            (
                "disks: [{path: a, overlay: o, overlay_size: 1000}]",
                "can't have 1000: use whole sectors",
            ),
            (
                "disks: [{path: a, internal_snapshot: s}]",
                "can only be read",
            ),
            (
                "disks: [{path: a, internal_snapshot: s, ro: true, overlay: o}]",
                "leave one of both out",
            ),
        ] {
            let error = check(yaml).unwrap_err();
            assert!(error.contains(expected), "{yaml}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
