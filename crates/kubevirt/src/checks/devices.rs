//! Checks of disks and network interfaces.

use std::collections::BTreeSet;

use super::{Report, is_name};
use crate::api::InstanceSpec;
use crate::api::disks::Disk;
use crate::api::network::Interface;

/// Longest serial number of a disk, in bytes.
const MAX_SERIAL: usize = 20;

pub(super) fn check(spec: &InstanceSpec, report: &mut Report<'_>) {
    let devices = &spec.domain.devices;
    let mut names = BTreeSet::new();
    for (index, disk) in devices.disks.iter().enumerate() {
        let mut report = report.below(&format!("domain.devices.disks[{index}]"));
        if !names.insert(&disk.name) {
            report.refuse("name", "another disk is called so");
        }
        if !spec.volumes.iter().any(|volume| volume.name == disk.name) {
            report.refuse("name", format!("there is no volume `{}`", disk.name));
        }
        self::disk(disk, &mut report);
        let volume = spec.volumes.iter().find(|volume| volume.name == disk.name);
        if volume.is_some_and(|volume| volume.cloud_init_no_cloud.is_some()) {
            seed(disk, &mut report);
        }
        if disk.cdrom.is_some() && volume.is_some_and(|volume| volume.empty_disk.is_some()) {
            report.refuse(
                "cdrom",
                "an empty disk in a CD-ROM drive is of no use: make it a disk",
            );
        }
    }
    serials(spec, report);
    let orders: Vec<_> = devices
        .disks
        .iter()
        .filter_map(|disk| disk.boot_order)
        .collect();
    if orders.iter().collect::<BTreeSet<_>>().len() < orders.len() || orders.contains(&0) {
        report.refuse(
            "domain.devices.disks",
            "each bootOrder is another number from 1 on",
        );
    }
    for field in [
        ("autoattachSerialConsole", devices.autoattach_serial_console),
        ("autoattachMemBalloon", devices.autoattach_mem_balloon),
    ] {
        if field.1 == Some(false) {
            report.refuse(
                &format!("domain.devices.{}", field.0),
                "it can't be left out",
            );
        }
    }
    if let Some(watchdog) = &devices.watchdog {
        let mut report = report.below("domain.devices.watchdog");
        match &watchdog.i6300esb {
            Some(model) => {
                let actions = ["", "reset", "poweroff", "shutdown"];
                report.expect_one_of("i6300esb.action", model.action.as_deref(), &actions);
            }
            None => report.refuse("i6300esb", "write it, as there is no other model"),
        }
    }
    networks(spec, report);
}

fn disk(disk: &Disk, report: &mut Report<'_>) {
    if disk.disk.is_some() && disk.cdrom.is_some() {
        report.refuse("cdrom", "it is a disk already: leave one out");
    }
    if let Some(target) = &disk.disk {
        report.expect_one_of("disk.bus", target.bus.as_deref(), &["", "virtio", "sata"]);
        if target.readonly == Some(true) && target.bus.as_deref() != Some("virtio") {
            report.refuse(
                "disk.readonly",
                "a SATA disk can't be read-only: use virtio or a cdrom",
            );
        }
    }
    if let Some(cdrom) = &disk.cdrom {
        report.expect_one_of("cdrom.bus", cdrom.bus.as_deref(), &["", "sata"]);
        report.expect_one_of("cdrom.tray", cdrom.tray.as_deref(), &["", "closed"]);
        if cdrom.readonly == Some(false) {
            report.refuse("cdrom.readonly", "CD-ROMs are not written");
        }
    }
    if disk
        .serial
        .as_ref()
        .is_some_and(|serial| !is_serial(serial))
    {
        report.refuse("serial", "write at most 20 letters, digits, _, ., + and -");
    }
    let caches = ["", "none", "writeback"];
    report.expect_one_of("cache", disk.cache.as_deref(), &caches);
    report.expect_one_of("io", disk.io.as_deref(), &["", "native", "threads"]);
    let policies: &[&str] = match disk.cdrom {
        Some(_) => &["", "stop"],
        None => &["", "stop", "report", "ignore", "enospace"],
    };
    report.expect_one_of("errorPolicy", disk.error_policy.as_deref(), policies);
}

/// cloud-init's disk is made where the machine starts: it is read-only, and on virtio.
fn seed(disk: &Disk, report: &mut Report<'_>) {
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if set(&disk.serial) {
        report.refuse("serial", "cloud-init's disk has none of its own");
    }
    if disk.error_policy.as_deref().unwrap_or("stop") != "stop" {
        report.refuse("errorPolicy", "cloud-init's disk has none");
    }
}

/// Checks that no two disks have the same serial number.
fn serials(spec: &InstanceSpec, report: &mut Report<'_>) {
    let mut seen = BTreeSet::new();
    for (volume, disk) in crate::pod::in_order(spec) {
        let Some(serial) = crate::pod::serial(volume, disk) else {
            continue;
        };
        if !seen.insert(serial) {
            report.refuse(
                "domain.devices.disks",
                format!("two disks would have the serial number `{serial}`: volumes without one have their name"),
            );
        }
    }
}

/// Whether it can be a disk's serial number.
fn is_serial(serial: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    serial.len() <= MAX_SERIAL && serial.bytes().all(plain)
}

fn networks(spec: &InstanceSpec, report: &mut Report<'_>) {
    let interfaces = &spec.domain.devices.interfaces;
    for (index, network) in spec.networks.iter().enumerate() {
        let mut report = report.below(&format!("networks[{index}]"));
        if network.pod.is_some() == network.multus.is_some() {
            report.refuse("", "write exactly one of pod and multus");
        }
        let attached = network.multus.as_ref().map(|multus| &multus.network_name);
        let names = |path: &String| path.split('/').count() <= 2 && path.split('/').all(is_name);
        if attached.is_some_and(|path| !names(path)) {
            report.refuse("multus.networkName", "write a name, or namespace/name");
        }
        if !interfaces
            .iter()
            .any(|interface| interface.name == network.name)
        {
            report.refuse("name", format!("there is no interface `{}`", network.name));
        }
        let same = |other: &&crate::api::network::Network| other.name == network.name;
        if spec.networks.iter().filter(same).count() > 1 {
            report.refuse("name", "another network is called so");
        }
    }
    if spec
        .networks
        .iter()
        .filter(|network| network.pod.is_some())
        .count()
        > 1
    {
        report.refuse("networks", "the pod's network can be there once");
    }
    for (index, interface) in interfaces.iter().enumerate() {
        let mut report = report.below(&format!("domain.devices.interfaces[{index}]"));
        self::interface(spec, interface, &mut report);
    }
}

fn interface(spec: &InstanceSpec, interface: &Interface, report: &mut Report<'_>) {
    let of = |name: &str| spec.networks.iter().find(|network| network.name == name);
    let Some(network) = of(&interface.name) else {
        return report.refuse("name", format!("there is no network `{}`", interface.name));
    };
    if interface.masquerade.is_some() == interface.bridge.is_some() {
        report.refuse("", "write exactly one of masquerade and bridge");
    }
    if network.multus.is_some() && interface.masquerade.is_some() {
        report.refuse(
            "masquerade",
            "only the pod's own network can be behind its address",
        );
    }
    report.expect_one_of("model", interface.model.as_deref(), &["", "virtio"]);
    for (index, port) in interface.ports.iter().enumerate() {
        let mut report = report.below(&format!("ports[{index}]"));
        if port.port == 0 {
            report.refuse("port", "write 1 to 65535");
        }
        report.expect_one_of("protocol", port.protocol.as_deref(), &["", "TCP", "UDP"]);
    }
}
