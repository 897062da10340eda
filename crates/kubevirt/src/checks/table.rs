//! What is refused, and by the name of which field: each row changes one thing of a good instance.

#![allow(clippy::unwrap_used)]
use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{instance, machine};

/// What KubeVirt does with the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Theirs {
    /// It refuses it, too: by its schema or its webhook.
    Refused,
    /// It can do it; we can't.
    Taken,
    /// Not told by what it documents, or it depends on how it is set up.
    Untold,
}
use Theirs::{Refused, Taken, Untold};

/// What is changed (objects are merged into the good one), the field that is named below `spec`, and
/// what KubeVirt does.
type Row = (&'static str, &'static str, Theirs);

const PROCESSORS: &[Row] = &[
    (
        r#"{"domain":{"cpu":{"cores":-1}}}"#,
        "domain.cpu.cores",
        Refused,
    ),
    (
        r#"{"domain":{"cpu":{"cores":1.5}}}"#,
        "domain.cpu.cores",
        Refused,
    ),
    (
        r#"{"domain":{"cpu":{"cores":"2"}}}"#,
        "domain.cpu.cores",
        Refused,
    ),
    (
        r#"{"domain":{"cpu":{"cores":5000000000}}}"#,
        "domain.cpu.cores",
        Refused,
    ),
    (
        r#"{"domain":{"cpu":{"threads":true}}}"#,
        "domain.cpu.threads",
        Refused,
    ),
    (r#"{"domain":{"cpu":"two"}}"#, "domain.cpu", Refused),
    (r#"{"domain":{"cpu":{"cores":255}}}"#, "domain.cpu", Untold),
    (r#"{"domain":{"cpu":{"sockets":0}}}"#, "domain.cpu", Untold),
    (
        r#"{"domain":{"cpu":{"model":"Nehalem"}}}"#,
        "domain.cpu.model",
        Taken,
    ),
    (
        r#"{"domain":{"cpu":{"features":[{"name":"vmx"}]}}}"#,
        "domain.cpu.features",
        Taken,
    ),
    (
        r#"{"domain":{"cpu":{"dedicatedCpuPlacement":true}}}"#,
        "domain.cpu.dedicatedCpuPlacement",
        Refused,
    ),
    (
        r#"{"domain":{"cpu":{"isolateEmulatorThread":true}}}"#,
        "domain.cpu.isolateEmulatorThread",
        Untold,
    ),
    (
        r#"{"domain":{"cpu":{"numa":{"guestMappingPassthrough":{}}}}}"#,
        "domain.cpu.numa",
        Untold,
    ),
    (
        r#"{"domain":{"cpu":{"realtime":{}}}}"#,
        "domain.cpu.realtime",
        Untold,
    ),
    (
        r#"{"domain":{"ioThreadsPolicy":"supplementalPool"}}"#,
        "domain.ioThreadsPolicy",
        Taken,
    ),
];

const MEMORY: &[Row] = &[
    (
        r#"{"domain":{"memory":{"guest":null}}}"#,
        "domain.memory.guest",
        Refused,
    ),
    (
        r#"{"domain":{"memory":{"guest":"lots"}}}"#,
        "domain.memory.guest",
        Refused,
    ),
    (
        r#"{"domain":{"memory":{"guest":"-1Gi"}}}"#,
        "domain.memory.guest",
        Refused,
    ),
    (
        r#"{"domain":{"memory":{"guest":[]}}}"#,
        "domain.memory.guest",
        Refused,
    ),
    (
        r#"{"domain":{"memory":{"guest":"1Mi"}}}"#,
        "domain.memory.guest",
        Untold,
    ),
    (
        r#"{"domain":{"memory":{"hugepages":{"pageSize":"2Mi"}}}}"#,
        "domain.memory.hugepages",
        Taken,
    ),
    (
        r#"{"domain":{"resources":{"limits":{"memory":"64Mi"}}}}"#,
        "domain.resources.limits.memory",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"limits":{"memory":"x"}}}}"#,
        "domain.resources.limits.memory",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":{"memory":"x"}}}}"#,
        "domain.resources.requests.memory",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":{"memory":"100k"}}}}"#,
        "domain.resources.requests.memory",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":{"memory":"2Gi"},"limits":{"memory":"1Gi"}}}}"#,
        "domain.resources.requests.memory",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":{"cpu":"2"},"limits":{"cpu":"1"}}}}"#,
        "domain.resources.requests.cpu",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":{"cpu":"-1"}}}}"#,
        "domain.resources.requests.cpu",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"limits":{"cpu":"many"}}}}"#,
        "domain.resources.limits.cpu",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"requests":5}}}"#,
        "domain.resources.requests",
        Refused,
    ),
    (
        r#"{"domain":{"resources":{"overcommitGuestOverhead":true}}}"#,
        "domain.resources.overcommitGuestOverhead",
        Taken,
    ),
    (
        r#"{"domain":{"resources":{"claims":[]}}}"#,
        "domain.resources.claims",
        Untold,
    ),
];

