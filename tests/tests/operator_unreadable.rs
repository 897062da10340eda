//! The operator with objects that it can't read: written under other definitions, or where a schema
//! can't tell.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{ApiServer, operator};
use serde_json::{Value, json};

const KUBEVIRT: &str = "/apis/kubevirt.io/v1/namespaces/default";
const EVENTS: &str = "/api/v1/namespaces/default/events";

/// Definitions that let everything through, as older or other ones may have.
fn define_loosely(server: &ApiServer) -> Result<()> {
    let definitions = Command::new(operator()?).arg("crds").output()?;
    let mut definitions: Value = serde_json::from_slice(&definitions.stdout)?;
    let items = definitions["items"].as_array_mut();
    for definition in items.context("No definitions")? {
        let schema = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema");
        *schema.context("No schema")? =
            json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    }
    server.apply(&definitions.to_string())?;
    server
        .kubectl(["wait", "--for=condition=established", "crd", "--all"])?
        .expect_code(0)?;
    Ok(())
}

fn instance(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "name": name },
        "spec": { "domain": { "memory": { "guest": "64Mi" }, "devices": {} } },
    })
}

fn machine(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "name": name },
        "spec": { "runStrategy": "Always", "template": { "spec": instance(name)["spec"] } },
    })
}

fn create(server: &ApiServer, object: &Value) -> Result<String> {
    let kind = object["kind"].as_str().context("No kind")?.to_lowercase();
    let collection = format!("{KUBEVIRT}/{kind}s");
    server.create(&collection, object)?;
    let name = object["metadata"]["name"].as_str().context("No name")?;
    Ok(format!("{collection}/{name}"))
}

fn runs(object: &Value) -> bool {
    object["status"]["phase"] == "Running" || object["status"]["printableStatus"] == "Running"
}

/// Users are told which field of an object it is.
fn wait_for_event(server: &ApiServer, name: &str, field: &str) -> Result<()> {
    let tells = |event: &Value| {
        let note = event["message"].as_str().unwrap_or_default();
        event["reason"] == "Unreadable"
            && event["involvedObject"]["name"] == name
            && note.contains(field)
    };
    server.wait_for(EVENTS, &format!("telling of {field} of {name}"), |list| {
        list["items"].as_array().into_iter().flatten().any(tells)
    })?;
    Ok(())
}

#[test]
fn objects_that_can_not_be_read_stop_no_others() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    define_loosely(&server)?;
    let mut broken = instance("broken");
    broken["spec"]["domain"]["cpu"] = json!({ "cores": "many" });
    create(&server, &broken)?;
    // Their definitions take these as well, and they are to be let go.
    let mut stuck = instance("stuck");
    stuck["metadata"]["finalizers"] = json!(["kubevirt.io/foregroundDeleteVirtualMachine"]);
    stuck["status"] = json!({ "runtimeUser": 1e30 });
    let stuck = create(&server, &stuck)?;
    let mut odd = machine("odd");
    odd["metadata"]["finalizers"] = json!(["kubevirt.io/virtualMachineControllerFinalize"]);
    odd["spec"]["template"]["metadata"] = json!({ "ownerReferences": 5 });
    let odd = create(&server, &odd)?;
    let before = create(&server, &instance("before"))?;
    server.install_operator()?;
    let _node = server.start_kubelet()?;

    let after = create(&server, &instance("after"))?;
    let kept = create(&server, &machine("kept"))?;
    for path in [&before, &after, &kept] {
        server.wait_for(path, "running", runs)?;
    }
    wait_for_event(&server, "broken", "spec.domain.cpu.cores")?;
    wait_for_event(&server, "stuck", "status.runtimeUser")?;
    wait_for_event(&server, "odd", "spec.template.metadata.ownerReferences")?;
    for path in [&stuck, &odd] {
        server.delete(path)?;
        server.wait_until_gone(path)?;
    }
    // Nothing was done for it, and nothing was lost of it.
    let broken = server.get(&format!("{KUBEVIRT}/virtualmachineinstances/broken"))?;
    let broken = broken.context("It is gone")?;
    ensure!(broken["spec"]["domain"]["cpu"]["cores"] == "many");
    ensure!(broken.pointer("/status/phase").is_none(), "{broken}");
    // The definition now refuses what can't be read.
    let mut large = instance("large");
    large["spec"]["domain"]["cpu"] = json!({ "cores": 5_000_000_000_u64 });
    ensure!(create(&server, &large).is_err());
    Ok(())
}
