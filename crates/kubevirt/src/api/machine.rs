//! VirtualMachine: a machine that is kept, whether it runs or not.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_with::skip_serializing_none;

use super::instance::{Condition, InstanceSpec};

/// What is kept.
#[skip_serializing_none]
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachine",
    plural = "virtualmachines",
    shortname = "vm",
    shortname = "vms",
    category = "all",
    namespaced,
    derive = "Default",
    derive = "PartialEq",
    status = "MachineStatus",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.printableStatus"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct MachineSpec {
    /// Whether it is to run: as `runStrategy` `Always` or `Halted`. Deprecated.
    pub running: Option<bool>,
    /// When it is to run.
    pub run_strategy: Option<RunStrategy>,
    /// What its instances are made of.
    pub template: Template,
    /// Claims that are made and filled for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<BTreeMap<String, Value>>")]
    pub data_volume_templates: Vec<Value>,
}

/// What instances are made of.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Template {
    /// Labels and annotations that they get.
    #[schemars(with = "Option<TemplateMetadata>")]
    pub metadata: Option<ObjectMeta>,
    /// What they are.
    pub spec: InstanceSpec,
}

/// What of a template's metadata has to be as it is here; the rest is nobody's.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "a schema's source")]
struct TemplateMetadata {
    /// Labels.
    labels: Option<BTreeMap<String, String>>,
    /// Annotations.
    annotations: Option<BTreeMap<String, String>>,
}

/// When a machine is to run.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, strum::Display,
)]
pub enum RunStrategy {
    /// All the time: it is started anew however it ended.
    Always,
    /// Until it ends by itself: it is started anew when it failed.
    RerunOnFailure,
    /// As it is told to.
    Manual,
    /// Not at all.
    #[default]
    Halted,
    /// Once.
    Once,
}

/// What is known about a machine.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MachineStatus {
    /// Whether it has an instance.
    pub created: Option<bool>,
    /// Whether that is ready.
    pub ready: Option<bool>,
    /// The run strategy that is followed.
    pub run_strategy: Option<RunStrategy>,
    /// All of it in one word.
    pub printable_status: Option<String>,
    /// Conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What it was told to do and has not yet done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state_change_requests: Vec<StateChange>,
    /// Starts that failed in a row.
    pub start_failure: Option<StartFailure>,
    /// Generation that the instance runs.
    pub observed_generation: Option<i64>,
    /// Generation that is wanted.
    pub desired_generation: Option<i64>,
}

/// What a machine was told to do.
#[skip_serializing_none]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StateChange {
    /// Start or stop.
    pub action: StateAction,
    /// How, like `paused: "true"`.
    pub data: Option<BTreeMap<String, String>>,
    /// The instance to stop.
    pub uid: Option<String>,
}

/// What a machine can be told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StateAction {
    /// Make an instance.
    Start,
    /// End that instance.
    Stop,
}

/// Starts that failed in a row.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartFailure {
    /// How many.
    pub consecutive_fail_count: i32,
    /// The last instance of them.
    #[serde(rename = "lastFailedVMIUID")]
    pub last_failed_instance: Option<String>,
    /// When the next one is made.
    pub retry_after_timestamp: Option<Time>,
}
