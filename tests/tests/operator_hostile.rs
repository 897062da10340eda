//! The operator among users who may make machines in one namespace, and want more.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail, ensure};
use edgevmm_e2e::ApiServer;
use serde_json::{Value, json};

const INSTANCES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
const MACHINES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// What users are given, and what is not theirs.
const CLUSTER: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: user}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'kubevirt.io:edit'}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: user}]
---
apiVersion: v1
kind: Namespace
metadata: {name: other}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: theirs, namespace: other}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Gi}}
";

fn instance(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "name": name },
        "spec": {
            "domain": { "memory": { "guest": "64Mi" }, "devices": {
                "interfaces": [{ "name": "default", "masquerade": {} }] } },
            "networks": [{ "name": "default", "pod": {} }],
        },
    })
}

fn with_volume(name: &str, source: &Value) -> Value {
    let mut object = instance(name);
    let mut volume = source.clone();
    volume["name"] = "root".into();
    object["spec"]["volumes"] = json!([volume]);
    object
}

/// Refused, with words that say why.
fn refused(answer: Result<Value>, words: &str) -> Result<()> {
    match answer {
        Ok(object) => bail!("It was taken: {object}"),
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(said.contains(words), "{words:?} is not in {said:?}");
            Ok(())
        }
    }
}

fn says(object: &Value, kind: &str, words: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| {
        let message = condition["message"].as_str().unwrap_or_default();
        condition["type"] == kind && message.contains(words)
    })
}

fn runs(object: &Value) -> bool {
    object["status"]["phase"] == "Running"
}

/// Pods of an instance, whoever made them.
fn pods(server: &ApiServer, uid: &str) -> Result<Vec<Value>> {
    let list = server.get(&format!(
        "{PODS}?labelSelector=kubevirt.io/created-by={uid}"
    ))?;
    let list = list.context("No list")?;
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}

fn uid(object: &Value) -> Result<String> {
    let uid = object["metadata"]["uid"].as_str();
    Ok(uid.context("No UID")?.to_owned())
}

/// What is told of an instance is the operator's to write.
fn status(server: &ApiServer) -> Result<()> {
    let mut forged = instance("web");
    let lies = json!({ "phase": "Failed", "nodeName": "theirs",
                       "interfaces": [{ "name": "default", "ipAddress": "127.0.0.1" }] });
    forged["status"] = lies.clone();
    server.as_user("POST", INSTANCES, &forged)?;
    let path = format!("{INSTANCES}/web");
    let web = server.wait_for(&path, "running", runs)?;
    let address = web["status"]["interfaces"][0]["ipAddress"].clone();
    ensure!(
        address.as_str().is_some_and(|it| it.starts_with("10.223.")),
        "{web}"
    );
    server.as_user("PATCH", &path, &json!({ "status": lies }))?;
    server.as_user("PATCH", &path, &json!({ "status": null }))?;
    let now = server.get(&path)?.context("It is gone")?;
    ensure!(now["status"] == web["status"], "{now}");
    let spec = json!({ "spec": { "domain": { "memory": { "guest": "64Gi" } } } });
    refused(server.as_user("PATCH", &path, &spec), "can't be changed")
}

/// Labels lead to nothing that an owner does not.
fn labels(server: &ApiServer) -> Result<()> {
    let mut labelled = instance("labelled");
    labelled["metadata"]["labels"] = json!({ "kubevirt.io/nodeName": "node1" });
    let reserved = "is reserved";
    refused(server.as_user("POST", INSTANCES, &labelled), reserved)?;
    let change = json!({ "metadata": { "labels": { "kubevirt.io/created-by": "1" } } });
    let path = format!("{INSTANCES}/web");
    refused(server.as_user("PATCH", &path, &change), reserved)?;
    let template = json!({ "metadata": labelled["metadata"], "spec": labelled["spec"] });
    let machine = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": "m" },
        "spec": { "runStrategy": "Always", "template": template },
    });
    refused(server.as_user("POST", MACHINES, &machine), reserved)?;
    // A pod that only says that it is an instance's is left alone, and stands for nothing.
    let web = server.get(&path)?.context("It is gone")?;
    let pod = json!({
        "metadata": { "name": "fake", "labels": {
            "kubevirt.io": "virt-launcher", "kubevirt.io/created-by": uid(&web)? } },
        "spec": { "containers": [{ "name": "compute", "image": "local.test/a:1" }] },
    });
    server.create(PODS, &pod)?;
    ensure!(pods(server, &uid(&web)?)?.len() == 2);
    server.as_user("DELETE", &path, &json!({}))?;
    server.wait_until_gone(&path)?;
    let left = pods(server, &uid(&web)?)?;
    let is_left = left.len() == 1 && left[0]["metadata"]["name"] == "fake";
    ensure!(is_left, "{left:?}");
    ensure!(
        left[0]["metadata"]["deletionTimestamp"].is_null(),
        "{left:?}"
    );
    server.delete(&format!("{PODS}/fake"))
}

