//! Starts and stops the instances of VirtualMachines, and tells in their status what becomes of them.

use std::sync::Arc;
use std::time::Duration;

use edgevmm_kubevirt::api::machine::Template;
use edgevmm_kubevirt::api::{MachineStatus, VirtualMachine, VirtualMachineInstance};
use edgevmm_kubevirt::checks;
use edgevmm_kubevirt::guarded::{Guarded, Unreadable};
use edgevmm_kubevirt::machine::{self, Finalizer};
use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use kube::runtime::reflector::Store;
use kube::runtime::{Controller, WatchStreamExt, reflector, watcher};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};
use tracing::{debug, warn};

use super::{Error, RETRY, Shared, patch};

struct Context {
    shared: Shared,
    instances: Store<Guarded<VirtualMachineInstance>>,
}

/// Runs until the process ends.
pub async fn run(shared: Shared) {
    let instances: Api<Guarded<VirtualMachineInstance>> = Api::all(shared.client.clone());
    let (reader, writer) = reflector::store();
    let instances = watcher(instances, super::watched())
        .backoff(super::Patience::default())
        .reflect(writer)
        .touched_objects();
    let machines: Api<Guarded<VirtualMachine>> = Api::all(shared.client.clone());
    let context = Arc::new(Context {
        shared,
        instances: reader,
    });
    let (store, writer) = reflector::store();
    let machines = watcher(machines, super::watched())
        .backoff(super::Patience::default())
        .reflect(writer)
        .applied_objects();
    Controller::for_stream(machines, store)
        .with_config(super::pace())
        .trigger_backoff(super::NoWait)
        .owns_stream(instances)
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

#[allow(clippy::needless_pass_by_value, reason = "as kube calls it")]
fn retry(machine: Arc<Guarded<VirtualMachine>>, error: &Error, _: Arc<Context>) -> Action {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    warn!(machine = machine.name_any(), %error, cause, "Can't keep a machine");
    Action::requeue(RETRY)
}

async fn reconcile(
    machine: Arc<Guarded<VirtualMachine>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let stand_in;
    let machine = match &machine.0 {
        Ok(machine) => machine,
        Err(unreadable) => {
            context.shared.tell_unreadable(&*machine, unreadable).await;
            if unreadable.metadata.deletion_timestamp.is_none() {
                return Ok(Action::await_change());
            }
            // Of one that goes no more than its metadata has to be known.
            stand_in = VirtualMachine {
                metadata: unreadable.metadata.clone(),
                ..VirtualMachine::default()
            };
            &stand_in
        }
    };
    let keeper = Keeper::new(machine, &context)?;
    match keeper.keep().await {
        // It or its instance was changed or is gone meanwhile, of which the watch tells.
        Err(Error::Api(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
            Ok(Action::await_change())
        }
        outcome => outcome,
    }
}

/// Keeps one machine.
struct Keeper<'a> {
    machine: &'a VirtualMachine,
    context: &'a Context,
    machines: Api<PartialObjectMeta<VirtualMachine>>,
    instances: Api<VirtualMachineInstance>,
    revisions: Api<ControllerRevision>,
    namespace: String,
    now: Time,
}

impl<'a> Keeper<'a> {
    fn new(machine: &'a VirtualMachine, context: &'a Context) -> Result<Self, Error> {
        let namespace = machine.namespace().ok_or(Error::Incomplete("namespace"))?;
        let client = &context.shared.client;
        Ok(Self {
            machine,
            context,
            machines: Api::namespaced(client.clone(), &namespace),
            instances: Api::namespaced(client.clone(), &namespace),
            revisions: Api::namespaced(client.clone(), &namespace),
            namespace,
            now: Time(Timestamp::now()),
        })
    }

    async fn keep(&self) -> Result<Action, Error> {
        let instance = self.instance().await?;
        let instance = match instance.as_deref().map(|guarded| &guarded.0) {
            Some(Err(unreadable)) => return self.with_unreadable(unreadable).await,
            Some(Ok(instance)) => Some(instance),
            None => None,
        };
        let started_with = match instance {
            Some(instance) if !machine::is_of_generation(self.machine, instance) => {
                self.template_of(instance).await?
            }
            _ => None,
        };
        let mut plan = machine::decide(self.machine, instance, started_with.as_ref(), &self.now);
        if plan.finalizer == Some(Finalizer::Add) {
            let mut finalizers = self.machine.finalizers().to_vec();
            finalizers.push(machine::FINALIZER.to_owned());
            self.patch(json!({ "metadata": { "finalizers": finalizers } }))
                .await?;
            return Ok(Action::await_change());
        }
        if let Some(strategy) = plan.strategy {
            let spec = match self.machine.spec.running {
                Some(_) => json!({ "running": true }),
                None => json!({ "runStrategy": strategy }),
            };
            self.patch(json!({ "spec": spec })).await?;
            return Ok(Action::await_change());
        }
        let mut old = self.machine.status.clone().unwrap_or_default();
        let mut version = self.machine.resource_version();
        // What an instance that goes was the only one to tell, like how often it failed, is noted before.
        // A start is noted after, as nobody else would remember that it was asked for.
        let goes = |action: &_| !matches!(action, machine::Action::Create { .. });
        if plan.action.as_ref().is_some_and(goes) {
            self.write(&old, &plan.status, version.as_deref()).await?;
            (old, version) = (plan.status.clone(), None);
        }
        if let Some(action) = &plan.action {
            let later = self.act(action, instance, &mut plan.status).await?;
            plan.look_again = later.or(plan.look_again);
        }
        if plan.finalizer == Some(Finalizer::Remove) {
            self.let_go().await?;
            let finalizers = without(self.machine, machine::FINALIZER);
            self.patch(json!({ "metadata": { "finalizers": finalizers } }))
                .await?;
            return Ok(Action::await_change());
        }
        self.write(&old, &plan.status, version.as_deref()).await?;
        Ok(plan
            .look_again
            .map_or_else(Action::await_change, Action::requeue))
    }

    /// The machine's instance. What the watch has not told of yet may be there, and is asked for where
    /// taking it for gone would lose something.
    async fn instance(&self) -> Result<Option<Arc<Guarded<VirtualMachineInstance>>>, Error> {
        let name = self.machine.name_any();
        let known = self.context.instances.find(|instance| {
            instance.name_any() == name && instance.namespace().as_ref() == Some(&self.namespace)
        });
        if let Some(instance) = known {
            return Ok(self.owns(&*instance).then_some(instance));
        }
        let status = self.machine.status.as_ref();
        let matters = self.machine.metadata.deletion_timestamp.is_some()
            || status.is_some_and(|status| {
                status.created == Some(true) || !status.state_change_requests.is_empty()
            });
        if !matters {
            return Ok(None);
        }
        let client = self.context.shared.client.clone();
        let instances: Api<Guarded<VirtualMachineInstance>> =
            Api::namespaced(client, &self.namespace);
        let instance = instances.get_opt(&name).await?;
        Ok(instance
            .filter(|instance| self.owns(instance))
            .map(Arc::new))
    }

    /// The machine has an instance that can't be read, which is let go only.
    async fn with_unreadable(&self, unreadable: &Unreadable) -> Result<Action, Error> {
        let stand_in = VirtualMachineInstance {
            metadata: unreadable.metadata.clone(),
            ..VirtualMachineInstance::default()
        };
        if stand_in.metadata.deletion_timestamp.is_some() {
            if stand_in
                .finalizers()
                .iter()
                .any(|it| it == machine::FINALIZER)
            {
                self.release(&stand_in).await?;
            }
        } else if self.machine.metadata.deletion_timestamp.is_some() {
            self.delete(&stand_in).await?;
        } else {
            let note = format!("Its instance can't be read: {unreadable}");
            self.tell(EventType::Warning, "Unreadable", note).await;
        }
        Ok(Action::await_change())
    }

    fn owns(&self, object: &impl Resource) -> bool {
        let uid = self.machine.uid();
        let mut owners = object.meta().owner_references.iter().flatten();
        owners.any(|owner| owner.controller == Some(true) && Some(&owner.uid) == uid.as_ref())
    }

    /// What an instance was made of.
    async fn template_of(
        &self,
        instance: &VirtualMachineInstance,
    ) -> Result<Option<Template>, Error> {
        let status = instance.status.as_ref();
        let uid = self.machine.uid().unwrap_or_default();
        let name = status.and_then(|it| it.virtual_machine_revision_name.as_deref());
        let Some(name) = name.filter(|name| machine::is_revision(name, &uid)) else {
            return Ok(None);
        };
        let revision = self.revisions.get_opt(name).await?;
        let data = revision.filter(|it| self.owns(it)).and_then(|it| it.data);
        let template = data.and_then(|data| data.0.pointer("/spec/template").cloned());
        Ok(template.map(serde_json::from_value).transpose()?)
    }

    /// Does what is to be done; gives when to try again, if it can't be and no watch will tell.
    async fn act(
        &self,
        action: &machine::Action,
        instance: Option<&VirtualMachineInstance>,
        status: &mut MachineStatus,
    ) -> Result<Option<Duration>, Error> {
        match (action, instance) {
            (machine::Action::Create { paused }, _) => return self.create(*paused, status).await,
            (machine::Action::Delete, Some(instance)) => self.delete(instance).await,
            (machine::Action::Release, Some(instance)) => self.release(instance).await,
            (machine::Action::Orphan, Some(instance)) => {
                self.forget(instance).await?;
                let uid = self.machine.uid();
                let owners = instance.owner_references().iter();
                let owners: Vec<_> = owners.filter(|it| Some(&it.uid) != uid.as_ref()).collect();
                let finalizers = without(instance, machine::FINALIZER);
                let change = json!({ "ownerReferences": owners, "finalizers": finalizers });
                self.patch_instance(instance, json!({ "metadata": change }))
                    .await
            }
            (machine::Action::Annotate(generation), Some(instance)) => {
                let change = json!({ machine::GENERATION: generation.to_string() });
                let change = json!({ "metadata": { "annotations": change } });
                self.patch_instance(instance, change).await
            }
            (_, None) => Ok(()),
        }
        .map(|()| None)
    }

    async fn create(
        &self,
        paused: bool,
        status: &mut MachineStatus,
    ) -> Result<Option<Duration>, Error> {
        // The watch has only the fields that we know; the instance gets all.
        let client = self.context.shared.client.clone();
        let resource = ApiResource::erase::<VirtualMachine>(&());
        let whole: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &self.namespace, &resource);
        let whole = whole.get(&self.machine.name_any()).await?;
        if whole.resource_version() != self.machine.resource_version() {
            return Ok(None);
        }
        let spec = whole.data.get("spec").cloned().unwrap_or_default();
        if let Err(problems) = checks::machine(&spec) {
            self.refuse(status, checks::summary(&problems)).await;
            return Ok(None);
        }
        let start = machine::start(&whole, paused).ok_or(Error::Incomplete("template"))?;
        let params = PostParams::default();
        match self.revisions.create(&params, &start.revision).await {
            Err(kube::Error::Api(error)) if error.reason == "AlreadyExists" => {}
            other => drop(other?),
        }
        let resource = ApiResource::erase::<VirtualMachineInstance>(&());
        let instances: Api<DynamicObject> =
            Api::namespaced_with(client, &self.namespace, &resource);
        let name = self.machine.name_any();
        match instances.create(&params, &start.instance).await {
            Ok(_) => {
                let note = format!(
                    "Started the virtual machine by creating the new virtual machine instance {name}"
                );
                self.tell(EventType::Normal, "SuccessfulCreate", note).await;
                status.created = Some(true);
                Ok(None)
            }
            Err(kube::Error::Api(error)) if error.code < 500 => {
                let existing = self.instances.get_opt(&name).await?;
                if !existing.is_some_and(|instance| self.owns(&instance)) {
                    self.refuse(status, error.message).await;
                }
                Ok(Some(RETRY))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Says why there is no instance, and tells of it once.
    async fn refuse(&self, status: &mut MachineStatus, why: String) {
        machine::fail(self.machine, status, "FailedCreate", &why, &self.now);
        let before = self.machine.status.as_ref();
        // The strategy counts as followed once there was an instance.
        status.run_strategy = before.and_then(|before| before.run_strategy);
        let mut told = before.iter().flat_map(|before| &before.conditions);
        if !told.any(|it| it.kind == machine::FAILURE && it.message.as_ref() == Some(&why)) {
            self.tell(EventType::Warning, "FailedCreate", why).await;
        }
    }

    async fn delete(&self, instance: &VirtualMachineInstance) -> Result<(), Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: instance.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let name = instance.name_any();
        self.instances.delete(&name, &params).await?;
        let note =
            format!("Stopped the virtual machine by deleting the virtual machine instance {name}");
        self.tell(EventType::Normal, "SuccessfulDelete", note).await;
        Ok(())
    }

    /// Lets an instance that ended go, with what it was made of.
    async fn release(&self, instance: &VirtualMachineInstance) -> Result<(), Error> {
        self.forget(instance).await?;
        let finalizers = without(instance, machine::FINALIZER);
        let change = json!({ "metadata": { "finalizers": finalizers } });
        self.patch_instance(instance, change).await
    }

    /// Takes our finalizer from an instance that stays when the machine goes: the garbage collector may
    /// have been the first to take the machine from its owners, so that it no longer counts as ours.
    async fn let_go(&self) -> Result<(), Error> {
        let Some(instance) = self.instances.get_opt(&self.machine.name_any()).await? else {
            return Ok(());
        };
        let ours = instance
            .finalizers()
            .iter()
            .any(|it| it == machine::FINALIZER);
        let mut owners = instance.owner_references().iter();
        if !ours || owners.any(|owner| owner.controller == Some(true)) {
            return Ok(());
        }
        self.forget(&instance).await?;
        let finalizers = without(&instance, machine::FINALIZER);
        let change = json!({ "metadata": { "finalizers": finalizers } });
        self.patch_instance(&instance, change).await
    }

    /// Removes what keeps the template that an instance was made of.
    async fn forget(&self, instance: &VirtualMachineInstance) -> Result<(), Error> {
        let status = instance.status.as_ref();
        let revision = status.and_then(|it| it.virtual_machine_revision_name.as_deref());
        let uid = self.machine.uid().unwrap_or_default();
        if let Some(name) = revision.filter(|name| machine::is_revision(name, &uid)) {
            match self.revisions.delete(name, &DeleteParams::default()).await {
                Err(kube::Error::Api(error)) if error.code == 404 => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Writes what differs from `old`, if the machine is still of `version`.
    async fn write(
        &self,
        old: &MachineStatus,
        status: &MachineStatus,
        version: Option<&str>,
    ) -> Result<(), Error> {
        let changes = patch::merge(&serde_json::to_value(old)?, &serde_json::to_value(status)?);
        if changes == json!({}) {
            return Ok(());
        }
        let change = json!({ "status": changes });
        let change = match version {
            Some(version) => patch::of_version(change, Some(version)),
            None => change,
        };
        let name = self.machine.name_any();
        self.machines
            .patch_subresource(
                "status",
                &name,
                &PatchParams::default(),
                &Patch::Merge(change),
            )
            .await?;
        Ok(())
    }

    async fn patch(&self, change: Value) -> Result<(), Error> {
        let change = patch::of_version(change, self.machine.resource_version().as_deref());
        let name = self.machine.name_any();
        self.machines
            .patch_metadata(&name, &PatchParams::default(), &Patch::Merge(change))
            .await?;
        Ok(())
    }

    async fn patch_instance(
        &self,
        instance: &VirtualMachineInstance,
        change: Value,
    ) -> Result<(), Error> {
        let change = patch::of_version(change, instance.resource_version().as_deref());
        let name = instance.name_any();
        self.instances
            .patch_metadata(&name, &PatchParams::default(), &Patch::Merge(change))
            .await?;
        Ok(())
    }

    async fn tell(&self, kind: EventType, reason: &str, note: impl Into<String>) {
        let shared = &self.context.shared;
        shared.tell(self.machine, kind, reason, note).await;
    }
}

fn without<'a>(object: &'a impl ResourceExt, finalizer: &str) -> Vec<&'a String> {
    let finalizers = object.finalizers().iter();
    finalizers.filter(|name| *name != finalizer).collect()
}
