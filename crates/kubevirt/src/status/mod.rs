//! What an instance's pod tells of it: phase, conditions, addresses.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ContainerState, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use crate::api::instance::{InterfaceStatus, MemoryStatus, PhaseTime, VolumeStatus};
use crate::api::{InstanceSpec, InstanceStatus, Phase, VirtualMachineInstance};
use crate::conditions::{remove, set};
use crate::pod::{CONTAINER, Way};
use crate::shape;

/// Condition: services lead to it.
pub const READY: &str = "Ready";
/// Condition, there only while it is false: what was to be done can't be.
pub const SYNCHRONIZED: &str = "Synchronized";
/// Condition: its vCPUs are held.
pub const PAUSED: &str = "Paused";
/// Condition: whether it could move to another node.
pub const LIVE_MIGRATABLE: &str = "LiveMigratable";
/// Condition, there only while it is false: no node takes its pod.
pub const POD_SCHEDULED: &str = "PodScheduled";
/// User that machines run as in KubeVirt's pods, which clients read.
const RUNTIME_USER: u64 = 107;

/// Says that the instance came to a phase, unless it was in it, or in a final one.
pub fn enter(status: &mut InstanceStatus, phase: Phase, now: &Time) {
    if status.phase == Some(phase) || status.phase.is_some_and(Phase::is_final) {
        return;
    }
    status.phase = Some(phase);
    status
        .phase_transition_timestamps
        .retain(|time| time.phase != phase);
    status.phase_transition_timestamps.push(PhaseTime {
        phase,
        phase_transition_timestamp: now.clone(),
    });
}

/// Says why the instance can't be had, while it can't.
pub fn fail(status: &mut InstanceStatus, reason: &str, message: &str, now: &Time) {
    set(
        &mut status.conditions,
        SYNCHRONIZED,
        false,
        reason,
        message,
        now,
    );
    set(
        &mut status.conditions,
        READY,
        false,
        "PodNotExists",
        "",
        now,
    );
}

/// The status of an instance whose pod is `pod`, or that has none yet, or no more.
#[must_use]
pub fn of_instance(
    instance: &VirtualMachineInstance,
    pod: Option<&Pod>,
    now: &Time,
) -> InstanceStatus {
    let mut status = instance.status.clone().unwrap_or_default();
    basics(&instance.spec, &mut status);
    match pod {
        Some(pod) => with_pod(&instance.spec, pod, &mut status, now),
        None => without_pod(instance, &mut status, now),
    }
    status
}

fn basics(spec: &InstanceSpec, status: &mut InstanceStatus) {
    let memory = shape::guest_memory(&spec.domain).map(|bytes| Quantity(bytes.to_string()));
    status.memory = Some(MemoryStatus {
        guest_at_boot: memory.clone(),
        guest_current: memory.clone(),
        guest_requested: memory,
    });
    status.current_cpu_topology = Some(shape::topology(&spec.domain));
    status.machine.clone_from(&spec.domain.machine);
    status.runtime_user = Some(RUNTIME_USER);
    status.guest_os_info.get_or_insert_default();
}

fn without_pod(instance: &VirtualMachineInstance, status: &mut InstanceStatus, now: &Time) {
    let begun = !matches!(status.phase, None | Some(Phase::Pending));
    if begun || instance.metadata.deletion_timestamp.is_some() {
        enter(status, Phase::Failed, now);
    } else {
        enter(status, Phase::Pending, now);
    }
    status.active_pods = None;
    set(
        &mut status.conditions,
        READY,
        false,
        "PodNotExists",
        "virt-launcher pod has not been created",
        now,
    );
}

fn with_pod(spec: &InstanceSpec, pod: &Pod, status: &mut InstanceStatus, now: &Time) {
    let pod_status = pod.status.clone().unwrap_or_default();
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let place = pod.uid().zip(node.clone());
    status.active_pods = place.map(|place| BTreeMap::from([place]));
    status.qos_class = pod_status.qos_class;
    let container = pod.spec.as_ref().and_then(|spec| spec.containers.first());
    status.launcher_container_image_version =
        container.and_then(|container| container.image.clone());
    let containers = pod_status.container_statuses.unwrap_or_default();
    let machine = containers
        .into_iter()
        .find(|container| container.name == CONTAINER);
    let state = machine
        .and_then(|machine| machine.state)
        .unwrap_or_default();
    let phase = pod_status.phase.as_deref().unwrap_or_default();
    move_on(&state, phase, status, now);
    let conditions = pod_status.conditions.unwrap_or_default();
    unschedulable(&conditions, status, now);
    ready(pod, &conditions, status, now);
    if status.phase == Some(Phase::Running) {
        status.node_name = node;
        let addresses: Vec<_> = pod_status
            .pod_ips
            .unwrap_or_default()
            .into_iter()
            .map(|ip| ip.ip)
            .collect();
        status.interfaces = interfaces(spec, &addresses);
        status.volume_status = volumes(spec);
        set(
            &mut status.conditions,
            LIVE_MIGRATABLE,
            false,
            "HypervPassthroughNotLiveMigratable",
            "edgevmm moves no machine to another node",
            now,
        );
    }
}

