//! Networks of the pod and the guest's interfaces on them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_with::skip_serializing_none;

use super::domain::Empty;

/// An interface on the network of the same name.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Name of the network.
    pub name: String,
    /// Behind the pod's address, with one of its own.
    pub masquerade: Option<Empty>,
    /// With the pod's address.
    pub bridge: Option<Empty>,
    /// `virtio`.
    pub model: Option<String>,
    /// What others may connect to: all ports do lead to the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
}

/// A port of the guest.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Port {
    /// What the pod's port is called.
    pub name: Option<String>,
    /// Its number.
    pub port: u16,
    /// `TCP` or `UDP`.
    pub protocol: Option<String>,
}

/// A network.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Network {
    /// What interfaces call it.
    pub name: String,
    /// The pod's own.
    pub pod: Option<PodNetwork>,
    /// One that Multus adds.
    pub multus: Option<Multus>,
}

/// The pod's own network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PodNetwork {}

/// A network that Multus adds.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Multus {
    /// Name of the NetworkAttachmentDefinition, with its namespace before a `/` if it is another one.
    pub network_name: String,
}
