//! What a start makes of a machine.

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::TypeMeta;
use kube::core::{DynamicObject, ObjectMeta};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{FINALIZER, GENERATION};
use crate::api::{VirtualMachine, VirtualMachineInstance};
use crate::pod::FINALIZER as INSTANCE_FINALIZER;

/// Namespace of the UUIDs that machines without one have by their names, as KubeVirt makes them.
const UUIDS: Uuid = Uuid::from_u128(0x6a1a_24a1_4061_4607_8bf4_a396_3d0c_5895);

/// What a start makes.
#[derive(Debug, Clone)]
pub struct Start {
    /// The template as it is now.
    pub revision: ControllerRevision,
    /// The instance.
    pub instance: DynamicObject,
}

/// The name of what keeps a machine's template as it was at the start of `generation`.
fn revision_name(uid: &str, generation: i64) -> String {
    format!("{}{generation}", revision_prefix(uid))
}

/// Whether a name is that of what keeps a template of the machine with that UID. What an instance's
/// status tells may have been written by anybody.
#[must_use]
pub fn is_revision(name: &str, uid: &str) -> bool {
    let generation = name.strip_prefix(&revision_prefix(uid));
    generation.is_some_and(|generation| generation.parse::<u64>().is_ok())
}

fn revision_prefix(uid: &str) -> String {
    format!("revision-start-vm-{uid}-")
}

/// What a start of `machine` makes. It is as the cluster gave it, so that fields that are not known
/// here get to the instance as well, where they are refused by name. None when it is no machine.
#[must_use]
pub fn start(machine: &DynamicObject, paused: bool) -> Option<Start> {
    let name = machine.metadata.name.clone()?;
    let uid = machine.uid()?;
    let generation = machine.metadata.generation.unwrap_or_default();
    let owner = OwnerReference {
        api_version: VirtualMachine::api_version(&()).into_owned(),
        kind: VirtualMachine::kind(&()).into_owned(),
        name: name.clone(),
        uid: uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    let revision = ControllerRevision {
        metadata: ObjectMeta {
            name: Some(revision_name(&uid, generation)),
            namespace: machine.namespace(),
            owner_references: Some(vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        data: Some(k8s_openapi::apimachinery::pkg::runtime::RawExtension(
            json!({ "spec": machine.data.get("spec")? }),
        )),
        revision: generation,
    };
    let template = machine.data.pointer("/spec/template")?;
    let meta: ObjectMeta = template
        .get("metadata")
        .and_then(|meta| serde_json::from_value(meta.clone()).ok())
        .unwrap_or_default();
    let mut annotations = meta.annotations.unwrap_or_default();
    annotations.insert(GENERATION.to_owned(), generation.to_string());
    let mut spec = template.get("spec")?.clone();
    complete(&mut spec, &name, paused);
    let instance = DynamicObject {
        types: Some(TypeMeta {
            api_version: VirtualMachineInstance::api_version(&()).into_owned(),
            kind: VirtualMachineInstance::kind(&()).into_owned(),
        }),
        metadata: ObjectMeta {
            name: Some(name),
            namespace: machine.namespace(),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![owner]),
            finalizers: Some(vec![FINALIZER.to_owned(), INSTANCE_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        data: json!({
            "spec": spec,
            "status": { "virtualMachineRevisionName": revision.metadata.name },
        }),
    };
    Some(Start { revision, instance })
}

/// Sets what stays the same from start to start, and how this one begins.
fn complete(spec: &mut Value, name: &str, paused: bool) {
    let Value::Object(fields) = spec else { return };
    if paused {
        fields.insert("startStrategy".to_owned(), "Paused".into());
    }
    let domain = fields.entry("domain").or_insert_with(|| json!({}));
    let Value::Object(domain) = domain else {
        return;
    };
    let firmware = domain.entry("firmware").or_insert_with(|| json!({}));
    let Value::Object(firmware) = firmware else {
        return;
    };
    let given = firmware
        .get("uuid")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if given.is_empty() {
        let uuid = Uuid::new_v5(&UUIDS, name.as_bytes());
        firmware.insert("uuid".to_owned(), uuid.to_string().into());
    }
}
