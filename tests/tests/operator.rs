//! The operator under a real API server, with a node that only says that pods run.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{ApiServer, operator};
use serde_json::{Value, json};
use std::net::TcpListener;
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

const MACHINES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";

fn machine(name: &str, strategy: &str, fate: &str) -> String {
    format!(
        "---\napiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {{name: {name}}}\n\
         spec:\n  runStrategy: {strategy}\n  template:\n    metadata:\n      \
         annotations: {{tests.edgevmm.io/fate: {fate}}}\n    spec:\n      \
         domain: {{memory: {{guest: 64Mi}}, devices: {{}}}}\n      \
         volumes: [{{name: a, containerDisk: {{image: 'local.test/mini:1'}}}}]\n"
    )
}

fn expect(server: &ApiServer, name: &str, word: &str) -> Result<()> {
    let path = format!("{MACHINES}/{name}");
    let is_so = |machine: &Value| machine["status"]["printableStatus"] == word;
    server.wait_for(&path, word, is_so).map(drop)
}

fn text<'a>(object: &'a Value, path: &str) -> &'a str {
    object
        .pointer(path)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The UID of a machine's instance, once that runs and is not `old`.
fn runs(server: &ApiServer, name: &str, old: &str) -> Result<String> {
    let instance = server.wait_for(&format!("{INSTANCES}/{name}"), "another that runs", |it| {
        it["status"]["phase"] == "Running" && text(it, "/metadata/uid") != old
    })?;
    expect(server, name, "Running")?;
    Ok(text(&instance, "/metadata/uid").to_owned())
}

fn end(server: &ApiServer, uid: &str, code: i32) -> Result<()> {
    let pods =
        format!("/api/v1/namespaces/default/pods?labelSelector=kubevirt.io/created-by={uid}");
    let pods = server.get(&pods)?.context("No list of pods")?;
    server.end_pod("default", text(&pods, "/items/0/metadata/name"), code)
}

fn ask(server: &ApiServer, name: &str, request: &Value) -> Result<()> {
    let change = json!({ "status": { "stateChangeRequests": [request] } });
    server
        .patch(&format!("{MACHINES}/{name}/status"), &change)
        .map(drop)
}

/// What can't be had is told by the name of its field, and had once it is no longer asked for.
fn refused(server: &ApiServer) -> Result<()> {
    let path = format!("{MACHINES}/refused");
    let asked = machine("refused", "Once", "run");
    server.apply(&asked.replace("devices: {}", "devices: {sound: {name: s}}"))?;
    server.wait_for(&path, "refused", |machine| {
        let conditions = machine["status"]["conditions"].as_array();
        conditions.into_iter().flatten().any(|condition| {
            condition["type"] == "Failure" && text(condition, "/message").contains("devices.sound")
        })
    })?;
    let remove = json!({ "spec": { "template": { "spec": { "domain": { "devices": { "sound": null } } } } } });
    server.patch(&path, &remove)?;
    runs(server, "refused", "").map(drop)
}

#[test]
fn machines_follow_their_run_strategies() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    define(&server)?;
    server.start_controllers(&["garbagecollector"])?;
    server.start_operator(&["run"])?;
    let _kubelet = server.start_kubelet()?;
    let machines = [
        machine("always", "Always", "run"),
        machine("stays", "Always", "run"),
        machine("manual", "Manual", "run"),
        machine("once", "Once", "run"),
        machine("rerun", "RerunOnFailure", "run"),
        machine("crash", "Always", "fail"),
    ];
    server.apply(&machines.concat())?;

    let first = runs(&server, "always", "")?;
    end(&server, &first, 0)?;
    let second = runs(&server, "always", &first)?;
    let list = server.kubectl(["get", "vm", "always", "--no-headers"])?;
    let columns: Vec<_> = list.expect_code(0)?.split_whitespace().collect();
    ensure!(columns[2..] == ["Running", "True"], "{columns:?}");

    expect(&server, "crash", "CrashLoopBackOff")?;
    refused(&server)?;

    let failed = runs(&server, "rerun", "")?;
    end(&server, &failed, 1)?;
    let ended = runs(&server, "rerun", &failed)?;
    end(&server, &ended, 0)?;
    server.wait_until_gone(&format!("{INSTANCES}/rerun"))?;
    expect(&server, "rerun", "Stopped")?;

    expect(&server, "manual", "Stopped")?;
    ask(&server, "manual", &json!({ "action": "Start" }))?;
    let manual = runs(&server, "manual", "")?;
    ask(
        &server,
        "manual",
        &json!({ "action": "Stop", "uid": manual }),
    )?;
    server.wait_until_gone(&format!("{INSTANCES}/manual"))?;

    let once = runs(&server, "once", "")?;
    end(&server, &once, 0)?;
    expect(&server, "once", "Stopped")?;

    let halt = json!({ "spec": { "runStrategy": "Halted" } });
    server.patch(&format!("{MACHINES}/always"), &halt)?;
    server.wait_until_gone(&format!("{INSTANCES}/always"))?;
    expect(&server, "always", "Stopped")?;
    ensure!(second != first);

    let stays = runs(&server, "stays", "")?;
    server
        .kubectl(["delete", "vm", "stays", "--cascade=orphan", "--timeout=60s"])?
        .expect_code(0)?;
    let orphan = server
        .get(&format!("{INSTANCES}/stays"))?
        .context("It went with its machine")?;
    ensure!(text(&orphan, "/metadata/uid") == stays, "{orphan}");
    ensure!(orphan["metadata"]["ownerReferences"].is_null(), "{orphan}");
    server
        .kubectl(["delete", "vmi", "stays", "--timeout=60s"])?
        .expect_code(0)?;

    server
        .kubectl(["delete", "vm", "--all", "--timeout=60s"])?
        .expect_code(0)?;
    let left = server.kubectl(["get", "vm,vmi,pods,controllerrevisions", "-o", "name"])?;
    ensure!(left.expect_code(0)?.is_empty(), "{}", left.stdout);
    Ok(())
}

/// All objects of the operator but those that run it: this one runs beside the API server, which finds
/// it by `service` at `port`.
fn serve(server: &mut ApiServer, port: u16) -> Result<()> {
    let manifests = ["manifests", "--image", "local.test/unused:1"];
    let manifests = Command::new(operator()?).args(manifests).output()?;
    ensure!(manifests.status.success(), "{manifests:?}");
    let manifests = String::from_utf8(manifests.stdout)?;
    let runs_here = |object: &&str| {
        let mut lines = object.lines();
        !lines.any(|line| matches!(line, "kind: Service" | "kind: Deployment"))
    };
    let objects: Vec<_> = manifests.split("---\n").filter(runs_here).collect();
    let objects = objects.join("---\n");
    server.apply(&objects.replace("port: 443", &format!("port: {port}")))?;
    server.route("edgevmm", "edgevmm-operator")?;
    let listen = format!("127.0.0.1:{port}");
    server.start_operator(&["run", "--listen", &listen, "--user", "admin"])?;
    server
        .kubectl([
            "wait",
            "--for=condition=Available",
            "--timeout=60s",
            "apiservice/v1.subresources.kubevirt.io",
        ])?
        .expect_code(0)?;
    Ok(())
}

#[test]
fn subresources_and_webhooks_are_served() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    serve(&mut server, port)?;
    let path = "/apis/subresources.kubevirt.io/v1/version";
    let told = |version: &Value| version["gitVersion"].is_string();
    server.wait_for(path, "told", told).map(drop)
}
