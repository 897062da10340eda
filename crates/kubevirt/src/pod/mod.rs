//! The pod that runs an instance: its runtime class is edgevmm, and annotations `edgevmm.io/*` tell
//! that runtime what a pod's specification has no field for.

mod disks;
mod entries;
mod guest;
mod probes;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, LocalObjectReference, Pod, PodReadinessGate, PodSpec,
    ResourceRequirements, Volume, VolumeDevice, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use uuid::Uuid;

use crate::api::network::Port;
use crate::api::{InstanceSpec, VirtualMachineInstance};

pub use disks::{Claim, Claims, claims_of};
pub(crate) use entries::{Way, in_order, serial};

/// The container that is the machine.
pub const CONTAINER: &str = "compute";
/// The class of runtime that makes machines of containers.
pub const RUNTIME_CLASS: &str = "edgevmm";
/// Says of a pod whether its machine is not paused; only then services lead to it.
pub const UNPAUSED: &str = "kubevirt.io/virtual-machine-unpaused";
/// Label with the UID of the instance that a pod is of.
pub const CREATED_BY: &str = "kubevirt.io/created-by";
/// Label with the instance's name, by which services find its pod.
pub const NAME_LABEL: &str = "vmi.kubevirt.io/id";
/// Keeps an instance until its pod is gone.
pub const FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";
/// Annotation with the instance's name.
pub const DOMAIN: &str = "kubevirt.io/domain";
/// Annotations that stay with who wrote them.
const NOT_COPIED: &str = "kubectl.kubernetes.io/";
/// Seconds for shutting down when nothing is said.
const GRACE_PERIOD: i64 = 30;
/// Longest value of a label.
const MAX_LABEL: usize = 63;
/// How much of an instance's name its pod's has.
const MAX_NAME: usize = 200;

/// Why there is no pod yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodError {
    /// A claim is not there.
    #[error("There is no claim `{0}` in the namespace")]
    NoClaim(String),
    /// The object came without what the API server gives each.
    #[error("The instance has no {0}")]
    NoIdentity(&'static str),
}

/// What the pod's container gets of each part of an instance.
#[derive(Debug, Default)]
struct Parts {
    image: Option<(String, Option<String>, Option<String>)>,
    annotations: BTreeMap<String, String>,
    volumes: Vec<Volume>,
    mounts: Vec<VolumeMount>,
    devices: Vec<VolumeDevice>,
}

impl Parts {
    fn annotate(&mut self, name: &str, value: impl Into<String>) {
        self.annotations
            .insert(format!("edgevmm.io/{name}"), value.into());
    }
}

/// The pod of an instance that [`crate::checks`] accepts. `image` is what pods are made of whose
/// instance names no image.
///
/// # Errors
/// What it needs is not there.
pub fn of_instance(
    instance: &VirtualMachineInstance,
    claims: &Claims,
    image: &str,
) -> Result<Pod, PodError> {
    let spec = &instance.spec;
    let mut parts = Parts::default();
    guest::describe(instance, &mut parts)?;
    disks::describe(spec, claims, &mut parts)?;
    let (image, pull_policy, pull_secret) = parts
        .image
        .take()
        .unwrap_or_else(|| (image.to_owned(), None, None));
    parts.annotate("container", CONTAINER);
    let ports: Vec<_> = spec
        .domain
        .devices
        .interfaces
        .iter()
        .flat_map(|interface| &interface.ports)
        .map(port)
        .collect();
    let container = Container {
        name: CONTAINER.to_owned(),
        image: Some(image),
        image_pull_policy: pull_policy,
        // Not run: the runtime boots the machine. The kubelet refuses images that say nothing, as
        // those with a disk do, when nothing is said here.
        command: Some(vec!["boot".to_owned()]),
        ports: filled(ports),
        resources: Some(resources(instance)),
        volume_mounts: filled(parts.mounts),
        volume_devices: filled(parts.devices),
        readiness_probe: spec.readiness_probe.as_ref().map(probes::probe),
        liveness_probe: spec.liveness_probe.as_ref().map(probes::probe),
        ..Container::default()
    };
    let name = instance.name_any();
    Ok(Pod {
        metadata: metadata(instance, parts.annotations)?,
        spec: Some(PodSpec {
            runtime_class_name: Some(RUNTIME_CLASS.to_owned()),
            restart_policy: Some("Never".to_owned()),
            containers: vec![container],
            volumes: filled(parts.volumes),
            image_pull_secrets: pull_secret.map(|name| vec![LocalObjectReference { name }]),
            enable_service_links: Some(false),
            automount_service_account_token: Some(false),
            service_account_name: service_account(instance),
            termination_grace_period_seconds: Some(grace_period(spec)),
            hostname: Some(spec.hostname.clone().unwrap_or_else(|| host_name(&name))),
            subdomain: spec.subdomain.clone(),
            dns_policy: spec.dns_policy.clone(),
            dns_config: spec.dns_config.clone(),
            node_selector: spec.node_selector.clone(),
            affinity: spec.affinity.clone(),
            tolerations: filled(spec.tolerations.clone()),
            topology_spread_constraints: filled(spec.topology_spread_constraints.clone()),
            priority_class_name: spec.priority_class_name.clone(),
            scheduler_name: spec.scheduler_name.clone(),
            readiness_gates: Some(vec![PodReadinessGate {
                condition_type: UNPAUSED.to_owned(),
            }]),
            ..PodSpec::default()
        }),
        ..Pod::default()
    })
}

