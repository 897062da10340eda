//! The operator when the API server goes away, and when it is itself ended at any moment.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::ApiServer;
use serde_json::{Value, json};

const INSTANCES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
const MACHINES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// Longer than a connection takes to be found broken.
const AWAY: Duration = Duration::from_secs(3);

fn spec() -> Value {
    json!({ "domain": { "memory": { "guest": "64Mi" }, "devices": {} } })
}

fn instance(server: &ApiServer, name: &str) -> Result<()> {
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": { "name": name }, "spec": spec(),
    });
    server.create(INSTANCES, &object).map(drop)
}

fn machine(server: &ApiServer, name: &str) -> Result<()> {
    let object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": name },
        "spec": { "runStrategy": "Always", "template": { "spec": spec() } },
    });
    server.create(MACHINES, &object).map(drop)
}

fn runs(server: &ApiServer, name: &str) -> Result<String> {
    let path = format!("{INSTANCES}/{name}");
    let object = server.wait_for(&path, "running", |it| it["status"]["phase"] == "Running")?;
    let uid = object["metadata"]["uid"].as_str();
    Ok(uid.context("No UID")?.to_owned())
}

/// Pods by the instance that each is of.
fn pods(server: &ApiServer) -> Result<BTreeMap<String, Vec<String>>> {
    let list = server.get(PODS)?.context("No list")?;
    let mut pods: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pod in list["items"].as_array().into_iter().flatten() {
        let metadata = &pod["metadata"];
        let name = metadata["annotations"]["kubevirt.io/domain"].as_str();
        let uid = metadata["uid"].as_str().unwrap_or_default();
        let name = name.context("A pod of nobody")?;
        pods.entry(name.to_owned())
            .or_default()
            .push(uid.to_owned());
    }
    Ok(pods)
}

#[test]
fn nothing_is_lost_while_one_of_them_is_away() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    server.install_operator()?;
    let node = server.start_kubelet()?;
    machine(&server, "kept")?;
    instance(&server, "single")?;
    let before = [runs(&server, "kept")?, runs(&server, "single")?];
    let pods_before = pods(&server)?;

    drop(node);
    server.stop_server()?;
    thread::sleep(AWAY);
    server.start_server()?;
    let node = server.start_kubelet()?;
    // It hears of new ones again, and left the others as they were.
    instance(&server, "after")?;
    runs(&server, "after")?;
    ensure!([runs(&server, "kept")?, runs(&server, "single")?] == before);
    let mut now = pods(&server)?;
    now.remove("after");
    ensure!(now == pods_before, "{now:?} instead of {pods_before:?}");

    // What was asked for while the operator was away is done when it is back.
    server.stop_operator()?;
    machine(&server, "meanwhile")?;
    server.delete(&format!("{INSTANCES}/single"))?;
    server.resume_operator()?;
    runs(&server, "meanwhile")?;
    server.wait_until_gone(&format!("{INSTANCES}/single"))?;

    // It is ended in the midst of things, again and again: each machine gets one pod.
    let names: Vec<_> = (0..12).map(|number| format!("many-{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        machine(&server, name)?;
        if number % 4 == 3 {
            server.stop_operator()?;
            server.resume_operator()?;
        }
    }
    for name in &names {
        runs(&server, name)?;
    }
    let pods = pods(&server)?;
    let doubled: Vec<_> = pods.iter().filter(|(_, pods)| pods.len() != 1).collect();
    ensure!(doubled.is_empty(), "{doubled:?}");
    ensure!(pods.len() == names.len() + 3, "{pods:?}");
    ensure!(runs(&server, "kept")? == before[0]);
    drop(node);
    Ok(())
}