/// Goes to the phase that the pod's container tells of.
fn move_on(state: &ContainerState, pod_phase: &str, status: &mut InstanceStatus, now: &Time) {
    enter_from(status, Phase::Scheduling, now);
    if let Some(ended) = &state.terminated {
        let phase = if ended.exit_code == 0 {
            Phase::Succeeded
        } else {
            Phase::Failed
        };
        if phase == Phase::Failed && status.reason.is_none() {
            status.reason.clone_from(&ended.reason);
        }
        enter(status, phase, now);
    } else if state.running.is_some() {
        remove(&mut status.conditions, SYNCHRONIZED);
        enter_from(status, Phase::Scheduled, now);
        enter(status, Phase::Running, now);
    } else if pod_phase == "Failed" || pod_phase == "Succeeded" {
        enter(status, Phase::Failed, now);
    } else if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let message = waiting.message.as_deref().unwrap_or_default();
        if reason.is_empty() || matches!(reason, "ContainerCreating" | "PodInitializing") {
            remove(&mut status.conditions, SYNCHRONIZED);
        } else {
            set(
                &mut status.conditions,
                SYNCHRONIZED,
                false,
                reason,
                message,
                now,
            );
        }
    }
}

/// Goes to a phase that only follows earlier ones.
fn enter_from(status: &mut InstanceStatus, phase: Phase, now: &Time) {
    let rank = |phase: Phase| match phase {
        Phase::Pending | Phase::Unknown => 0,
        Phase::Scheduling => 1,
        Phase::Scheduled => 2,
        _ => 3,
    };
    if status.phase.is_none_or(|old| rank(old) < rank(phase)) {
        enter(status, phase, now);
    }
}

fn unschedulable(conditions: &[PodCondition], status: &mut InstanceStatus, now: &Time) {
    let scheduled = conditions
        .iter()
        .find(|condition| condition.type_ == POD_SCHEDULED);
    match scheduled.filter(|condition| condition.status == "False") {
        Some(condition) => {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let (reason, message) = (text(&condition.reason), text(&condition.message));
            set(
                &mut status.conditions,
                POD_SCHEDULED,
                false,
                &reason,
                &message,
                now,
            );
        }
        None => remove(&mut status.conditions, POD_SCHEDULED),
    }
}

fn ready(pod: &Pod, conditions: &[PodCondition], status: &mut InstanceStatus, now: &Time) {
    let of_pod = conditions.iter().find(|condition| condition.type_ == READY);
    let (holds, reason, message) = match of_pod {
        _ if pod.metadata.deletion_timestamp.is_some() => (false, "PodTerminating", ""),
        _ if status.phase != Some(Phase::Running) => (
            false,
            "GuestNotRunning",
            "Guest VM is not reported as running",
        ),
        Some(condition) => (
            condition.status == "True",
            condition.reason.as_deref().unwrap_or_default(),
            condition.message.as_deref().unwrap_or_default(),
        ),
        None => (false, "PodConditionMissing", ""),
    };
    set(&mut status.conditions, READY, holds, reason, message, now);
}

/// The guest's interfaces, that on the pod's network first, as clients read the address of the first.
fn interfaces(spec: &InstanceSpec, addresses: &[String]) -> Vec<InterfaceStatus> {
    let pod = spec.networks.iter().filter(|network| network.pod.is_some());
    let others = spec.networks.iter().filter(|network| network.pod.is_none());
    let of = |network: &crate::api::network::Network| {
        let on_pod = network.pod.is_some();
        let addresses = if on_pod { addresses } else { &[] };
        InterfaceStatus {
            name: Some(network.name.clone()),
            ip_address: addresses.first().cloned(),
            ip_addresses: addresses.to_vec(),
            pod_interface_name: on_pod.then(|| "eth0".to_owned()),
            info_source: Some("domain".to_owned()),
            queue_count: Some(1),
            link_state: Some("up".to_owned()),
            ..InterfaceStatus::default()
        }
    };
    pod.chain(others).map(of).collect()
}

/// Volumes by name, with what a Linux guest calls them: cloud-init's disk comes behind all others.
fn volumes(spec: &InstanceSpec) -> Vec<VolumeStatus> {
    let (mut virtio, mut sata, mut cdroms) = ('a'..='z', 'a'..='z', '0'..='9');
    let mut target = |way| {
        let (prefix, names) = match way {
            Way::Virtio => ("vd", &mut virtio),
            Way::Sata => ("sd", &mut sata),
            Way::CdRom => ("sr", &mut cdroms),
        };
        let name = names.next().map(|name| format!("{prefix}{name}"));
        name.unwrap_or_default()
    };
    let seeds = spec
        .volumes
        .iter()
        .filter(|volume| volume.cloud_init_no_cloud.is_some());
    let seeds = seeds.map(|volume| (volume, Way::Virtio));
    let disks = crate::pod::in_order(spec).into_iter();
    let disks = disks.map(|(volume, disk)| (volume, Way::of(volume, disk)));
    let mut all: Vec<_> = disks
        .chain(seeds)
        .map(|(volume, way)| VolumeStatus {
            name: volume.name.clone(),
            target: target(way),
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}
