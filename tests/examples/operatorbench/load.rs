//! Makes instances, says as a node that their pods run, and notes when what follows is heard of.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{
    DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind, ObjectMeta};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

/// Requests at a time, of those who make instances and of all nodes.
const AT_ONCE: usize = 32;
/// Longer than a step takes.
const PATIENCE: Duration = Duration::from_secs(600);
const NAMESPACE: &str = "default";

/// When something was asked for, and heard of.
#[derive(Debug, Default, Clone, Copy)]
struct Moments {
    asked: Option<Instant>,
    pod: Option<Instant>,
    said: Option<Instant>,
    running: Option<Instant>,
}

/// How long it took, in ms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) pod: f64,
    pub(crate) running: f64,
}

/// What all that watch and ask share.
#[derive(Debug, Default)]
struct Shared {
    moments: Mutex<HashMap<String, Moments>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Moments>> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: &str, which: impl FnOnce(&mut Moments) -> &mut Option<Instant>) {
        let now = Instant::now();
        let mut moments = self.lock();
        which(moments.entry(name.to_owned()).or_default()).get_or_insert(now);
        drop(moments);
        self.changed.notify_all();
    }
}

/// The nodes, and those who make instances.
pub(crate) struct Load {
    runtime: Runtime,
    client: Client,
    shared: Arc<Shared>,
}

impl Load {
    pub(crate) fn start(config: &str, nodes: usize) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let config = Kubeconfig::read_from(Path::new(config))?;
        let options = KubeConfigOptions::default();
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(config, &options).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        let shared = Arc::new(Shared::default());
        runtime.spawn(told(watch_pods(client.clone(), Arc::clone(&shared), nodes)));
        runtime.spawn(told(watch_instances(client.clone(), Arc::clone(&shared))));
        Ok(Self {
            runtime,
            client,
            shared,
        })
    }

    /// Makes instances of these numbers and waits until they run.
    pub(crate) fn make(&self, numbers: Range<usize>, singly: bool) -> Result<Vec<Times>> {
        let names: Vec<_> = numbers.map(|number| format!("vm-{number}")).collect();
        if singly {
            for name in &names {
                self.runtime.block_on(self.create(name))?;
                self.wait(std::slice::from_ref(name))?;
            }
        } else {
            let all = futures_util::stream::iter(&names);
            let all = all.map(|name| self.create(name)).buffer_unordered(AT_ONCE);
            self.runtime.block_on(all.try_collect::<()>())?;
            self.wait(&names)?;
        }
        let moments = self.shared.lock();
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        let times = names.iter().map(|name| {
            let Moments {
                asked,
                pod,
                said,
                running,
            } = *moments.get(name)?;
            Some(Times {
                pod: ms(asked?, pod?),
                running: ms(said?, running?),
            })
        });
        let times: Option<Vec<_>> = times.collect();
        times.context("An instance ran without a pod")
    }

    async fn create(&self, name: &str) -> Result<()> {
        let instances: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), NAMESPACE, &kind());
        let object = serde_json::from_value(instance(name))?;
        self.shared.note(name, |moments| &mut moments.asked);
        instances.create(&PostParams::default(), &object).await?;
        Ok(())
    }

    fn wait(&self, names: &[String]) -> Result<()> {
        let runs = |moments: &HashMap<String, Moments>, name: &String| {
            moments.get(name).is_some_and(|it| it.running.is_some())
        };
        let deadline = Instant::now() + PATIENCE;
        let mut moments = self.shared.lock();
        loop {
            let missing = names.iter().find(|name| !runs(&moments, name));
            let Some(missing) = missing else {
                return Ok(());
            };
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{missing} does not run");
            let waited = self.shared.changed.wait_timeout(moments, left);
            moments = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

async fn told(watch: impl Future<Output = Result<()>>) {
    if let Err(error) = watch.await {
        eprintln!("A watch ended: {error:#}");
    }
}

fn kind() -> ApiResource {
    let kind = GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance");
    ApiResource::from_gvk_with_plural(&kind, "virtualmachineinstances")
}

/// As small installations have them: an image, a claim-less disk, cloud-init.
fn instance(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": { "app": "bench" } },
        "spec": {
            "terminationGracePeriodSeconds": 30,
            "domain": {
                "cpu": { "cores": 1 },
                "memory": { "guest": "256Mi" },
                "devices": {
                    "rng": {},
                    "disks": [{ "name": "system", "disk": { "bus": "virtio" } }],
                    "interfaces": [{ "name": "default", "masquerade": {}, "ports": [{ "port": 22 }] }],
                },
            },
            "networks": [{ "name": "default", "pod": {} }],
            "volumes": [
                { "name": "system", "containerDisk": { "image": "local.test/debian:12" } },
                { "name": "seed", "cloudInitNoCloud": { "userData": "#cloud-config\nhostname: bench\n" } },
            ],
        },
    })
}

