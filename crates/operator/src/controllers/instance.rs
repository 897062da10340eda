//! Keeps a pod for each VirtualMachineInstance, and tells in its status what becomes of it.

use std::sync::Arc;

use edgevmm_kubevirt::api::{InstanceSpec, InstanceStatus, Phase, VirtualMachineInstance};
use edgevmm_kubevirt::checks;
use edgevmm_kubevirt::conditions;
use edgevmm_kubevirt::guarded::Guarded;
use edgevmm_kubevirt::pod::{self, Claim, Claims, FINALIZER, PodError};
use edgevmm_kubevirt::quantity::units;
use edgevmm_kubevirt::status::{self, PAUSED, SYNCHRONIZED};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, WatchStreamExt, reflector, watcher};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::{Error, RETRY, Shared, patch};

/// What all pods of instances have.
const PODS: &str = "kubevirt.io=virt-launcher";

struct Context {
    shared: Shared,
    pods: Store<Pod>,
}

/// Runs until the process ends.
pub async fn run(shared: Shared) {
    let client = shared.client.clone();
    let pods: Api<Pod> = Api::all(client.clone());
    let (reader, writer) = reflector::store();
    let slim = |pod: &mut Pod| pod.managed_fields_mut().clear();
    let pods = watcher(pods, super::watched().labels(PODS))
        .backoff(super::Patience::default())
        .modify(slim)
        .reflect(writer)
        .touched_objects();
    let instances: Api<Guarded<VirtualMachineInstance>> = Api::all(client.clone());
    let (store, writer) = reflector::store();
    let instances = watcher(instances, super::watched())
        .backoff(super::Patience::default())
        .reflect(writer)
        .applied_objects();
    let controller = Controller::for_stream(instances, store.clone())
        .with_config(super::pace())
        .trigger_backoff(super::NoWait);
    let claims: Api<PartialObjectMeta<PersistentVolumeClaim>> = Api::all(client);
    let claims = watcher(claims, super::watched())
        .backoff(super::Patience::default())
        .touched_objects();
    let context = Arc::new(Context {
        shared,
        pods: reader,
    });
    controller
        .owns_stream(pods)
        .watches_stream(claims, move |claim| {
            using(
                &store,
                &claim.namespace().unwrap_or_default(),
                &claim.name_any(),
            )
        })
        .shutdown_on_signal()
        .run(reconcile, retry, context)
        .for_each(|outcome| async move {
            match outcome {
                Ok((object, _)) => debug!(%object, "kept"),
                Err(error) => debug!(%error, "not kept yet"),
            }
        })
        .await;
}

/// The instances that wait for a claim.
fn using(
    instances: &Store<Guarded<VirtualMachineInstance>>,
    namespace: &str,
    claim: &str,
) -> Vec<ObjectRef<Guarded<VirtualMachineInstance>>> {
    let waits = |instance: &Guarded<VirtualMachineInstance>| {
        let Ok(instance) = &instance.0 else {
            return false;
        };
        let phase = instance.status.as_ref().and_then(|status| status.phase);
        matches!(phase, None | Some(Phase::Pending))
            && instance.namespace().as_deref() == Some(namespace)
            && pod::claims_of(&instance.spec).any(|name| name == claim)
    };
    let waiting = instances.state_filter(waits);
    waiting
        .iter()
        .map(|instance| ObjectRef::from_obj(&**instance))
        .collect()
}

#[allow(clippy::needless_pass_by_value, reason = "as kube calls it")]
fn retry(instance: Arc<Guarded<VirtualMachineInstance>>, error: &Error, _: Arc<Context>) -> Action {
    let cause = match error {
        Error::Api(kube::Error::Api(status)) => Some(status.message.clone()),
        error => std::error::Error::source(error).map(ToString::to_string),
    };
    warn!(instance = instance.name_any(), %error, cause, "Can't keep an instance");
    Action::requeue(RETRY)
}

