//! What the runtime is told of the guest: processors, memory, what boots it, its network, cloud-init.

use super::{Parts, PodError};
use crate::api::VirtualMachineInstance;
use crate::api::disks::Volume;
use crate::seed;
use crate::shape;

/// Memory that a machine needs beside the guest's, in bytes, and one in so many for page tables: as
/// the runtime reckons it.
const OVERHEAD: u64 = 24 << 20;
const TABLES: u64 = 128;
/// Rounds up what the runtime rounds down.
const GRAIN: u64 = 2 << 20;

/// What to add to a limit of memory so that a guest may have all of it, in bytes.
pub(super) fn overhead(limit: u64) -> u64 {
    OVERHEAD + limit / (TABLES - 1) + 2 * GRAIN
}

pub(super) fn describe(
    instance: &VirtualMachineInstance,
    parts: &mut Parts,
) -> Result<(), PodError> {
    let domain = &instance.spec.domain;
    let memory = shape::guest_memory(domain).unwrap_or(0);
    // Pages are whole, sizes in bytes need not be.
    parts.annotate("memory", format!("{}K", memory.div_ceil(1 << 20) << 10));
    let cpus = shape::topology(domain);
    parts.annotate(
        "cpus",
        format!(
            "{},sockets={},cores={},threads={}",
            cpus.vcpus(),
            cpus.sockets,
            cpus.cores,
            cpus.threads
        ),
    );
    if let Some(model) = domain
        .devices
        .watchdog
        .as_ref()
        .and_then(|watchdog| watchdog.i6300esb.as_ref())
    {
        parts.annotate("watchdog", watchdog(model.action.as_deref()));
    }
    let identity = domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.uuid.clone());
    let identity = match identity {
        Some(uuid) => uuid,
        None => instance
            .metadata
            .uid
            .clone()
            .ok_or(PodError::NoIdentity("UID"))?,
    };
    parts.annotate("uuid", identity);
    if let Some(firmware) = &domain.firmware {
        if let Some(serial) = firmware.serial.as_ref().filter(|serial| !serial.is_empty()) {
            parts.annotate("serial", serial);
        }
        if let Some(loader) = &firmware.bootloader {
            let name = if loader.efi.is_some() { "uefi" } else { "bios" };
            parts.annotate("firmware", name);
        }
        let kernel = firmware.kernel_boot.as_ref();
        if let Some((kernel, container)) =
            kernel.and_then(|kernel| Some((kernel, kernel.container.as_ref()?)))
        {
            parts.image = Some((
                container.image.clone(),
                container.image_pull_policy.clone(),
                container.image_pull_secret.clone(),
            ));
            if let Some(path) = &container.kernel_path {
                parts.annotate("kernel", path);
            }
            if let Some(path) = &container.initrd_path {
                parts.annotate("initrd", path);
            }
            if let Some(arguments) = &kernel.kernel_args {
                parts.annotate("cmdline", arguments);
            }
        }
    }
    network(instance, parts);
    for volume in &instance.spec.volumes {
        cloud_init(volume, parts);
    }
    Ok(())
}

/// What the runtime does where KubeVirt does `action`.
fn watchdog(action: Option<&str>) -> &'static str {
    match action {
        Some("poweroff") => "end",
        Some("shutdown") => "shutdown",
        _ => "reset",
    }
}

fn network(instance: &VirtualMachineInstance, parts: &mut Parts) {
    let spec = &instance.spec;
    let devices = &spec.domain.devices;
    let pod = spec.networks.iter().find(|network| network.pod.is_some());
    let interface = pod.and_then(|network| {
        devices
            .interfaces
            .iter()
            .find(|interface| interface.name == network.name)
    });
    let mode = match interface {
        Some(interface) if interface.bridge.is_some() => "bridge",
        Some(_) => "masquerade",
        None if spec.networks.is_empty() && devices.autoattach_pod_interface != Some(false) => {
            "masquerade"
        }
        None => "none",
    };
    parts.annotate("network", mode);
    let multus: Vec<_> = spec
        .networks
        .iter()
        .filter_map(|network| Some(network.multus.as_ref()?.network_name.as_str()))
        .collect();
    if !multus.is_empty() {
        parts
            .annotations
            .insert("k8s.v1.cni.cncf.io/networks".to_owned(), multus.join(","));
    }
}

fn cloud_init(volume: &Volume, parts: &mut Parts) {
    let Some(source) = &volume.cloud_init_no_cloud else {
        return;
    };
    let text = |plain: &Option<String>, encoded: &Option<String>| {
        let decoded = || encoded.as_deref().and_then(seed::decode);
        plain.clone().or_else(decoded)
    };
    if let Some(text) = text(&source.user_data, &source.user_data_base64) {
        parts.annotate("user-data", text);
    }
    if let Some(text) = text(&source.network_data, &source.network_data_base64) {
        parts.annotate("network-data", text);
    }
}