const PLATFORM: &[Row] = &[
    (
        r#"{"domain":{"machine":{"type":"pc-i440fx"}}}"#,
        "domain.machine.type",
        Untold,
    ),
    (
        r#"{"domain":{"machine":{"type":"virt"}}}"#,
        "domain.machine.type",
        Untold,
    ),
    (
        r#"{"domain":{"firmware":{"bootloader":{"efi":{}}}}}"#,
        "domain.firmware.bootloader.efi.secureBoot",
        Refused,
    ),
    (
        r#"{"domain":{"firmware":{"bootloader":{"efi":{"secureBoot":false,"persistent":true}}}}}"#,
        "domain.firmware.bootloader.efi.persistent",
        Taken,
    ),
    (
        r#"{"domain":{"firmware":{"bootloader":{"bios":{},"efi":{"secureBoot":false}}}}}"#,
        "domain.firmware.bootloader",
        Untold,
    ),
    (
        r#"{"domain":{"firmware":{"uuid":"x"}}}"#,
        "domain.firmware.uuid",
        Untold,
    ),
    (
        r#"{"domain":{"firmware":{"serial":"a b"}}}"#,
        "domain.firmware.serial",
        Untold,
    ),
    (
        r#"{"domain":{"firmware":{"acpi":{}}}}"#,
        "domain.firmware.acpi",
        Taken,
    ),
    (
        r#"{"domain":{"firmware":{"kernelBoot":{}}}}"#,
        "domain.firmware.kernelBoot.container",
        Untold,
    ),
    (
        r#"{"domain":{"firmware":{"kernelBoot":{"container":{}}}}}"#,
        "domain.firmware.kernelBoot.container",
        Refused,
    ),
    (
        r#"{"domain":{"firmware":{"kernelBoot":{"container":{"image":"i","kernelPath":"a"}}}}}"#,
        "domain.firmware.kernelBoot.container.kernelPath",
        Untold,
    ),
    (
        r#"{"domain":{"clock":{"timer":{"hpet":{}}}}}"#,
        "domain.clock.timer.hpet",
        Taken,
    ),
    (
        r#"{"domain":{"clock":{"timer":{"pit":{"present":false}}}}}"#,
        "domain.clock.timer.pit",
        Taken,
    ),
    (
        r#"{"domain":{"clock":{"timezone":"Europe/Berlin"}}}"#,
        "domain.clock.timezone",
        Taken,
    ),
    (
        r#"{"domain":{"clock":{"utc":{"offsetSeconds":60}}}}"#,
        "domain.clock.utc.offsetSeconds",
        Taken,
    ),
    (
        r#"{"domain":{"features":{"hyperv":{}}}}"#,
        "domain.features.hyperv",
        Taken,
    ),
    (
        r#"{"domain":{"features":{"smm":{}}}}"#,
        "domain.features.smm",
        Taken,
    ),
    (
        r#"{"domain":{"features":{"kvm":{"hidden":true}}}}"#,
        "domain.features.kvm",
        Taken,
    ),
    (
        r#"{"domain":{"features":{"acpi":{"enabled":false}}}}"#,
        "domain.features.acpi.enabled",
        Taken,
    ),
    (
        r#"{"domain":{"launchSecurity":{"sev":{}}}}"#,
        "domain.launchSecurity",
        Taken,
    ),
    (
        r#"{"domain":{"chassis":{"serial":"x"}}}"#,
        "domain.chassis",
        Taken,
    ),
    (
        r#"{"domain":{"rebootPolicy":"Terminate"}}"#,
        "domain.rebootPolicy",
        Taken,
    ),
];

