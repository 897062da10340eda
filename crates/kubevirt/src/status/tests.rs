#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]
use serde_json::{Value, json};

use super::*;

fn instance() -> VirtualMachineInstance {
    let value = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {"name": "vm", "namespace": "n", "uid": "u"},
        "spec": {
            "domain": {"memory": {"guest": "64Mi"}, "devices": {"interfaces": [{"name": "d", "masquerade": {}}]}},
            "networks": [{"name": "d", "pod": {}}],
            "volumes": [{"name": "root", "containerDisk": {"image": "i"}}],
        },
    });
    serde_json::from_value(value).unwrap()
}

fn pod(status: Value) -> Pod {
    let pod = json!({
        "metadata": {"name": "p", "uid": "pu"},
        "spec": {"nodeName": "node", "containers": [{"name": "compute", "image": "i"}]},
        "status": status,
    });
    serde_json::from_value(pod).unwrap()
}

/// The phases that an instance goes through while its pod is so.
fn phases(pods: &[Option<Value>]) -> (Vec<Phase>, VirtualMachineInstance) {
    let mut instance = instance();
    let mut seen = Vec::new();
    for status in pods {
        let pod = status.clone().map(pod);
        let status = of_instance(&instance, pod.as_ref(), &now());
        seen.push(status.phase.unwrap());
        instance.status = Some(status);
    }
    (seen, instance)
}

fn now() -> Time {
    serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap()
}

fn container(state: Value) -> Option<Value> {
    Some(json!({
        "phase": "Running",
        "podIPs": [{"ip": "10.0.0.7"}, {"ip": "fd00::7"}],
        "containerStatuses": [{
            "name": "compute", "image": "i", "imageID": "", "ready": true, "restartCount": 0, "state": state,
        }],
        "conditions": [{"type": "Ready", "status": "True"}],
    }))
}

#[test]
fn an_instance_runs_and_ends_as_its_container_does() {
    let running = container(json!({"running": {}}));
    let ended = |code: i32| container(json!({"terminated": {"exitCode": code, "reason": "Error"}}));
    let all = [
        None,
        Some(json!({"phase": "Pending"})),
        running.clone(),
        ended(0),
        None,
    ];
    let (seen, instance) = phases(&all);
    use Phase::{Failed, Pending, Running, Scheduling, Succeeded};
    assert_eq!(seen, [Pending, Scheduling, Running, Succeeded, Succeeded]);
    let times = instance.status.unwrap().phase_transition_timestamps;
    let times: Vec<_> = times.into_iter().map(|time| time.phase).collect();
    assert_eq!(
        times,
        [Pending, Scheduling, Phase::Scheduled, Running, Succeeded]
    );
    assert_eq!(phases(&[running.clone(), ended(137)]).0, [Running, Failed]);
    assert_eq!(phases(&[running, None]).0, [Running, Failed]);
    assert_eq!(phases(&[Some(json!({"phase": "Failed"}))]).0, [Failed]);
}

#[test]
fn a_running_one_tells_its_addresses_and_is_ready() {
    let (_, instance) = phases(&[container(json!({"running": {}}))]);
    let status = instance.status.unwrap();
    assert_eq!(status.interfaces[0].ip_address.as_deref(), Some("10.0.0.7"));
    assert_eq!(status.interfaces[0].ip_addresses.len(), 2);
    assert!(crate::conditions::holds(&status.conditions, READY));
    assert!(!crate::conditions::holds(
        &status.conditions,
        LIVE_MIGRATABLE
    ));
    assert_eq!(status.node_name.as_deref(), Some("node"));
    assert_eq!(status.volume_status[0].target, "sda");
}

#[test]
fn why_it_does_not_start_is_told_until_it_does() {
    let waiting =
        container(json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}}));
    let (_, instance) = phases(std::slice::from_ref(&waiting));
    let conditions = instance.status.unwrap().conditions;
    let told = conditions
        .iter()
        .find(|condition| condition.kind == SYNCHRONIZED)
        .unwrap();
    assert_eq!(told.reason.as_deref(), Some("ErrImagePull"));
    let (_, instance) = phases(&[waiting, container(json!({"running": {}}))]);
    let conditions = instance.status.unwrap().conditions;
    assert!(
        conditions
            .iter()
            .all(|condition| condition.kind != SYNCHRONIZED)
    );
}

#[test]
fn disks_are_named_as_a_linux_guest_does() {
    let spec = json!({
        "domain": {"devices": {"disks": [
            {"name": "seed", "disk": {"bus": "virtio"}},
            {"name": "one", "disk": {"bus": "virtio"}},
            {"name": "disc", "cdrom": {"bus": "sata"}},
            {"name": "two", "disk": {"bus": "virtio"}},
        ]}},
        "volumes": [
            {"name": "seed", "cloudInitNoCloud": {"userData": "x"}},
            {"name": "one", "emptyDisk": {"capacity": "1Gi"}},
            {"name": "two", "containerDisk": {"image": "i"}},
            {"name": "disc", "persistentVolumeClaim": {"claimName": "c"}},
            {"name": "rest", "persistentVolumeClaim": {"claimName": "r"}},
        ],
    });
    let spec: InstanceSpec = serde_json::from_value(spec).unwrap();
    let all = volumes(&spec);
    let targets: Vec<_> = all
        .iter()
        .map(|volume| (&*volume.name, &*volume.target))
        .collect();
    let expected = [
        ("disc", "sr0"),
        ("one", "vda"),
        ("rest", "sda"),
        ("seed", "vdc"),
        ("two", "vdb"),
    ];
    assert_eq!(targets, expected);
}
