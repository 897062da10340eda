//! Pods that are machines, under a real kubelet.

mod faults;
mod objects;
mod refused;
mod volumes;
mod workloads;

use anyhow::{Result, ensure};
use edgevmm_e2e::in_cluster;

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  containers:
  - {name: web, image: "local.test/busybox:1", imagePullPolicy: Never,
     command: [/bin/busybox, httpd, -f, -p, "80"]}
  terminationGracePeriodSeconds: 1
---
apiVersion: v1
kind: Pod
metadata: {name: vm}
spec:
  runtimeClassName: edgevmm
  terminationGracePeriodSeconds: 3
  containers:
  - {name: vm, image: "local.test/mini:1", imagePullPolicy: Never, command: [boot],
     resources: {limits: {memory: 256Mi, cpu: "1"}}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: once}
data: {run: "echo ONCE-IS-DONE; poweroff -f"}
---
apiVersion: v1
kind: Pod
metadata:
  name: once
  annotations:
    edgevmm.io/kernel: /boot/vmlinux
    edgevmm.io/initrd: /boot/initrd
    edgevmm.io/cmdline: console=ttyS0 quiet
spec:
  runtimeClassName: edgevmm
  restartPolicy: Never
  containers:
  - {name: vm, image: "local.test/guest:1", imagePullPolicy: Never, command: [boot],
     resources: {limits: {memory: 192Mi, cpu: "1"}},
     volumeMounts: [{name: config, mountPath: /config}]}
  volumes: [{name: config, configMap: {name: once}}]
"#;

#[test]
fn a_pod_is_a_machine() -> Result<()> {
    in_cluster(|cluster| {
        cluster.apply(PODS)?;
        cluster.until_log("once", "ONCE-IS-DONE")?;
        cluster.until_phase("once", "Succeeded")?;
        cluster.delete("pod once")?;
        cluster.until_phase("web", "Running")?;
        cluster.until_phase("vm", "Running")?;
        let address = cluster.address("vm")?;
        cluster.until_log("vm", &format!("MINI-READY.*ip={address}"))?;
        cluster.ok(&format!("exec web -- ping -c 3 -w 60 {address}"))?;
        let machine = cluster.ok("exec vm -- edgevmm-ctl inspect --json")?;
        ensure!(machine.contains("\"running\""));
        cluster.delete("pod vm web")?;
        cluster.expect_clean()
    })
}