async fn reconcile(
    instance: Arc<Guarded<VirtualMachineInstance>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let stand_in;
    let instance = match &instance.0 {
        Ok(instance) => instance,
        Err(unreadable) => {
            context.shared.tell_unreadable(&*instance, unreadable).await;
            if unreadable.metadata.deletion_timestamp.is_none() {
                return Ok(Action::await_change());
            }
            // Of one that goes no more than its metadata has to be known.
            stand_in = VirtualMachineInstance {
                metadata: unreadable.metadata.clone(),
                ..VirtualMachineInstance::default()
            };
            &stand_in
        }
    };
    let keeper = Keeper::new(instance, &context)?;
    match keeper.keep().await {
        // It was changed meanwhile, of which the watch tells.
        Err(Error::Api(kube::Error::Api(status))) if status.code == 409 => {
            Ok(Action::await_change())
        }
        outcome => outcome,
    }
}

/// Keeps one instance.
struct Keeper<'a> {
    instance: &'a VirtualMachineInstance,
    context: &'a Context,
    instances: Api<VirtualMachineInstance>,
    pods: Api<Pod>,
    namespace: String,
    now: Time,
}

impl<'a> Keeper<'a> {
    fn new(instance: &'a VirtualMachineInstance, context: &'a Context) -> Result<Self, Error> {
        let namespace = instance.namespace().ok_or(Error::Incomplete("namespace"))?;
        let client = &context.shared.client;
        Ok(Self {
            instance,
            context,
            instances: Api::namespaced(client.clone(), &namespace),
            pods: Api::namespaced(client.clone(), &namespace),
            namespace,
            now: Time(Timestamp::now()),
        })
    }

    fn name(&self) -> String {
        self.instance.name_any()
    }

    /// What its pod tells of it, with defaults that nobody has written yet.
    fn status(&self, pod: Option<&Pod>) -> InstanceStatus {
        let mut instance = self.instance.clone();
        edgevmm_kubevirt::defaults::fill(&mut instance.spec);
        status::of_instance(&instance, pod, &self.now)
    }

    fn phase(&self) -> Option<Phase> {
        self.instance
            .status
            .as_ref()
            .and_then(|status| status.phase)
    }

    /// Whether nothing has come of it yet, as far as anybody has noted.
    fn is_new(&self) -> bool {
        matches!(self.phase(), None | Some(Phase::Pending))
    }

    async fn keep(&self) -> Result<Action, Error> {
        let kept = self
            .instance
            .finalizers()
            .iter()
            .any(|name| name == FINALIZER);
        if self.instance.metadata.deletion_timestamp.is_some() {
            if kept {
                self.end(self.pod().await?).await?;
            }
            return Ok(Action::await_change());
        }
        if !kept && !self.phase().is_some_and(Phase::is_final) {
            self.begin().await?;
            return Ok(Action::await_change());
        }
        let pod = self.pod().await?;
        if pod.is_none() && self.is_new() {
            return self.create().await;
        }
        let status = self.status(pod.as_deref());
        if let Some(pod) = &pod {
            self.open(pod, &status).await?;
        }
        self.write(&status).await?;
        Ok(Action::await_change())
    }

    /// The instance's pod. What the watch has not told of yet may be there. Labels are anybody's to
    /// write, so it is known by its name and its owner.
    async fn pod(&self) -> Result<Option<Arc<Pod>>, Error> {
        let name = pod::name(self.instance);
        let uid = self.instance.uid().ok_or(Error::Incomplete("UID"))?;
        let ours = |pod: &Pod| {
            pod.metadata.name.as_ref() == Some(&name)
                && pod.metadata.namespace.as_ref() == Some(&self.namespace)
                && pod.owner_references().iter().any(|owner| owner.uid == uid)
        };
        if let Some(pod) = self.context.pods.find(ours) {
            return Ok(Some(pod));
        }
        let leaves = self.instance.metadata.deletion_timestamp.is_some();
        let is_over = self.phase().is_some_and(Phase::is_final);
        // Of a new one the making of its pod tells whether there is one.
        if !leaves && (is_over || self.is_new()) {
            return Ok(None);
        }
        let pod = self.pods.get_opt(&name).await?;
        Ok(pod.filter(ours).map(Arc::new))
    }

    /// Has the instance stay until its pod is gone.
    async fn begin(&self) -> Result<(), Error> {
        let mut finalizers = self.instance.finalizers().to_vec();
        finalizers.push(FINALIZER.to_owned());
        let patch = json!({"metadata": {"finalizers": finalizers}});
        self.patch(patch).await
    }

