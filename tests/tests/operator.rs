//! The operator under a real API server, with a node that only says that pods run.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{ApiServer, operator};
use std::process::Command;

const INSTANCES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";

const OBJECTS: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachineInstance
metadata: {name: instance, labels: {special: key}}
spec:
  terminationGracePeriodSeconds: 0
  domain:
    memory: {guest: 128Mi}
    resources: {requests: {memory: 64M, cpu: 100m}}
    devices:
      rng: {}
      disks:
      - {name: system, disk: {bus: virtio}, bootOrder: 1}
      - {name: seed, cdrom: {bus: sata}}
      interfaces: [{name: default, masquerade: {}, ports: [{name: http, port: 80}]}]
    surprise: {inside: [1, 2]}
  networks: [{name: default, pod: {}}]
  volumes:
  - {name: system, containerDisk: {image: 'local.test/mini:1'}}
  - {name: seed, cloudInitNoCloud: {userData: '#cloud-config'}}
---
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {name: machine}
spec:
  runStrategy: Always
  template:
    metadata:
      labels: {kubevirt.io/vm: machine}
      annotations: {note: kept}
    spec:
      domain:
        cpu: {cores: 2}
        memory: {guest: 1Gi}
        devices: {}
      volumes: [{name: system, persistentVolumeClaim: {claimName: system}}]
";

fn define(server: &ApiServer) -> Result<()> {
    let definitions = Command::new(operator()?).arg("crds").output()?;
    ensure!(definitions.status.success(), "{definitions:?}");
    server.apply(std::str::from_utf8(&definitions.stdout)?)?;
    server
        .kubectl(["wait", "--for=condition=established", "crd", "--all"])?
        .expect_code(0)?;
    Ok(())
}

/// Also a second time, as an upgrade would.
#[test]
fn definitions_are_accepted_and_keep_what_they_do_not_know() -> Result<()> {
    let Some(server) = ApiServer::start()? else {
        return Ok(());
    };
    define(&server)?;
    define(&server)?;
    server.apply(OBJECTS)?;
    server.apply(OBJECTS)?;
    let instance = server.get(&format!("{INSTANCES}/instance"))?;
    let instance = instance.context("No instance")?;
    let surprise = &instance["spec"]["domain"]["surprise"];
    ensure!(surprise["inside"][1] == 2, "{instance}");
    let all = server.kubectl(["get", "all"])?;
    let all = all.expect_code(0)?;
    for name in [
        "virtualmachineinstance.kubevirt.io/instance",
        "virtualmachine.kubevirt.io/machine",
    ] {
        ensure!(all.contains(name), "{all}");
    }
    // What is no virtual machine at all is refused, by the schema.
    let broken = OBJECTS.replace("disks:", "disks: 5\n      broken:");
    ensure!(server.apply(&broken).is_err());
    Ok(())
}
