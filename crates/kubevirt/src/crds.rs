//! The definitions of the objects, as a cluster is told them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value};

use crate::api::{VirtualMachine, VirtualMachineInstance};

/// Longest description that is kept: those of Kubernetes' own types are essays.
const MAX_DESCRIPTION: usize = 160;

/// All definitions.
///
/// # Errors
/// A type makes no schema, which tests rule out.
pub fn all() -> Result<Vec<CustomResourceDefinition>, serde_json::Error> {
    let mut instance = VirtualMachineInstance::crd();
    // KubeVirt's has none: clients write an instance's status with the rest of it.
    for version in &mut instance.spec.versions {
        version.subresources = None;
    }
    [instance, VirtualMachine::crd()]
        .into_iter()
        .map(lenient)
        .collect()
}

/// Lets fields through that the schema does not have: a cluster drops them in silence else, and we
/// are to refuse them by name.
fn lenient(
    definition: CustomResourceDefinition,
) -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut definition = serde_json::to_value(definition)?;
    if let Some(versions) = definition
        .pointer_mut("/spec/versions")
        .and_then(Value::as_array_mut)
    {
        for version in versions {
            if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
                loosen(schema);
            }
        }
    }
    serde_json::from_value(definition)
}

fn loosen(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    let long = |text: &Value| {
        text.as_str()
            .is_none_or(|text| text.len() > MAX_DESCRIPTION)
    };
    if map.get("description").is_some_and(long) {
        map.remove("description");
    }
    bound(map);
    // An object stays as its user wrote it.
    map.remove("default");
    for part in ["items", "additionalProperties"] {
        if let Some(schema) = map.get_mut(part) {
            loosen(schema);
        }
    }
    // What may be anything is cut down to nothing else.
    if map.get("additionalProperties").is_some_and(is_anything) {
        map.remove("additionalProperties");
        keep_unknown(map);
    }
    let properties = map.get_mut("properties").and_then(Value::as_object_mut);
    if let Some(properties) = properties {
        properties.values_mut().for_each(loosen);
        keep_unknown(map);
    }
}

/// Says how large a number may be, which a cluster does not tell by its format.
fn bound(map: &mut Map<String, Value>) {
    let (least, most) = match map.get("format").and_then(Value::as_str) {
        Some("uint16") => (0, i64::from(u16::MAX)),
        Some("int32") => (i64::from(i32::MIN), i64::from(i32::MAX)),
        Some("uint32") => (0, i64::from(u32::MAX)),
        _ => return,
    };
    map.entry("minimum").or_insert_with(|| least.into());
    map.entry("maximum").or_insert_with(|| most.into());
}

fn is_anything(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.is_empty(),
        other => other == true,
    }
}

fn keep_unknown(map: &mut Map<String, Value>) {
    map.insert(
        "x-kubernetes-preserve-unknown-fields".to_owned(),
        true.into(),
    );
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What a cluster takes is what we can read, as far as a schema can tell.
    #[test]
    fn numbers_are_bounded_and_labels_are_texts() {
        for definition in all().unwrap() {
            let definition = serde_json::to_value(definition).unwrap();
            let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
            let spec = definition.pointer(spec).unwrap();
            let Some(template) = spec.pointer("/template/properties") else {
                let cores = spec.pointer("/domain/properties/cpu/properties/cores");
                assert_eq!(cores.unwrap()["maximum"], 4_294_967_295.0);
                continue;
            };
            let labels = template.pointer("/metadata/properties/labels").unwrap();
            assert_eq!(labels["additionalProperties"]["type"], "string");
        }
    }

    #[test]
    fn definitions_are_small_enough_for_kubectl_apply() {
        for definition in all().unwrap() {
            // What `kubectl apply` keeps in an annotation, which all together may have 256 KiB.
            let size = serde_json::to_string(&definition).unwrap().len();
            assert!(size < 200 << 10, "{size}");
        }
    }
}