    /// Makes the pod, or tells why there is none.
    async fn create(&self) -> Result<Action, Error> {
        let mut status = self.status(None);
        let (reason, message, action) = match self.try_create().await? {
            Made::Pod(name, spec) => {
                conditions::remove(&mut status.conditions, SYNCHRONIZED);
                status::enter(&mut status, Phase::Scheduling, &self.now);
                let filled = serde_json::to_value(&*spec)?;
                let filled = patch::merge(&serde_json::to_value(&self.instance.spec)?, &filled);
                let changes = json!({"spec": filled, "status": self.changes(&status)?});
                self.patch(changes).await?;
                let note = format!("Created virtual machine pod {name}");
                self.tell(EventType::Normal, "SuccessfulCreate", note).await;
                return Ok(Action::await_change());
            }
            Made::Refused(problems) => ("FailedCreate", problems, Action::await_change()),
            Made::Waits(error) => (
                "FailedPvcNotFound",
                error.to_string(),
                Action::await_change(),
            ),
            Made::Later(message) => ("FailedCreate", message, Action::requeue(RETRY)),
        };
        status::fail(&mut status, reason, &message, &self.now);
        if self.write(&status).await? {
            self.tell(EventType::Warning, reason, message).await;
        }
        Ok(action)
    }

    async fn try_create(&self) -> Result<Made, Error> {
        // The watch has only the fields that we know; those that we don't are what is to be refused.
        let resource = ApiResource::erase::<VirtualMachineInstance>(&());
        let whole: Api<DynamicObject> = Api::namespaced_with(
            self.context.shared.client.clone(),
            &self.namespace,
            &resource,
        );
        let whole = whole.get(&self.name()).await?;
        let spec = whole.data.get("spec").cloned().unwrap_or_default();
        let spec = match checks::instance(&spec) {
            Ok(spec) => spec,
            Err(problems) => return Ok(Made::Refused(checks::summary(&problems))),
        };
        let mut instance = self.instance.clone();
        instance.spec = spec;
        edgevmm_kubevirt::defaults::fill(&mut instance.spec);
        let claims = self.claims(&instance).await?;
        let pod = match pod::of_instance(&instance, &claims, &self.context.shared.image) {
            Ok(pod) => pod,
            Err(error @ PodError::NoClaim(_)) => return Ok(Made::Waits(error)),
            Err(PodError::NoIdentity(what)) => return Err(Error::Incomplete(what)),
        };
        match self.pods.create(&PostParams::default(), &pod).await {
            Ok(_) => Ok(Made::Pod(pod.name_any(), Box::new(instance.spec))),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                Ok(Made::Pod(pod.name_any(), Box::new(instance.spec)))
            }
            // Quotas, admission: what the cluster says is for the user.
            Err(kube::Error::Api(status)) if status.code < 500 => Ok(Made::Later(status.message)),
            Err(error) => Err(error.into()),
        }
    }

    async fn claims(&self, instance: &VirtualMachineInstance) -> Result<Claims, Error> {
        let api: Api<PersistentVolumeClaim> =
            Api::namespaced(self.context.shared.client.clone(), &self.namespace);
        let mut claims = Claims::new();
        for name in pod::claims_of(&instance.spec) {
            if let Some(claim) = api.get_opt(name).await? {
                claims.insert(name.to_owned(), facts(&claim));
            }
        }
        Ok(claims)
    }

    /// Ends the pod, and lets the instance go when it is gone.
    async fn end(&self, pod: Option<Arc<Pod>>) -> Result<(), Error> {
        let status = self.status(pod.as_deref());
        let Some(pod) = pod else {
            self.write(&status).await?;
            let finalizers = self.instance.finalizers().iter();
            let finalizers: Vec<_> = finalizers.filter(|name| *name != FINALIZER).collect();
            return self
                .patch(json!({"metadata": {"finalizers": finalizers}}))
                .await;
        };
        let begins = pod.metadata.deletion_timestamp.is_none();
        let seconds = pod::grace_period(&self.instance.spec);
        // It may have been shortened meanwhile.
        let given = pod.metadata.deletion_grace_period_seconds;
        let hurries = given.is_some_and(|given| seconds < given);
        if begins {
            let note = "Signaled graceful shutdown";
            self.tell(EventType::Normal, "ShuttingDown", note).await;
        }
        if begins || hurries {
            let params = DeleteParams {
                grace_period_seconds: seconds.try_into().ok(),
                ..DeleteParams::default()
            };
            match self.pods.delete(&pod.name_any(), &params).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => drop(other?),
            }
        }
        self.write(&status).await?;
        Ok(())
    }

    /// Tells services whether the machine of a pod that runs is paused.
    async fn open(&self, pod: &Pod, status: &InstanceStatus) -> Result<(), Error> {
        let paused = conditions::holds(&status.conditions, PAUSED);
        let wanted = if paused { "False" } else { "True" };
        let told = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_ref());
        let told = told.and_then(|all| all.iter().find(|one| one.type_ == pod::UNPAUSED));
        if status.phase != Some(Phase::Running) || told.is_some_and(|told| told.status == wanted) {
            return Ok(());
        }
        let condition = json!({
            "type": pod::UNPAUSED,
            "status": wanted,
            "reason": if paused { "Paused" } else { "NotPaused" },
            "lastTransitionTime": self.now,
        });
        let patch = json!({"status": {"conditions": [condition]}});
        let params = PatchParams::default();
        self.pods
            .patch_status(&pod.name_any(), &params, &Patch::Strategic(patch))
            .await?;
        Ok(())
    }

    /// Writes the status if it is another one, and tells what happened. Returns whether it was.
    async fn write(&self, status: &InstanceStatus) -> Result<bool, Error> {
        let changes = self.changes(status)?;
        if changes == json!({}) {
            return Ok(false);
        }
        self.patch(json!({"status": changes})).await?;
        if status.phase != self.phase() {
            self.tell_phase(status.phase).await;
        }
        Ok(true)
    }

    /// What `status` changes.
    fn changes(&self, status: &InstanceStatus) -> Result<Value, Error> {
        let old = serde_json::to_value(self.instance.status.clone().unwrap_or_default())?;
        Ok(patch::merge(&old, &serde_json::to_value(status)?))
    }

    async fn tell_phase(&self, phase: Option<Phase>) {
        let (kind, reason, note) = match phase {
            Some(Phase::Running) => (
                EventType::Normal,
                "Started",
                "VirtualMachineInstance started.",
            ),
            Some(Phase::Succeeded) => (
                EventType::Normal,
                "Stopped",
                "The VirtualMachineInstance was shut down.",
            ),
            Some(Phase::Failed) => (
                EventType::Warning,
                "Stopped",
                "The VirtualMachineInstance crashed.",
            ),
            _ => return,
        };
        if phase == Some(Phase::Running) {
            self.tell(
                EventType::Normal,
                "Created",
                "VirtualMachineInstance defined.",
            )
            .await;
        }
        self.tell(kind, reason, note).await;
    }

    async fn tell(&self, kind: EventType, reason: &str, note: impl Into<String>) {
        self.context
            .shared
            .tell(self.instance, kind, reason, note)
            .await;
    }

    async fn patch(&self, change: Value) -> Result<(), Error> {
        let change = patch::of_version(change, self.instance.resource_version().as_deref());
        let params = PatchParams::default();
        self.instances
            .patch_metadata(&self.name(), &params, &Patch::Merge(change))
            .await?;
        Ok(())
    }
}

/// What became of making a pod.
enum Made {
    /// It is there, of that name, for an instance with all its defaults.
    Pod(String, Box<InstanceSpec>),
    /// It never will: the instance asks for what can't be had.
    Refused(String),
    /// It will when a claim is there.
    Waits(PodError),
    /// The cluster refused it; later it may not.
    Later(String),
}

fn facts(claim: &PersistentVolumeClaim) -> Claim {
    let spec = claim.spec.as_ref();
    let has = claim
        .status
        .as_ref()
        .and_then(|status| status.capacity.as_ref());
    let asked = spec.and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
    let size = has
        .or(asked)
        .and_then(|amounts| units(amounts.get("storage")?));
    Claim {
        block: spec.and_then(|spec| spec.volume_mode.as_deref()) == Some("Block"),
        size: size.unwrap_or(0),
    }
}
