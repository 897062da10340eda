#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]
use serde_json::{Value, json};

use super::*;

fn made(spec: Value, claims: &Claims) -> Result<Pod, PodError> {
    let instance = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "name": "my.vm", "namespace": "n", "uid": "4ff3",
            "labels": {"app": "shop"},
            "annotations": {"note": "kept", "edgevmm.io/kernel": "/etc/shadow"},
        },
        "spec": spec,
    });
    let spec = crate::checks::instance(&instance["spec"]);
    spec.map_err(|problems| crate::checks::summary(&problems))
        .unwrap();
    of_instance(
        &serde_json::from_value(instance).unwrap(),
        claims,
        "default-image",
    )
}

fn annotation(pod: &Pod, name: &str) -> String {
    let key = format!("edgevmm.io/{name}");
    pod.annotations().get(&key).cloned().unwrap_or_default()
}

#[test]
fn a_container_disk_with_cloud_init_and_an_empty_disk() {
    let disk = |name: &str| json!({"name": name, "disk": {"bus": "virtio"}});
    let pod = made(
        json!({
            "domain": {
                "cpu": {"cores": 2},
                "memory": {"guest": "128Mi"},
                "resources": {"limits": {"memory": "256Mi"}},
                "devices": {"disks": [disk("root"), disk("seed"), disk("scratch")]},
            },
            "volumes": [
                {"name": "root", "containerDisk": {"image": "registry.test/d:1", "path": "/disk/a.img"}},
                {"name": "seed", "cloudInitNoCloud": {"userDataBase64": "I2Nsb3Vk\nLWNvbmZpZw=="}},
                {"name": "scratch", "emptyDisk": {"capacity": "2Gi"}},
            ],
        }),
        &Claims::new(),
    )
    .unwrap();
    assert_eq!(annotation(&pod, "disk"), "a.img");
    assert_eq!(annotation(&pod, "memory"), "131072K");
    assert_eq!(annotation(&pod, "cpus"), "2,sockets=1,cores=2,threads=1");
    assert_eq!(annotation(&pod, "user-data"), "#cloud-config");
    assert_eq!(annotation(&pod, "create-disk"), "scratch=2048M");
    assert_eq!(annotation(&pod, "network"), "masquerade");
    assert_eq!(annotation(&pod, "uuid"), "4ff3");
    assert_eq!(
        annotation(&pod, "disks"),
        "containerDisk,bus=virtio\nscratch,bus=virtio"
    );
    assert_eq!(
        annotation(&pod, "kernel"),
        "",
        "only the instance's fields say what boots"
    );
    assert_eq!(pod.labels()["app"], "shop");
    assert_eq!(pod.labels()[CREATED_BY], "4ff3");
    assert_eq!(pod.annotations()["note"], "kept");
    let spec = pod.spec.unwrap();
    assert_eq!(spec.hostname.as_deref(), Some("my"));
    let container = &spec.containers[0];
    assert_eq!(container.image.as_deref(), Some("registry.test/d:1"));
    let resources = container.resources.clone().unwrap();
    assert_eq!(resources.requests.unwrap()["cpu"].0, "200m");
    let limit = crate::quantity::units(&resources.limits.unwrap()["memory"]).unwrap();
    assert!(limit > 280 << 20, "{limit}");
}

#[test]
fn claims_are_disks_of_their_size_or_devices() {
    let spec = json!({
        "domain": {"memory": {"guest": "1Gi"}, "devices": {}},
        "volumes": [
            {"name": "a", "persistentVolumeClaim": {"claimName": "files"}},
            {"name": "b", "dataVolume": {"name": "device"}},
        ],
    });
    let claim = |block| Claim {
        block,
        size: 1000 << 20,
    };
    let claims = Claims::from([("files".to_owned(), claim(false))]);
    let error = made(spec.clone(), &claims).unwrap_err();
    assert_eq!(error, PodError::NoClaim("device".to_owned()));
    let mut claims = claims;
    claims.insert("device".to_owned(), claim(true));
    let pod = made(spec, &claims).unwrap();
    assert_eq!(annotation(&pod, "create-disk"), "a=945M");
    assert_eq!(annotation(&pod, "disks"), "a,bus=sata\nb,bus=sata");
    let container = pod.spec.unwrap().containers.remove(0);
    assert_eq!(container.image.as_deref(), Some("default-image"));
    assert_eq!(container.volume_mounts.unwrap()[0].mount_path, "/a");
    assert_eq!(container.volume_devices.unwrap()[0].device_path, "/dev/b");
}

#[test]
fn a_kernel_boots_from_its_own_image() {
    let pod = made(
        json!({
            "domain": {
                "devices": {"autoattachPodInterface": false},
                "memory": {"guest": "1Gi"},
                "firmware": {"kernelBoot": {
                    "container": {"image": "k:1", "kernelPath": "/boot/k", "initrdPath": "/boot/i"},
                    "kernelArgs": "console=ttyS0",
                }},
            },
        }),
        &Claims::new(),
    )
    .unwrap();
    assert_eq!(annotation(&pod, "kernel"), "/boot/k");
    assert_eq!(annotation(&pod, "cmdline"), "console=ttyS0");
    assert_eq!(annotation(&pod, "network"), "none");
    assert_eq!(
        pod.spec.unwrap().containers[0].image.as_deref(),
        Some("k:1")
    );
}

#[test]
fn disks_come_as_they_are_listed_and_each_is_as_is_said_of_it() {
    let spec = json!({
        "terminationGracePeriodSeconds": 0,
        "domain": {
            "memory": {"guest": "1Gi"},
            "devices": {
                "watchdog": {"name": "dog", "i6300esb": {"action": "poweroff"}},
                "disks": [
                    {"name": "a", "serial": "A-1", "errorPolicy": "report", "io": "threads",
                     "disk": {"bus": "virtio", "readonly": true}},
                    {"name": "seed", "disk": {"bus": "virtio"}},
                    {"name": "b", "cdrom": {}, "bootOrder": 2},
                    {"name": "c", "bootOrder": 1, "cache": "none", "disk": {"bus": "sata"}},
                    {"name": "files", "cache": "none", "disk": {"bus": "virtio"}},
                ],
            },
        },
        "volumes": [
            {"name": "more", "secret": {"secretName": "s"}},
            {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config"}},
            {"name": "b", "persistentVolumeClaim": {"claimName": "b"}},
            {"name": "files", "configMap": {"name": "m"}},
            {"name": "d", "persistentVolumeClaim": {"claimName": "d", "readOnly": true}},
            {"name": "a", "emptyDisk": {"capacity": "1Gi"}},
            {"name": "c", "containerDisk": {"image": "i"}},
        ],
    });
    let claim = Claim {
        block: false,
        size: 1000 << 20,
    };
    let claims = Claims::from(["b", "d"].map(|name| (name.to_owned(), claim)));
    let pod = made(spec, &claims).unwrap();
    assert_eq!(
        annotation(&pod, "disks").lines().collect::<Vec<_>>(),
        [
            "a,bus=virtio,ro,serial=A-1,error_policy=report,aio=threads",
            "b,kind=cdrom,bootindex=2",
            "containerDisk,bus=sata,bootindex=1,direct",
            "files,bus=virtio",
            "more,kind=cdrom",
            "d,bus=sata",
        ]
    );
    assert_eq!(annotation(&pod, "watchdog"), "end");
    assert_eq!(
        annotation(&pod, "create-disk"),
        "a=1024M",
        "a claim that is only read gets none"
    );
    assert_eq!(
        pod.spec.unwrap().termination_grace_period_seconds,
        Some(1),
        "or the pod is forgotten at once"
    );
}