const DEVICES: &[Row] = &[
    (
        r#"{"domain":{"devices":{"gpus":[{}]}}}"#,
        "domain.devices.gpus",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"hostDevices":[{}]}}}"#,
        "domain.devices.hostDevices",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"tpm":{}}}}"#,
        "domain.devices.tpm",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"sound":{}}}}"#,
        "domain.devices.sound",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"inputs":[{}]}}}"#,
        "domain.devices.inputs",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"filesystems":[{}]}}}"#,
        "domain.devices.filesystems",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"clientPassthrough":{}}}}"#,
        "domain.devices.clientPassthrough",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"autoattachVSOCK":true}}}"#,
        "domain.devices.autoattachVSOCK",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"downwardMetrics":{}}}}"#,
        "domain.devices.downwardMetrics",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"video":{}}}}"#,
        "domain.devices.video",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"autoattachMemBalloon":false}}}"#,
        "domain.devices.autoattachMemBalloon",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"autoattachSerialConsole":false}}}"#,
        "domain.devices.autoattachSerialConsole",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"watchdog":{"name":"w","i6300esb":{"action":"explode"}}}}}"#,
        "domain.devices.watchdog.i6300esb.action",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":{}}}}"#,
        "domain.devices.disks",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"disk":{}}]}}}"#,
        "domain.devices.disks[0]",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"gone","disk":{}}]}}}"#,
        "domain.devices.disks[0].name",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root"},{"name":"root"}]}}}"#,
        "domain.devices.disks[1].name",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","disk":{"bus":"ide"}}]}}}"#,
        "domain.devices.disks[0].disk.bus",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","disk":{"bus":"usb"}}]}}}"#,
        "domain.devices.disks[0].disk.bus",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","disk":{"bus":"sata","readonly":true}}]}}}"#,
        "domain.devices.disks[0].disk.readonly",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","disk":{},"cdrom":{}}]}}}"#,
        "domain.devices.disks[0].cdrom",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","cdrom":{"bus":"virtio"}}]}}}"#,
        "domain.devices.disks[0].cdrom.bus",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","cdrom":{"tray":"open"}}]}}}"#,
        "domain.devices.disks[0].cdrom.tray",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","lun":{}}]}}}"#,
        "domain.devices.disks[0].lun",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","bootOrder":0}]}}}"#,
        "domain.devices.disks",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","bootOrder":"first"}]}}}"#,
        "domain.devices.disks[0].bootOrder",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","serial":"a b"}]}}}"#,
        "domain.devices.disks[0].serial",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","cache":"unsafe"}]}}}"#,
        "domain.devices.disks[0].cache",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","io":"magic"}]}}}"#,
        "domain.devices.disks[0].io",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","errorPolicy":"panic"}]}}}"#,
        "domain.devices.disks[0].errorPolicy",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","shareable":true}]}}}"#,
        "domain.devices.disks[0].shareable",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","tag":"t"}]}}}"#,
        "domain.devices.disks[0].tag",
        Taken,
    ),
    (
        r#"{"domain":{"devices":{"disks":[{"name":"root","blockSize":{}}]}}}"#,
        "domain.devices.disks[0].blockSize",
        Taken,
    ),
];