async fn watch_instances(client: Client, shared: Arc<Shared>) -> Result<()> {
    let instances: Api<DynamicObject> = Api::all_with(client, &kind());
    let list = instances.list(&ListParams::default()).await?;
    let mut version = list.metadata.resource_version.unwrap_or_default();
    loop {
        let events = instances.watch(&WatchParams::default(), &version).await?;
        let mut events = events.boxed();
        while let Some(event) = events.try_next().await? {
            if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event {
                version = object.resource_version().unwrap_or(version);
                if object.data.pointer("/status/phase") == Some(&json!("Running")) {
                    shared.note(&object.name_any(), |moments| &mut moments.running);
                }
            }
        }
    }
}

async fn watch_pods(client: Client, shared: Arc<Shared>, nodes: usize) -> Result<()> {
    let pods: Api<Pod> = Api::all(client.clone());
    let list = pods.list(&ListParams::default()).await?;
    let mut version = list.metadata.resource_version.unwrap_or_default();
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut count = 0;
    loop {
        let mut events = pods.watch(&WatchParams::default(), &version).await?.boxed();
        while let Some(event) = events.try_next().await? {
            let (pod, is_new) = match event {
                WatchEvent::Added(pod) => (pod, true),
                WatchEvent::Modified(pod) => (pod, false),
                _ => continue,
            };
            version = pod.resource_version().unwrap_or(version);
            let name = pod.annotations().get("kubevirt.io/domain").cloned();
            if let (Some(name), true) = (name, is_new) {
                shared.note(&name, |moments| &mut moments.pod);
                count += 1;
                let (client, shared) = (client.clone(), Arc::clone(&shared));
                let (slots, number) = (Arc::clone(&slots), count);
                tokio::spawn(told(async move {
                    let _slot = slots.acquire().await?;
                    start(&client, &shared, &pod, &name, number, nodes).await
                }));
            }
        }
    }
}

/// Says that a pod runs, as scheduler and node.
async fn start(
    client: &Client,
    shared: &Shared,
    pod: &Pod,
    name: &str,
    number: usize,
    nodes: usize,
) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let binding = Binding {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(format!("node{}", number % nodes.max(1))),
            ..ObjectReference::default()
        },
    };
    let params = PostParams::default();
    let _: Value = pods
        .create_subresource("binding", &pod.name_any(), &params, &binding)
        .await?;
    let address = format!("10.223.{}.{}", number / 250, number % 250 + 1);
    let now = json!(Time(k8s_openapi::jiff::Timestamp::now()));
    let condition =
        |kind: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": now });
    let kinds = ["Initialized", "Ready", "ContainersReady", "PodScheduled"];
    let status = json!({
        "phase": "Running",
        "hostIP": "10.222.0.1",
        "podIP": address,
        "podIPs": [{ "ip": address }],
        "startTime": now,
        "conditions": kinds.map(condition),
        "containerStatuses": [{
            "name": "compute", "image": "local.test/debian:12", "imageID": "fake",
            "containerID": "fake://1", "ready": true, "started": true, "restartCount": 0,
            "state": { "running": { "startedAt": now } },
        }],
    });
    shared.note(name, |moments| &mut moments.said);
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams::default();
    pods.patch_status(&pod.name_any(), &params, &patch).await?;
    Ok(())
}
