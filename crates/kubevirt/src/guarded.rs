//! Objects read one by one. A definition lets through more than our types can hold, and a client that
//! can't read one object of a list would have none of them: so what can't be read stands in its place
//! in the list as that.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Longest complaint that is kept, in characters: it quotes what somebody wrote.
const MAX_MESSAGE: usize = 200;

/// An object as it was read, without what managers of fields have noted, or why it can't be.
#[derive(Debug, Clone)]
pub struct Guarded<K>(pub Result<K, Unreadable>);

/// An object that can't be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Unreadable {
    /// Path of the field that is not as it has to be.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
    /// Which object it is.
    pub metadata: ObjectMeta,
}

impl<'de, K: Resource + DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Value::deserialize(deserializer)?;
        if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
            metadata.remove("managedFields");
        }
        serde_path_to_error::deserialize(&object).map_or_else(
            |error| {
                let metadata = object.get("metadata").unwrap_or(&Value::Null);
                let metadata = ObjectMeta::deserialize(metadata).map_err(D::Error::custom)?;
                let message = error.inner().to_string();
                Ok(Self(Err(Unreadable {
                    field: error.path().to_string(),
                    message: message.chars().take(MAX_MESSAGE).collect(),
                    metadata,
                })))
            },
            |object| Ok(Self(Ok(object))),
        )
    }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(kind)
    }

    fn group(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::group(kind)
    }

    fn version(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::version(kind)
    }

    fn plural(kind: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(kind)
    }

    fn meta(&self) -> &ObjectMeta {
        match &self.0 {
            Ok(object) => object.meta(),
            Err(unreadable) => &unreadable.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.0 {
            Ok(object) => object.meta_mut(),
            Err(unreadable) => &mut unreadable.metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::api::{VirtualMachine, VirtualMachineInstance};
    use kube::ResourceExt;
    use serde_json::json;

    #[test]
    fn one_that_can_not_be_read_leaves_the_others() {
        let object = |name: &str, cores: u64| {
            json!({
                "metadata": { "name": name, "uid": name, "managedFields": [{ "manager": "kubectl" }] },
                "spec": { "domain": { "cpu": { "cores": cores }, "devices": {} } },
            })
        };
        let list = json!([object("a", 1), object("b", 5_000_000_000), object("c", 2)]);
        let list: Vec<Guarded<VirtualMachineInstance>> = serde_json::from_value(list).unwrap();
        let names: Vec<_> = list.iter().map(ResourceExt::name_any).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(list.iter().filter(|object| object.0.is_ok()).count(), 2);
        assert!(
            list.iter()
                .all(|object| object.meta().managed_fields.is_none())
        );
        let problem = list[1].0.as_ref().unwrap_err();
        assert_eq!(problem.field, "spec.domain.cpu.cores");
        assert!(problem.message.contains("5000000000"), "{problem}");
    }

    #[test]
    fn the_field_is_named_in_lists_and_templates() {
        let machine = json!({
            "metadata": { "name": "a" },
            "spec": { "template": {
                "metadata": { "labels": { "app": 5 } },
                "spec": { "domain": { "devices": {} } },
            } },
        });
        let machine: Guarded<VirtualMachine> = serde_json::from_value(machine).unwrap();
        let problem = machine.0.unwrap_err();
        assert_eq!(problem.field, "spec.template.metadata.labels.app");
        let long = json!({
            "metadata": { "name": "a" },
            "spec": { "domain": { "devices": { "disks": [{ "name": "a" }, "x".repeat(5000)] } } },
        });
        let long: Guarded<VirtualMachineInstance> = serde_json::from_value(long).unwrap();
        let problem = long.0.unwrap_err();
        assert_eq!(problem.field, "spec.domain.devices.disks[1]");
        assert!(problem.message.chars().count() <= MAX_MESSAGE);
    }
}