/// The name of an instance's pod. It follows from the instance, so that none gets two.
#[must_use]
pub fn name(instance: &VirtualMachineInstance) -> String {
    let name: String = instance.name_any().chars().take(MAX_NAME).collect();
    let uid = instance.uid().unwrap_or_default();
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, uid.as_bytes())
        .simple()
        .to_string();
    let hash: String = hash.chars().take(5).collect();
    format!("virt-launcher-{}-{hash}", name.trim_end_matches(['-', '.']))
}

/// Seconds that a machine has for shutting down. Never none: with none a cluster forgets the pod at once,
/// and the next machine would start while this one still writes to its disks.
#[must_use]
pub fn grace_period(spec: &InstanceSpec) -> i64 {
    spec.termination_grace_period_seconds
        .unwrap_or(GRACE_PERIOD)
        .max(1)
}

fn filled<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// What an instance is called up to the first dot, as a guest's name has none.
fn host_name(name: &str) -> String {
    let label = name.split('.').next().unwrap_or(name);
    label
        .chars()
        .take(MAX_LABEL)
        .collect::<String>()
        .trim_end_matches('-')
        .to_owned()
}

fn service_account(instance: &VirtualMachineInstance) -> Option<String> {
    let named = |volume: &crate::api::disks::Volume| {
        volume
            .service_account
            .as_ref()?
            .service_account_name
            .clone()
    };
    let of_volume = instance.spec.volumes.iter().find_map(named);
    of_volume.or_else(|| instance.spec.service_account_name.clone())
}

fn port(port: &Port) -> ContainerPort {
    ContainerPort {
        container_port: port.port.into(),
        name: port.name.clone(),
        protocol: port
            .protocol
            .clone()
            .filter(|protocol| !protocol.is_empty()),
        ..ContainerPort::default()
    }
}

fn metadata(
    instance: &VirtualMachineInstance,
    of_runtime: BTreeMap<String, String>,
) -> Result<ObjectMeta, PodError> {
    let name = instance.name_any();
    let uid = instance.uid().ok_or(PodError::NoIdentity("UID"))?;
    let mut labels = instance.labels().clone();
    let owner = instance
        .controller_owner_ref(&())
        .ok_or(PodError::NoIdentity("UID"))?;
    let label: String = name.chars().take(MAX_LABEL).collect();
    labels.insert("kubevirt.io".to_owned(), "virt-launcher".to_owned());
    labels.insert(CREATED_BY.to_owned(), uid);
    labels.insert(
        NAME_LABEL.to_owned(),
        label.trim_end_matches(['-', '.', '_']).to_owned(),
    );
    let copied = instance.annotations().iter();
    // Ours say what the instance does; one that a user wrote would say something else.
    let copied =
        copied.filter(|(key, _)| !key.starts_with(NOT_COPIED) && !key.starts_with("edgevmm.io/"));
    let mut annotations: BTreeMap<_, _> = copied
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    annotations.insert(DOMAIN.to_owned(), name.clone());
    annotations.insert(
        "kubectl.kubernetes.io/default-container".to_owned(),
        CONTAINER.to_owned(),
    );
    annotations.extend(of_runtime);
    Ok(ObjectMeta {
        name: Some(self::name(instance)),
        namespace: instance.namespace(),
        labels: Some(labels),
        annotations: Some(annotations),
        owner_references: Some(vec![OwnerReference {
            block_owner_deletion: Some(true),
            ..owner
        }]),
        ..ObjectMeta::default()
    })
}

/// What the pod asks for: memory as large as the guest's, to which the runtime class adds what the
/// machine needs beside it, and a tenth of a processor for each vCPU.
fn resources(instance: &VirtualMachineInstance) -> ResourceRequirements {
    let domain = &instance.spec.domain;
    let mut requests = domain.resources.requests.clone().unwrap_or_default();
    let guest = crate::shape::guest_memory(domain).unwrap_or(0);
    requests
        .entry("memory".to_owned())
        .or_insert_with(|| Quantity(guest.to_string()));
    let vcpus = crate::shape::topology(domain).vcpus();
    requests
        .entry("cpu".to_owned())
        .or_insert_with(|| Quantity(format!("{}m", u64::from(vcpus) * 100)));
    let mut limits = domain.resources.limits.clone().unwrap_or_default();
    if let Some(limit) = limits.get_mut("memory") {
        // The container's limit counts the machine's own memory as well.
        let bytes = crate::quantity::units(limit).unwrap_or(0);
        *limit = Quantity(bytes.saturating_add(guest::overhead(bytes)).to_string());
    }
    if let (Some(limit), Some(request)) = (limits.get("cpu").cloned(), requests.get_mut("cpu")) {
        let parts = |quantity: &Quantity| crate::quantity::thousandths(&quantity.0);
        if parts(request) > parts(&limit) {
            *request = limit;
        }
    }
    ResourceRequirements {
        requests: Some(requests),
        limits: (!limits.is_empty()).then_some(limits),
        ..ResourceRequirements::default()
    }
}
