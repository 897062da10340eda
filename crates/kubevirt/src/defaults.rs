//! What an instance has when its manifest says nothing, as KubeVirt's defaults are.

use crate::api::InstanceSpec;
use crate::api::disks::DiskTarget;
use crate::api::domain::{Empty, Machine};
use crate::api::network::{Interface, Network, PodNetwork};

/// Name of the interface that is made unasked.
const DEFAULT: &str = "default";

/// Fills in what is missing.
pub fn fill(spec: &mut InstanceSpec) {
    let volumes = spec.volumes.iter().map(|volume| volume.name.clone());
    let missing: Vec<_> = volumes
        .filter(|name| {
            !spec
                .domain
                .devices
                .disks
                .iter()
                .any(|disk| disk.name == *name)
        })
        .collect();
    let devices = &mut spec.domain.devices;
    for name in missing {
        devices.disks.push(crate::api::disks::Disk {
            name,
            ..Default::default()
        });
    }
    for disk in &mut devices.disks {
        if disk.disk.is_none() && disk.cdrom.is_none() {
            disk.disk = Some(DiskTarget::default());
        }
        let bus = match (&mut disk.disk, &mut disk.cdrom) {
            (Some(target), _) => &mut target.bus,
            (_, Some(target)) => &mut target.bus,
            _ => continue,
        };
        if bus.as_deref().is_none_or(str::is_empty) {
            *bus = Some("sata".to_owned());
        }
    }
    let attach = devices.autoattach_pod_interface != Some(false);
    if spec.networks.is_empty() && devices.interfaces.is_empty() && attach {
        devices.interfaces.push(Interface {
            name: DEFAULT.to_owned(),
            masquerade: Some(Empty {}),
            ..Interface::default()
        });
        spec.networks.push(Network {
            name: DEFAULT.to_owned(),
            pod: Some(PodNetwork {}),
            ..Network::default()
        });
    }
    let machine = spec.domain.machine.get_or_insert_with(Machine::default);
    if machine.kind.as_deref().is_none_or(str::is_empty) {
        machine.kind = Some("q35".to_owned());
    }
    spec.architecture.get_or_insert_with(|| "amd64".to_owned());
    spec.termination_grace_period_seconds.get_or_insert(30);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_stays_and_filling_twice_changes_nothing() {
        let spec = json!({
            "domain": {"devices": {"disks": [{"name": "a", "disk": {"bus": "virtio"}}]}},
            "volumes": [{"name": "b", "emptyDisk": {"capacity": "1Gi"}}],
        });
        let mut spec: InstanceSpec = serde_json::from_value(spec).unwrap();
        fill(&mut spec);
        let disk = |index: usize| spec.domain.devices.disks[index].disk.clone().unwrap().bus;
        assert_eq!(disk(0).as_deref(), Some("virtio"));
        assert_eq!(disk(1).as_deref(), Some("sata"));
        assert!(spec.domain.devices.interfaces[0].masquerade.is_some());
        assert!(spec.networks[0].pod.is_some());
        let mut again = spec.clone();
        fill(&mut again);
        assert_eq!(again, spec);
    }
}