/// What is not theirs can't be named.
fn others(server: &ApiServer) -> Result<()> {
    let claim = |name: &str| json!({ "persistentVolumeClaim": { "claimName": name } });
    let image =
        |path: &str| json!({ "containerDisk": { "image": "local.test/a:1", "path": path } });
    let far = "../../other/persistentvolumeclaims/theirs";
    for (source, field) in [
        (claim("other/theirs"), "persistentVolumeClaim.claimName"),
        (claim(far), "persistentVolumeClaim.claimName"),
        (image("/disk/../etc/shadow"), "containerDisk.path"),
        (image("/etc/shadow"), "containerDisk.path"),
        (
            json!({ "hostDisk": { "path": "/etc/shadow", "type": "Disk" } }),
            "hostDisk",
        ),
    ] {
        let answer = server.as_user("POST", INSTANCES, &with_volume("far", &source));
        refused(answer, &format!("spec.volumes[0].{field}"))?;
    }
    let missing = with_volume("missing", &claim("theirs"));
    let missing = server.as_user("POST", INSTANCES, &missing)?;
    let path = format!("{INSTANCES}/missing");
    server.wait_for(&path, "in want of a claim", |it| {
        says(it, "Synchronized", "no claim `theirs`")
    })?;
    ensure!(pods(server, &uid(&missing)?)?.is_empty());
    let there = "/apis/kubevirt.io/v1/namespaces/other/virtualmachineinstances";
    refused(server.as_user("POST", there, &instance("far")), "forbidden")?;
    let part =
        "/apis/subresources.kubevirt.io/v1/namespaces/other/virtualmachineinstances/a/console";
    refused(server.as_user("GET", part, &json!({})), "orbidden")
}

/// While the operator is away nothing asks it, so what was taken meanwhile is checked when it is back.
fn unseen(server: &mut ApiServer) -> Result<()> {
    server.stop_operator()?;
    let disk = json!({ "hostDisk": { "path": "/etc/shadow", "type": "Disk" } });
    let first = server.as_user("POST", INSTANCES, &with_volume("disk", &disk))?;
    let mut forged = instance("forged");
    forged["status"] = json!({ "phase": "Running", "nodeName": "node1",
                               "interfaces": [{ "name": "default", "ipAddress": "127.0.0.1" }] });
    let second = server.as_user("POST", INSTANCES, &forged)?;
    server.resume_operator()?;
    server.wait_for(&format!("{INSTANCES}/disk"), "refused", |it| {
        says(it, "Synchronized", "spec.volumes[0].hostDisk")
    })?;
    server.wait_for(&format!("{INSTANCES}/forged"), "found out", |it| {
        it["status"]["phase"] == "Failed"
    })?;
    for object in [&first, &second] {
        ensure!(pods(server, &uid(object)?)?.is_empty(), "{object}");
    }
    Ok(())
}

/// Who opens connections and says nothing keeps out only itself.
fn flood(server: &mut ApiServer) -> Result<()> {
    server.stop_operator()?;
    server.resume_operator()?;
    let (host, port) = server.operator_address();
    let address: SocketAddr = format!("{host}:{port}").parse()?;
    let (_, runtime) = server.client();
    let mut held = Vec::new();
    for number in 0..300_u16 {
        let from = SocketAddr::from(([127, 0, 0, 2 + u8::try_from(number / 150)?], 0));
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(from)?;
        let stream: Result<TcpStream> = runtime.block_on(async {
            let _entered = runtime.enter();
            Ok(socket.connect(address).await?.into_std()?)
        });
        held.extend(stream);
    }
    ensure!(held.len() > 200, "Only {} connections", held.len());
    // The API server has to make a new connection for its question.
    let disk = json!({ "hostDisk": { "path": "/etc/shadow", "type": "Disk" } });
    let answer = server.as_user("POST", INSTANCES, &with_volume("flooded", &disk));
    refused(answer, "hostDisk")?;
    drop(held);
    Ok(())
}

#[test]
fn users_get_no_more_than_is_theirs() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    server.install_operator()?;
    server.apply(CLUSTER)?;
    let _node = server.start_kubelet()?;
    status(&server)?;
    labels(&server)?;
    others(&server)?;
    unseen(&mut server)?;
    flood(&mut server)
}
