//! VirtualMachineInstance: a machine that runs, or ran.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, ExecAction, HTTPGetAction, PodDNSConfig, TCPSocketAction, Toleration,
    TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_with::skip_serializing_none;

use super::disks::Volume;
use super::domain::{Domain, Empty};
use super::network::Network;

/// What a machine is to be.
#[skip_serializing_none]
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    plural = "virtualmachineinstances",
    shortname = "vmi",
    shortname = "vmis",
    category = "all",
    namespaced,
    derive = "Default",
    derive = "PartialEq",
    status = "InstanceStatus",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"IP","type":"string","jsonPath":".status.interfaces[0].ipAddress"}"#,
    printcolumn = r#"{"name":"NodeName","type":"string","jsonPath":".status.nodeName"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Live-Migratable","type":"string","jsonPath":".status.conditions[?(@.type=='LiveMigratable')].status","priority":1}"#,
    printcolumn = r#"{"name":"Paused","type":"string","jsonPath":".status.conditions[?(@.type=='Paused')].status","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
pub struct InstanceSpec {
    /// The machine itself.
    pub domain: Domain,
    /// Networks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
    /// What is behind disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// `amd64`.
    pub architecture: Option<String>,
    /// As of a pod.
    pub node_selector: Option<BTreeMap<String, String>>,
    /// As of a pod.
    pub affinity: Option<Affinity>,
    /// As of a pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// As of a pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
    /// As of a pod.
    pub priority_class_name: Option<String>,
    /// As of a pod.
    pub scheduler_name: Option<String>,
    /// As of a pod.
    pub service_account_name: Option<String>,
    /// What the guest is called; the instance's name when absent.
    pub hostname: Option<String>,
    /// As of a pod.
    pub subdomain: Option<String>,
    /// As of a pod.
    pub dns_policy: Option<String>,
    /// As of a pod.
    pub dns_config: Option<PodDNSConfig>,
    /// Seconds for shutting down; 30 when absent.
    pub termination_grace_period_seconds: Option<i64>,
    /// What an eviction does: `None` and `LiveMigrateIfPossible`, which is the same here.
    pub eviction_strategy: Option<String>,
    /// When services lead to it.
    pub readiness_probe: Option<Probe>,
    /// When it is to be ended.
    pub liveness_probe: Option<Probe>,
}

/// Asks whether a guest is well.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// By a request.
    pub http_get: Option<HTTPGetAction>,
    /// By a connection.
    pub tcp_socket: Option<TCPSocketAction>,
    /// By a program in the guest.
    pub exec: Option<ExecAction>,
    /// By the guest agent.
    pub guest_agent_ping: Option<Empty>,
    /// As of a pod.
    pub initial_delay_seconds: Option<i32>,
    /// As of a pod.
    pub timeout_seconds: Option<i32>,
    /// As of a pod.
    pub period_seconds: Option<i32>,
    /// As of a pod.
    pub success_threshold: Option<i32>,
    /// As of a pod.
    pub failure_threshold: Option<i32>,
}

/// Where a machine is in its life.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display,
)]
pub enum Phase {
    /// Nothing has begun.
    #[default]
    Pending,
    /// There is a pod.
    Scheduling,
    /// The pod is on its node, and its machine made.
    Scheduled,
    /// The guest runs.
    Running,
    /// The guest shut itself down.
    Succeeded,
    /// It ended otherwise.
    Failed,
    /// Not known.
    Unknown,
}

impl Phase {
    /// Whether no other will follow.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// What is known about an instance.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStatus {
    /// Where it is in its life.
    pub phase: Option<Phase>,
    /// When it came to each phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phase_transition_timestamps: Vec<PhaseTime>,
    /// Conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Why it failed, in one word.
    pub reason: Option<String>,
    /// Node that it runs on.
    pub node_name: Option<String>,
    /// Its pods, with their nodes.
    pub active_pods: Option<BTreeMap<String, String>>,
    /// Quality of service of its pod.
    pub qos_class: Option<String>,
    /// What the guest agent tells of the system.
    #[serde(rename = "guestOSInfo")]
    pub guest_os_info: Option<GuestOsInfo>,
    /// Network interfaces, that on the pod's network first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceStatus>,
    /// Volumes, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_status: Vec<VolumeStatus>,
    /// Memory.
    pub memory: Option<MemoryStatus>,
    /// Processors.
    #[serde(rename = "currentCPUTopology")]
    pub current_cpu_topology: Option<Topology>,
    /// The board's model.
    pub machine: Option<super::domain::Machine>,
    /// User that the machine runs as.
    pub runtime_user: Option<u64>,
    /// How it would move: nothing does here.
    pub migration_method: Option<String>,
    /// Image that the machine's pod was made of.
    pub launcher_container_image_version: Option<String>,
    /// Template that it was made of.
    pub virtual_machine_revision_name: Option<String>,
    /// `frozen` while the guest's file systems are.
    pub fs_freeze_status: Option<String>,
}

/// When an instance came to a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// When.
    pub phase_transition_timestamp: Time,
}

/// One thing that is so, or is not.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// When it was last looked at.
    pub last_probe_time: Option<Time>,
    /// Since when.
    pub last_transition_time: Option<Time>,
    /// Why, in one word.
    pub reason: Option<String>,
    /// Why.
    pub message: Option<String>,
}

/// What the guest agent tells of the system.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestOsInfo {
    /// Like `Debian GNU/Linux`.
    pub name: Option<String>,
    /// Like `12 (bookworm)`.
    pub version: Option<String>,
    /// Like `debian`.
    pub id: Option<String>,
    /// Like `12`.
    pub version_id: Option<String>,
    /// Like `Debian GNU/Linux 12 (bookworm)`.
    pub pretty_name: Option<String>,
    /// Like `6.1.0-18-amd64`.
    pub kernel_release: Option<String>,
    /// Like `#1 SMP`.
    pub kernel_version: Option<String>,
    /// Like `x86_64`.
    pub machine: Option<String>,
}

/// A network interface.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceStatus {
    /// Its network.
    pub name: Option<String>,
    /// Where others reach it.
    pub ip_address: Option<String>,
    /// All of them.
    #[serde(rename = "ipAddresses", default, skip_serializing_if = "Vec::is_empty")]
    pub ip_addresses: Vec<String>,
    /// Its hardware address.
    pub mac: Option<String>,
    /// What the guest calls it.
    pub interface_name: Option<String>,
    /// What the pod calls it.
    pub pod_interface_name: Option<String>,
    /// Who told of it: `domain`, `guest-agent`, separated by commas.
    pub info_source: Option<String>,
    /// Queues.
    pub queue_count: Option<i32>,
    /// `up` or `down`.
    pub link_state: Option<String>,
}

/// A volume.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// What the guest calls it, like `vda`.
    #[serde(default)]
    pub target: String,
}

/// Memory.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryStatus {
    /// At the start.
    pub guest_at_boot: Option<Quantity>,
    /// Now.
    pub guest_current: Option<Quantity>,
    /// What was asked for.
    pub guest_requested: Option<Quantity>,
}

/// Processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Topology {
    /// Cores of a socket.
    pub cores: u32,
    /// Sockets.
    pub sockets: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// Threads in all.
    #[must_use]
    pub fn vcpus(self) -> u32 {
        self.cores
            .saturating_mul(self.sockets)
            .saturating_mul(self.threads)
    }
}
