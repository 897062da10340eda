//! What a node does to pods, as the API sees it.

use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use kube::api::{
    DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::core::ObjectMeta;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use futures_util::{StreamExt, TryStreamExt};

/// The name of the node.
const NODE: &str = "node1";

/// A node without containers: it takes every pod and says that it runs, until it is deleted.
///
/// A pod's annotation `tests.edgevmm.io/fate` may say otherwise: `wait`, and nobody takes it; `fail`,
/// and it fails before it runs; `linger`, and it needs more than a second to end. Dropping it ends it.
#[derive(Debug)]
pub struct FakeKubelet {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeKubelet {
    pub(super) fn start(config: &Path) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (started, is_started) = mpsc::channel();
        let config = config.to_owned();
        let thread = thread::spawn(move || {
            let runtime = super::runtime();
            let _ = started.send(runtime.as_ref().map(drop).map_err(ToString::to_string));
            let Ok(runtime) = runtime else { return };
            runtime.block_on(async {
                tokio::select! {
                    result = serve(&config) => eprintln!("The kubelet ended: {result:?}"),
                    _ = stopped => {}
                }
            });
        });
        let started = is_started.recv().context("The kubelet's thread ended")?;
        started.map_err(anyhow::Error::msg)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for FakeKubelet {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(config: &Path) -> Result<()> {
    let client = super::connect(config).await?;
    let pods: Api<Pod> = Api::all(client.clone());
    let mut number = 0;
    loop {
        let list = pods.list(&ListParams::default()).await?;
        let version = list.metadata.resource_version.unwrap_or_default();
        for pod in list.items {
            settle(&client, pod, &mut number).await?;
        }
        let mut events = pods.watch(&WatchParams::default(), &version).await?.boxed();
        while let Some(event) = events.try_next().await? {
            match event {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                    settle(&client, pod, &mut number).await?;
                }
                WatchEvent::Error(_) => break,
                _ => {}
            }
        }
    }
}

/// Takes the next step with a pod, if there is one. Someone else may have changed it meanwhile, of
/// which there will be another event.
async fn settle(client: &Client, pod: Pod, number: &mut u8) -> Result<()> {
    match step(client, pod, number).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        result => Ok(result?),
    }
}

async fn step(client: &Client, pod: Pod, number: &mut u8) -> kube::Result<()> {
    let name = pod.name_any();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let fate = pod
        .annotations()
        .get("tests.edgevmm.io/fate")
        .map(String::as_str);
    if pod.metadata.deletion_timestamp.is_some() {
        let seconds = pod.metadata.deletion_grace_period_seconds;
        if fate == Some("linger") && seconds > Some(1) {
            return Ok(());
        }
        let at_once = DeleteParams::default().grace_period(0);
        return pods.delete(&name, &at_once).await.map(drop);
    }
    let bound = pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.node_name.is_some());
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    match (fate, bound, phase) {
        (Some("wait"), false, _) => Ok(()),
        (_, false, _) => bind(client, &pod).await,
        (fate, true, Some("Pending") | None) => {
            *number = number.wrapping_add(1);
            let status = if fate == Some("fail") {
                ended(&pod, 1)
            } else {
                running(&pod, *number)
            };
            set_status(&pods, &name, status).await
        }
        _ => Ok(()),
    }
}

async fn bind(client: &Client, pod: &Pod) -> kube::Result<()> {
    let binding = Binding {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(NODE.to_owned()),
            ..ObjectReference::default()
        },
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let name = pod.name_any();
    let params = PostParams::default();
    let bound: kube::Result<Value> = pods
        .create_subresource("binding", &name, &params, &binding)
        .await;
    bound.map(drop)
}

/// Says that a pod ended, its containers with an exit code.
pub(super) async fn end(client: &Client, namespace: &str, name: &str, code: i32) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = pods.get(name).await?;
    Ok(set_status(&pods, name, ended(&pod, code)).await?)
}

async fn set_status(pods: &Api<Pod>, name: &str, status: Value) -> kube::Result<()> {
    let patch = Patch::Merge(json!({ "status": status }));
    pods.patch_status(name, &PatchParams::default(), &patch)
        .await
        .map(drop)
}

fn running(pod: &Pod, number: u8) -> Value {
    let address = format!("10.223.0.{number}");
    json!({
        "phase": "Running",
        "hostIP": "10.222.0.1",
        "podIP": address,
        "podIPs": [{ "ip": address }],
        "startTime": now(),
        "conditions": conditions("True", None),
        "containerStatuses": containers(pod, true, &json!({ "running": { "startedAt": now() } })),
    })
}

fn ended(pod: &Pod, code: i32) -> Value {
    let (phase, reason) = match code {
        0 => ("Succeeded", "Completed"),
        _ => ("Failed", "Error"),
    };
    let state =
        json!({ "terminated": { "exitCode": code, "reason": reason, "finishedAt": now() } });
    json!({
        "phase": phase,
        "conditions": conditions("False", Some("PodCompleted")),
        "containerStatuses": containers(pod, false, &state),
    })
}

fn conditions(ready: &str, reason: Option<&str>) -> Value {
    let kinds = ["Initialized", "Ready", "ContainersReady", "PodScheduled"];
    kinds
        .iter()
        .map(|kind| {
            let status = if kind.ends_with("Ready") {
                ready
            } else {
                "True"
            };
            json!({ "type": kind, "status": status, "reason": reason, "lastTransitionTime": now() })
        })
        .collect()
}

fn containers(pod: &Pod, ready: bool, state: &Value) -> Value {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .map(|container| {
            json!({
                "name": container.name, "image": container.image, "imageID": "fake",
                "containerID": "fake://1", "ready": ready, "started": ready, "restartCount": 0,
                "state": state,
            })
        })
        .collect()
}

fn now() -> Value {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    json!(Time(k8s_openapi::jiff::Timestamp::now()))
}
