//! Patches that write what changed, and only over what was read.

use serde_json::{Map, Value, json};

/// A merge patch (RFC 7386) that makes `new` of `old`.
pub fn merge(old: &Value, new: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return new.clone();
    };
    let mut patch = Map::new();
    for (key, value) in new {
        match old.get(key) {
            Some(same) if same == value => {}
            Some(other) => {
                patch.insert(key.clone(), merge(other, value));
            }
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    Value::Object(patch)
}

/// `patch`, refused when the object is no longer of the version that was read.
pub fn of_version(mut patch: Value, version: Option<&str>) -> Value {
    if let Value::Object(patch) = &mut patch {
        let metadata = patch.entry("metadata").or_insert_with(|| json!({}));
        if let Value::Object(metadata) = metadata {
            metadata.insert("resourceVersion".to_owned(), json!(version));
        }
    }
    patch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_null_and_what_stays_is_left_out() {
        let old = json!({"a": 1, "b": {"c": 1, "d": 2}, "e": [1], "f": 3});
        let new = json!({"a": 1, "b": {"c": 5}, "e": [1, 2], "g": {"h": 1}});
        let patch = json!({"b": {"c": 5, "d": null}, "e": [1, 2], "f": null, "g": {"h": 1}});
        assert_eq!(merge(&old, &new), patch);
        assert_eq!(merge(&new, &new), json!({}));
    }
}