const VOLUMES: &[Row] = &[
    (r#"{"volumes":[{"name":"root"}]}"#, "volumes[0]", Refused),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{"image":"i"},"emptyDisk":{"capacity":"1Gi"}}]}"#,
        "volumes[0]",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"Root","containerDisk":{"image":"i"}}]}"#,
        "volumes[0].name",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{"image":"i"}},{"name":"root","secret":{}}]}"#,
        "volumes[1].name",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{}}]}"#,
        "volumes[0].containerDisk",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{"image":"i","path":"/disk/../etc/passwd"}}]}"#,
        "volumes[0].containerDisk.path",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{"image":"i","path":"/etc/passwd"}}]}"#,
        "volumes[0].containerDisk.path",
        Taken,
    ),
    (
        r#"{"volumes":[{"name":"root","containerDisk":{"image":"i","path":"disk.img"}}]}"#,
        "volumes[0].containerDisk.path",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","hostDisk":{"path":"/etc/shadow","type":"Disk"}}]}"#,
        "volumes[0].hostDisk",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","persistentVolumeClaim":{}}]}"#,
        "volumes[0].persistentVolumeClaim",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","persistentVolumeClaim":{"claimName":"other/claim"}}]}"#,
        "volumes[0].persistentVolumeClaim.claimName",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","persistentVolumeClaim":{"claimName":"../../other/persistentvolumeclaims/a"}}]}"#,
        "volumes[0].persistentVolumeClaim.claimName",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","persistentVolumeClaim":{"claimName":"a?watch=1"}}]}"#,
        "volumes[0].persistentVolumeClaim.claimName",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","persistentVolumeClaim":{"claimName":"c","hotpluggable":true}}]}"#,
        "volumes[0].persistentVolumeClaim.hotpluggable",
        Taken,
    ),
    (
        r#"{"volumes":[{"name":"root","dataVolume":{"name":".."}}]}"#,
        "volumes[0].dataVolume.name",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","emptyDisk":{"capacity":"x"}}]}"#,
        "volumes[0].emptyDisk.capacity",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","emptyDisk":{"capacity":"1k"}}]}"#,
        "volumes[0].emptyDisk.capacity",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","configMap":{"name":"../secrets"}}]}"#,
        "volumes[0].configMap.name",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","configMap":{"name":"c","volumeLabel":"x"}}]}"#,
        "volumes[0].configMap.volumeLabel",
        Taken,
    ),
    (
        r#"{"volumes":[{"name":"root","secret":{"secretName":"a b"}}]}"#,
        "volumes[0].secret.secretName",
        Untold,
    ),
    (
        r#"{"volumes":[{"name":"root","serviceAccount":{"serviceAccountName":"a"}},{"name":"b","serviceAccount":{"serviceAccountName":"b"}}]}"#,
        "volumes",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","memoryDump":{"claimName":"c"}}]}"#,
        "volumes[0].memoryDump",
        Taken,
    ),
    (
        r#"{"volumes":[{"name":"root","ephemeral":5}]}"#,
        "volumes[0].ephemeral",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","cloudInitNoCloud":{}}]}"#,
        "volumes[0].cloudInitNoCloud",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","cloudInitNoCloud":{"userData":"a","userDataBase64":"YQ=="}}]}"#,
        "volumes[0].cloudInitNoCloud",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","cloudInitNoCloud":{"userDataBase64":"%"}}]}"#,
        "volumes[0].cloudInitNoCloud.userDataBase64",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","cloudInitNoCloud":{"userData":"a","networkData":"b","networkDataBase64":"YQ=="}}]}"#,
        "volumes[0].cloudInitNoCloud",
        Refused,
    ),
    (
        r#"{"volumes":[{"name":"root","cloudInitNoCloud":{"secretRef":"s"}}]}"#,
        "volumes[0].cloudInitNoCloud.secretRef",
        Refused,
    ),
];

const NETWORKS: &[Row] = &[
    (
        r#"{"networks":[{"name":"n","pod":{}}]}"#,
        "networks[0].name",
        Refused,
    ),
    (
        r#"{"domain":{"devices":{"interfaces":[{"name":"n","masquerade":{}}]}}}"#,
        "domain.devices.interfaces[0].name",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n"}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks[0]",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{},"multus":{"networkName":"m"}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks[0]",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}},{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","multus":{"networkName":"a,kube-system/b"}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks[0].multus.networkName",
        Untold,
    ),
    (
        r#"{"networks":[{"name":"n","multus":{"networkName":"m","default":true}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks[0].multus.default",
        Taken,
    ),
    (
        r#"{"networks":[{"name":"n","multus":{"networkName":"m"}}],"domain":{"devices":{"interfaces":[{"name":"n","masquerade":{}}]}}}"#,
        "domain.devices.interfaces[0].masquerade",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{"vmNetworkCIDR":"10.0.0.0/8"}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{}}]}}}"#,
        "networks[0].pod.vmNetworkCIDR",
        Taken,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"masquerade":{}}]}}}"#,
        "domain.devices.interfaces[0]",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"model":"x"}]}}}"#,
        "domain.devices.interfaces[0].model",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","sriov":{}}]}}}"#,
        "domain.devices.interfaces[0].sriov",
        Taken,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"dhcpOptions":{}}]}}}"#,
        "domain.devices.interfaces[0].dhcpOptions",
        Taken,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"ports":[{"port":0}]}]}}}"#,
        "domain.devices.interfaces[0].ports[0].port",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"ports":[{"port":70000}]}]}}}"#,
        "domain.devices.interfaces[0].ports[0].port",
        Refused,
    ),
    (
        r#"{"networks":[{"name":"n","pod":{}}],"domain":{"devices":{"interfaces":[{"name":"n","bridge":{},"ports":[{"port":1,"protocol":"ICMP"}]}]}}}"#,
        "domain.devices.interfaces[0].ports[0].protocol",
        Refused,
    ),
];

