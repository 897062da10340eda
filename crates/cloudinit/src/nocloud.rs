//! Files of cloud-init's NoCloud data source.
//!
//! cloud-init takes a volume labelled `cidata` that has both `meta-data` and `user-data`; the latter
//! may be empty.

use serde_json::{Map, Value};

use crate::seed::{Metadata, SeedFile};

/// Label by which cloud-init finds the volume.
pub(crate) const LABEL: &str = "cidata";
pub(crate) const USER_DATA: &str = "user-data";

/// All files but the user-data.
pub(crate) fn files(metadata: &Metadata<'_>, network: Option<&str>) -> Vec<SeedFile> {
    let mut map = Map::new();
    map.insert("instance-id".to_owned(), metadata.instance_id.into());
    if let Some(hostname) = metadata.hostname {
        map.insert("local-hostname".to_owned(), hostname.into());
    }
    if !metadata.keys.is_empty() {
        map.insert("public-keys".to_owned(), metadata.keys.clone().into());
    }
    // Every JSON text is YAML, without YAML's traps of quoting.
    let mut files = vec![("meta-data", format!("{:#}\n", Value::from(map)))];
    files.extend(network.map(|text| ("network-config", text.to_owned())));
    files
}
