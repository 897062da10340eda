//! Pods that are machines, under a real kubelet.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Cluster, Command, Containerd, Host, Image, image, in_lab};

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
kind: Pod
metadata:
  name: once
  annotations:
    edgevmm.io/kernel: /boot/vmlinuz
    edgevmm.io/initrd: /boot/initrd
    edgevmm.io/cmdline: console=ttyS0 quiet
spec:
  runtimeClassName: edgevmm
  restartPolicy: Never
  containers:
  - {name: vm, image: "local.test/mini:1", imagePullPolicy: Never, command: [boot],
     resources: {limits: {memory: 256Mi, cpu: "1"}}}
"#;

fn images(host: &Host, cluster: &Cluster<'_>) -> Result<()> {
    let mini = host.shared(&image(Image::Mini)?.mini_qcow2())?;
    let images = image(Image::Kernel)?;
    let (kernel, initrd) = (
        host.shared(&images.vmlinuz())?,
        host.shared(&images.initrd())?,
    );
    host.ok(&Command::script(format!(
        "install -D {mini} vm/disk/mini.qcow2
         install -D {kernel} vm/boot/vmlinuz; install -D {initrd} vm/boot/initrd"
    )))?;
    cluster.node.import(&host.path("vm"), "local.test/mini:1")?;
    let busybox = ["/bin/busybox"];
    cluster
        .node
        .import_program(&host.path("sandbox"), "local.test/busybox:1", &busybox)
}

#[test]
fn a_pod_is_a_machine() -> Result<()> {
    in_lab(6144, |host| {
        let Some(cluster) = Cluster::start(host, Containerd::New)? else {
            return Ok(());
        };
        images(host, &cluster)?;
        cluster.apply(PODS)?;
        cluster.expect_phase("once", "Succeeded")?;
        cluster.expect_log("once", "INIT-FIRST-LINE")?;
        cluster.expect_phase("web", "Running")?;
        cluster.expect_phase("vm", "Running")?;
        let path = "jsonpath={.status.podIP}";
        let address = host.ok(&cluster.kubectl(["get", "pod", "vm", "-o", path]))?;
        cluster.expect_log("vm", &format!("MINI-READY.*ip={address}"))?;
        let ping = ["/bin/busybox", "ping", "-c", "3", "-w", "60", &address];
        host.ok(&cluster.kubectl(["exec", "web", "--"]).args(ping))?;
        let control = ["exec", "vm", "--", "edgevmm-ctl"];
        let inspect = cluster.kubectl(control).args(["inspect", "--json"]);
        ensure!(host.ok(&inspect)?.contains("\"running\""));
        for pod in ["once", "vm", "web"] {
            cluster.delete(pod)?;
        }
        cluster.node.expect_clean()
    })
}
