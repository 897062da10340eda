#![allow(clippy::unwrap_used)]
use serde_json::json;

use super::*;

fn small() -> Value {
    json!({
        "domain": {
            "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}]},
            "memory": {"guest": "128Mi"},
            "resources": {},
        },
        "volumes": [{"name": "root", "containerDisk": {"image": "registry.test/disk:1"}}],
    })
}

/// Paths of the fields that are refused when `change` is put in at `path`.
fn refused(path: &str, change: Value) -> Vec<String> {
    let mut spec = small();
    let (parent, field) = path.rsplit_once('/').unwrap();
    let parent = spec.pointer_mut(parent).unwrap();
    parent
        .as_object_mut()
        .unwrap()
        .insert(field.to_owned(), change);
    let problems = instance(&spec).err().unwrap_or_default();
    problems.into_iter().map(|problem| problem.field).collect()
}

#[test]
fn a_small_instance_is_accepted() {
    instance(&small()).unwrap();
}

#[test]
fn each_field_that_means_nothing_here_is_named() {
    let cases = [
        (
            "/domain/devices/gpus",
            json!([{"name": "g"}]),
            "spec.domain.devices.gpus",
        ),
        (
            "/domain/launchSecurity",
            json!({"sev": {}}),
            "spec.domain.launchSecurity",
        ),
        (
            "/domain/cpu",
            json!({"dedicatedCpuPlacement": true}),
            "spec.domain.cpu.dedicatedCpuPlacement",
        ),
        (
            "/domain/memory",
            json!({"guest": "1Gi", "hugepages": {"pageSize": "2Mi"}}),
            "spec.domain.memory.hugepages",
        ),
        ("/resourceClaims", json!([]), "spec.resourceClaims"),
        (
            "/domain/features",
            json!({"hyperv": {}}),
            "spec.domain.features.hyperv",
        ),
    ];
    for (path, change, field) in cases {
        assert_eq!(refused(path, change), [field], "{path}");
    }
}

#[test]
fn values_that_can_not_be_had_are_named() {
    let efi = json!({"bootloader": {"efi": {}}});
    let disk = |disk: Value| json!({"disks": [disk]});
    let cases = [
        (
            "/domain/cpu",
            json!({"model": "Nehalem"}),
            "spec.domain.cpu.model",
        ),
        ("/domain/cpu", json!({"cores": 256}), "spec.domain.cpu"),
        (
            "/domain/cpu",
            json!({"cores": u32::MAX, "sockets": u32::MAX}),
            "spec.domain.cpu",
        ),
        (
            "/domain/memory",
            json!({"guest": "1Mi"}),
            "spec.domain.memory.guest",
        ),
        ("/domain/memory", json!({}), "spec.domain.memory.guest"),
        (
            "/domain/machine",
            json!({"type": "pc-i440fx"}),
            "spec.domain.machine.type",
        ),
        (
            "/domain/firmware",
            efi,
            "spec.domain.firmware.bootloader.efi.secureBoot",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "disk": {"bus": "scsi"}})),
            "spec.domain.devices.disks[0].disk.bus",
        ),
        (
            "/domain/cpu",
            json!({"cores": 5, "sockets": 50}),
            "spec.domain.cpu",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "serial": "123456789012345678901"})),
            "spec.domain.devices.disks[0].serial",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "cdrom": {}, "errorPolicy": "ignore"})),
            "spec.domain.devices.disks[0].errorPolicy",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "disk": {"readonly": true}})),
            "spec.domain.devices.disks[0].disk.readonly",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "cache": "writethrough"})),
            "spec.domain.devices.disks[0].cache",
        ),
        (
            "/domain/devices",
            json!({"watchdog": {"name": "w", "i6300esb": {"action": "dump"}}}),
            "spec.domain.devices.watchdog.i6300esb.action",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "gone", "disk": {}})),
            "spec.domain.devices.disks[0].name",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "serial": "a b"})),
            "spec.domain.devices.disks[0].serial",
        ),
        (
            "/domain/devices",
            disk(json!({"name": "root", "bootOrder": 0})),
            "spec.domain.devices.disks",
        ),
        (
            "/networks",
            json!([{"name": "n", "pod": {}}]),
            "spec.networks[0].name",
        ),
        (
            "/terminationGracePeriodSeconds",
            json!(-1),
            "spec.terminationGracePeriodSeconds",
        ),
        (
            "/evictionStrategy",
            json!("LiveMigrate"),
            "spec.evictionStrategy",
        ),
        ("/hostname", json!("A"), "spec.hostname"),
        ("/readinessProbe", json!({}), "spec.readinessProbe"),
        ("/architecture", json!("arm64"), "spec.architecture"),
        ("/domain/cpu", json!("two"), "spec.domain.cpu"),
    ];
    for (path, change, field) in cases {
        assert_eq!(refused(path, change), [field], "{path}");
    }
}