const REST: &[Row] = &[
    (
        r#"{"terminationGracePeriodSeconds":-1}"#,
        "terminationGracePeriodSeconds",
        Refused,
    ),
    (
        r#"{"terminationGracePeriodSeconds":"soon"}"#,
        "terminationGracePeriodSeconds",
        Refused,
    ),
    (
        r#"{"evictionStrategy":"LiveMigrate"}"#,
        "evictionStrategy",
        Taken,
    ),
    (
        r#"{"evictionStrategy":"Never"}"#,
        "evictionStrategy",
        Refused,
    ),
    (r#"{"startStrategy":"Paused"}"#, "startStrategy", Taken),
    (r#"{"architecture":"arm64"}"#, "architecture", Taken),
    (r#"{"hostname":"A"}"#, "hostname", Refused),
    (r#"{"hostname":"a.b"}"#, "hostname", Refused),
    (r#"{"subdomain":"-a"}"#, "subdomain", Refused),
    (r#"{"readinessProbe":{}}"#, "readinessProbe", Refused),
    (
        r#"{"livenessProbe":{"guestAgentPing":{},"tcpSocket":{"port":22}}}"#,
        "livenessProbe",
        Refused,
    ),
    (
        r#"{"readinessProbe":{"tcpSocket":{"port":true}}}"#,
        "readinessProbe.tcpSocket.port",
        Refused,
    ),
    (r#"{"nodeSelector":5}"#, "nodeSelector", Refused),
    (r#"{"nodeSelector":{"a":1}}"#, "nodeSelector.a", Refused),
    (r#"{"tolerations":{}}"#, "tolerations", Refused),
    (r#"{"affinity":"near"}"#, "affinity", Refused),
    (r#"{"accessCredentials":[]}"#, "accessCredentials", Taken),
    (r#"{"resourceClaims":[]}"#, "resourceClaims", Taken),
    (r#"{"surprise":{"inside":1}}"#, "surprise", Untold),
];

fn good() -> Value {
    json!({
        "domain": {
            "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] },
            "memory": { "guest": "128Mi" },
        },
        "volumes": [{ "name": "root", "containerDisk": { "image": "registry.test/disk:1" } }],
    })
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    [
        PROCESSORS, MEMORY, PLATFORM, DEVICES, VOLUMES, NETWORKS, REST,
    ]
    .into_iter()
    .flatten()
}

#[test]
fn what_is_wrong_is_refused_by_its_name() {
    instance(&good()).unwrap();
    let mut wrong = Vec::new();
    for (change, field, theirs) in rows() {
        let mut spec = good();
        merge(&mut spec, serde_json::from_str(change).unwrap());
        let problems = instance(&spec).err().unwrap_or_default();
        let field = format!("spec.{field}");
        let named = problems.iter().find(|problem| problem.field == field);
        if named.is_none_or(|problem| problem.message.is_empty()) {
            wrong.push(format!("{change} ({theirs:?}): {field}, but {problems:?}"));
        }
        // A machine with such a template is refused by the same name.
        let template = json!({ "runStrategy": "Always", "template": { "spec": spec } });
        let problems = machine(&template).err().unwrap_or_default();
        let field = field.replacen("spec", "spec.template.spec", 1);
        if !problems.iter().any(|problem| problem.field == field) {
            wrong.push(format!("{change} in a template: {field}, but {problems:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_is_no_smaller_than_it_looks() {
    let changes: BTreeSet<_> = rows().map(|(change, ..)| change).collect();
    assert_eq!(changes.len(), rows().count(), "a row is there twice");
    assert!(changes.len() >= 100);
    let theirs = rows().filter(|(.., theirs)| *theirs == Refused).count();
    assert!(theirs >= 60, "{theirs} that KubeVirt refuses");
}
