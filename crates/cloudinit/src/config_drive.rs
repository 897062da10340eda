//! Files of OpenStack's config drive, as cloud-init's ConfigDrive data source reads them.
//!
//! It takes a volume labelled `config-2` with `openstack/latest/meta_data.json`, whose `uuid` is the
//! instance id. Left out: vendor data, files by `content_path`, older versions of the layout.

use serde_json::{Map, Value, json};

use crate::seed::{Metadata, SeedError, SeedFile};

/// Label by which cloud-init finds the volume.
pub(crate) const LABEL: &str = "config-2";
pub(crate) const USER_DATA: &str = "openstack/latest/user_data";

/// All files but the user-data.
pub(crate) fn files(
    metadata: &Metadata<'_>,
    network: Option<&str>,
) -> Result<Vec<SeedFile>, SeedError> {
    let id = metadata.instance_id;
    let mut map = Map::new();
    map.insert("uuid".to_owned(), id.into());
    map.insert("instance_id".to_owned(), id.into());
    if let Some(hostname) = metadata.hostname {
        map.insert("hostname".to_owned(), hostname.into());
        let name = hostname.split('.').next().unwrap_or(hostname);
        map.insert("name".to_owned(), name.into());
    }
    if !metadata.keys.is_empty() {
        let keys = metadata.keys.iter().enumerate();
        let keys: Map<_, _> = keys
            .map(|(index, key)| (index.to_string(), json!(key)))
            .collect();
        map.insert("public_keys".to_owned(), keys.into());
    }
    let meta_data = format!("{:#}\n", Value::from(map));
    let mut files = vec![("openstack/latest/meta_data.json", meta_data)];
    if let Some(text) = network {
        check_network(text)?;
        files.push(("openstack/latest/network_data.json", text.to_owned()));
    }
    Ok(files)
}

/// cloud-init ends without any network over a text of another form.
fn check_network(text: &str) -> Result<(), SeedError> {
    let value: Value = serde_json::from_str(text).map_err(|_| SeedError::NetworkData)?;
    let complete = ["links", "networks", "services"]
        .iter()
        .all(|key| value.get(key).is_some_and(Value::is_array));
    complete.then_some(()).ok_or(SeedError::NetworkData)
}