#[test]
fn volumes_that_can_not_be_had_are_named() {
    let cases = [
        (
            json!({"hostDisk": {"path": "/etc", "type": "Disk"}}),
            "spec.volumes[0].hostDisk",
        ),
        (json!({}), "spec.volumes[0]"),
        (
            json!({"emptyDisk": {"capacity": "x"}}),
            "spec.volumes[0].emptyDisk.capacity",
        ),
        (
            json!({"containerDisk": {"image": "i", "path": "/disk/../etc"}}),
            "spec.volumes[0].containerDisk.path",
        ),
        (
            json!({"cloudInitNoCloud": {"userData": "x".repeat(2049)}}),
            "spec.volumes[0].cloudInitNoCloud.userData",
        ),
        (
            json!({"cloudInitNoCloud": {"userDataBase64": "%"}}),
            "spec.volumes[0].cloudInitNoCloud.userDataBase64",
        ),
        (
            json!({"cloudInitNoCloud": {}}),
            "spec.volumes[0].cloudInitNoCloud",
        ),
        (
            json!({"persistentVolumeClaim": {"claimName": "c", "hotpluggable": true}}),
            "spec.volumes[0].persistentVolumeClaim.hotpluggable",
        ),
    ];
    for (mut volume, field) in cases {
        volume
            .as_object_mut()
            .unwrap()
            .insert("name".to_owned(), json!("root"));
        assert_eq!(refused("/volumes", json!([volume])), [field], "{volume}");
    }
}

#[test]
fn disks_are_told_apart() {
    let seed = json!({"name": "root", "cloudInitNoCloud": {"userData": "x"}});
    let mut spec = small();
    spec["volumes"] = json!([seed]);
    spec["domain"]["devices"]["disks"][0]["serial"] = json!("S");
    let problems = instance(&spec).unwrap_err();
    assert_eq!(problems[0].field, "spec.domain.devices.disks[0].serial");
    let mut spec = small();
    let empty = json!({"name": "data", "emptyDisk": {"capacity": "1Gi"}});
    spec["volumes"].as_array_mut().unwrap().push(empty);
    spec["domain"]["devices"]["disks"][0]["serial"] = json!("other");
    instance(&spec).unwrap();
    // As the other one is called without a serial number.
    spec["domain"]["devices"]["disks"][0]["serial"] = json!("data");
    let problems = summary(&instance(&spec).unwrap_err());
    assert!(problems.contains("serial number `data`"), "{problems}");
    let drive = json!({"name": "data", "cdrom": {}});
    spec["domain"]["devices"]["disks"] = json!([drive]);
    let problems = instance(&spec).unwrap_err();
    assert_eq!(problems[0].field, "spec.domain.devices.disks[0].cdrom");
}

#[test]
fn a_machines_template_is_checked_too() {
    let mut spec = small();
    spec["domain"]["devices"]["sound"] = json!({"name": "s"});
    let spec = json!({"running": true, "runStrategy": "Always", "template": {"spec": spec}});
    let problems = machine(&spec).unwrap_err();
    let fields: Vec<_> = problems
        .iter()
        .map(|problem| problem.field.as_str())
        .collect();
    assert_eq!(
        fields,
        ["spec.template.spec.domain.devices.sound", "spec.running"]
    );
}
