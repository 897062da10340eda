//! The operator's rights: those of its manifests are what it asks of the API server, no less and no
//! more.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{ApiServer, Request};
use serde_json::{Value, json};

const KUBEVIRT: &str = "/apis/kubevirt.io/v1/namespaces/default";
const PARTS: &str = "/apis/subresources.kubevirt.io/v1/namespaces/default";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

const PATIENCE: Duration = Duration::from_secs(30);
const GLANCE: Duration = Duration::from_millis(50);
const WATCHED: [&str; 4] = [
    "virtualmachines",
    "virtualmachineinstances",
    "pods",
    "persistentvolumeclaims",
];

/// Rights without a request here, and what they are for.
const UNSEEN: [(&str, &str, &str); 5] = [
    // Where owners that block a deletion are only for who may finalize them.
    ("kubevirt.io", "virtualmachines/finalizers", "update"),
    (
        "kubevirt.io",
        "virtualmachineinstances/finalizers",
        "update",
    ),
    // Newer API servers ask for it whatever the method is, older ones for `get`.
    ("", "pods/exec", "create"),
    ("", "pods/exec", "get"),
    // Certificates that are about to end are made anew.
    ("", "secrets", "delete"),
];

type Right = (String, String, String);

fn rights(role: &Value) -> Result<BTreeSet<Right>> {
    let texts = |value: &Value| -> Vec<String> {
        let list = value.as_array().into_iter().flatten();
        list.filter_map(|text| text.as_str().map(str::to_owned))
            .collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().context("No rules")? {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    Ok(rights)
}

fn machine() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": { "name": "kept" },
        "spec": { "runStrategy": "Always", "template": {
            "metadata": { "annotations": { "tests.edgevmm.io/fate": "linger" } },
            "spec": {
            "terminationGracePeriodSeconds": 600,
            "domain": {
                "memory": { "guest": "64Mi" },
                "devices": { "disks": [{ "name": "system", "disk": { "bus": "virtio" } }] },
            },
            "volumes": [{ "name": "system", "persistentVolumeClaim": { "claimName": "system" } }],
        } } },
    })
}

const CLAIM: &str = "
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: system}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Gi}}
";

/// Has the operator do all that it can do without a node.
fn live(server: &ApiServer) -> Result<()> {
    let path = format!("{KUBEVIRT}/virtualmachines/kept");
    let instance = format!("{KUBEVIRT}/virtualmachineinstances/kept");
    let runs = |object: &Value| object["status"]["phase"] == "Running";
    server.create(&format!("{KUBEVIRT}/virtualmachines"), &machine())?;
    server.wait_for(&path, "in want of its claim", |machine| {
        machine["status"]["printableStatus"] == "ErrorPvcNotFound"
    })?;
    server.apply(CLAIM)?;
    let first = server.wait_for(&instance, "running", runs)?;
    // There is no node to pause it; that the way is tried is enough.
    let pause = format!("{PARTS}/virtualmachineinstances/kept/pause");
    ensure!(server.put(&pause, &json!({})).is_err());
    let restart = format!("{PARTS}/virtualmachines/kept/restart");
    server.put(&restart, &json!({ "gracePeriodSeconds": 0 }))?;
    let second = server.wait_for(&instance, "another one", |now| {
        runs(now) && now["metadata"]["uid"] != first["metadata"]["uid"]
    })?;
    ensure!(
        second["spec"]["terminationGracePeriodSeconds"] == 600,
        "It is hurried, too"
    );
    let stop = format!("{PARTS}/virtualmachines/kept/stop");
    server.put(&stop, &json!({}))?;
    server.wait_for(&instance, "ending", |now| {
        now["metadata"]["deletionTimestamp"].is_string()
    })?;
    // It would take ten minutes, unless it is told to be quicker.
    server.put(&stop, &json!({ "gracePeriod": 0 }))?;
    server.wait_until_gone(&instance)?;
    server.delete(&path)?;
    server.wait_until_gone(&path)
}

#[test]
fn rights_are_those_that_are_used() -> Result<()> {
    let Some(mut server) = ApiServer::start()? else {
        return Ok(());
    };
    server.install_operator()?;
    let _node = server.start_kubelet()?;
    live(&server)?;
    // Its watches are seen once they end.
    server.stop_operator()?;
    let deadline = Instant::now() + PATIENCE;
    let requests = loop {
        let requests = server.operator_requests()?;
        let watched = |resource: &&str| {
            let watches = |it: &Request| it.verb == "watch" && it.resource == **resource;
            requests.iter().any(watches)
        };
        if WATCHED.iter().all(watched) {
            break requests;
        }
        ensure!(
            Instant::now() < deadline,
            "Watches are missing: {requests:?}"
        );
        thread::sleep(GLANCE);
    };
    let refused: Vec<_> = requests.iter().filter(|it| it.code == 403).collect();
    ensure!(refused.is_empty(), "It may not: {refused:?}");
    let role = |path: &str| server.get(&format!("{RBAC}/{path}"))?.context("No role");
    let everywhere = rights(&role("clusterroles/edgevmm-operator")?)?;
    let own = rights(&role("namespaces/edgevmm/roles/edgevmm-operator")?)?;
    let given: BTreeSet<Right> = everywhere.union(&own).cloned().collect();
    // What kube-system tells, everybody of its kind may read by a role of Kubernetes.
    let elsewhere = |namespace: Option<&str>| namespace == Some("kube-system");
    let used = requests
        .into_iter()
        .filter(|it| !elsewhere(it.namespace.as_deref()))
        .map(|it| (it.group, it.resource, it.verb));
    let unseen = UNSEEN.map(|(group, resource, verb)| (group.into(), resource.into(), verb.into()));
    let used: BTreeSet<Right> = used.chain(unseen).collect();
    let unused: Vec<_> = given.difference(&used).collect();
    ensure!(unused.is_empty(), "Rights that nothing uses: {unused:?}");
    let missing: Vec<_> = used.difference(&given).collect();
    ensure!(missing.is_empty(), "Rights that are missing: {missing:?}");
    // Secrets are none of its business but for its own.
    let secrets = everywhere
        .iter()
        .any(|(_, resource, _)| resource == "secrets");
    ensure!(!secrets, "It may read everybody's Secrets");
    Ok(())
}
