//! What cloud-init in the guest is told, by annotations or by a ConfigMap or Secret.
//!
//! The keys are those that KubeVirt's `cloudInitNoCloud` takes from a Secret, or the names of
//! NoCloud's files. The seed itself is made by the VMM.

use std::io;
use std::path::{Path, PathBuf};

use edgevmm_config::CloudInitConfig;

use crate::annotations::Annotations;
use crate::spec::Spec;
use crate::volumes::{File, Volume, VolumeError, read_files, write_private};

/// Folder in the bundle.
const FOLDER: &str = "seed";
/// Names of a key with user-data.
const USER_DATA: [&str; 3] = ["user-data", "userdata", "userData"];
/// Names of a key with a network configuration.
const NETWORK: [&str; 3] = ["network-config", "networkdata", "networkData"];

/// Why there is no seed.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// By the volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The volume has something else.
    #[error(
        "The volume `{volume}` has the key `{key}`, of which cloud-init is told nothing: use the \
         keys user-data and network-config, and no others"
    )]
    Key {
        /// Name of the volume.
        volume: String,
        /// The key.
        key: String,
    },
    /// The volume has nothing.
    #[error("The volume `{0}` has no key user-data that cloud-init could be told")]
    NoUserData(String),
    /// A file can't be written.
    #[error("Can't write what cloud-init is told")]
    Write(#[source] io::Error),
}

/// Makes the files of a seed in the container's bundle. `None` when nothing is to be told.
///
/// # Errors
///
/// When the volume can't be read, or has something else.
pub fn seed(
    spec: &Spec,
    annotations: &Annotations,
    volume: Option<&Volume<'_>>,
    bundle: &Path,
) -> Result<Option<CloudInitConfig>, SeedError> {
    let write = |name: &str, text: &[u8]| -> Result<Option<PathBuf>, SeedError> {
        let path = bundle.join(FOLDER).join(name);
        write_private(&path, text).map_err(SeedError::Write)?;
        Ok(Some(path))
    };
    let mut config = CloudInitConfig::default();
    if let Some(text) = &annotations.user_data {
        config.user_data = write("user-data", text.as_bytes())?;
    }
    if let Some(text) = &annotations.network_data {
        config.network_config = write("network-config", text.as_bytes())?;
    }
    if let Some(text) = &annotations.ssh_keys {
        config.ssh_key = write("ssh-keys", text.as_bytes())?;
    }
    if let Some(volume) = volume {
        volume.expect_files("cloud-init")?;
        for File { path, text } in read_files(volume)? {
            if USER_DATA.contains(&path.as_str()) {
                config.user_data = write("user-data", &text)?;
            } else if NETWORK.contains(&path.as_str()) {
                config.network_config = write("network-config", &text)?;
            } else {
                let volume = volume.name.clone();
                return Err(SeedError::Key { volume, key: path });
            }
        }
        if config.user_data.is_none() {
            return Err(SeedError::NoUserData(volume.name.clone()));
        }
    }
    if config == CloudInitConfig::default() {
        return Ok(None);
    }
    config.hostname = spec.hostname().map(str::to_owned);
    Ok(Some(config))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use crate::spec::Mount;

    use super::*;

    #[test]
    fn keys_of_a_secret_are_told_with_the_pods_name() {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("pods/u/volumes/kubernetes.io~secret/seed");
        fs::create_dir_all(&source).unwrap();
        let mut spec = Spec::default();
        spec.process.env = vec!["A=b".to_owned(), "HOSTNAME=vm-0".to_owned()];
        spec.mounts = vec![Mount {
            destination: "/seed".to_owned(),
            source: source.clone(),
            kind: "bind".to_owned(),
            options: Vec::new(),
        }];
        let annotations = Annotations::default();
        let make = |spec: &Spec| {
            let volumes = Volume::all(spec).unwrap();
            seed(spec, &annotations, volumes.first(), root.path())
        };
        let error = make(&spec).unwrap_err().to_string();
        assert!(error.contains("no key user-data"), "{error}");
        fs::write(source.join("userdata"), "#!/bin/sh").unwrap();
        fs::write(source.join("network-config"), "version: 2").unwrap();
        let config = make(&spec).unwrap().unwrap();
        assert_eq!(config.hostname.as_deref(), Some("vm-0"));
        let text = fs::read_to_string(config.user_data.unwrap()).unwrap();
        assert_eq!(text, "#!/bin/sh");
        assert!(
            config
                .network_config
                .unwrap()
                .ends_with("seed/network-config")
        );
        fs::write(source.join("vendor-data"), "").unwrap();
        let error = make(&spec).unwrap_err().to_string();
        assert!(error.contains("`vendor-data`"), "{error}");
        spec.mounts[0].source = "/srv".into();
        let error = make(&spec).unwrap_err().to_string();
        assert!(error.contains("a ConfigMap or a Secret"), "{error}");
    }

    #[test]
    fn annotations_alone_make_a_seed_and_nothing_makes_none() {
        let root = tempfile::tempdir().unwrap();
        let mut annotations = Annotations::default();
        let make = |annotations: &Annotations| {
            seed(&Spec::default(), annotations, None, root.path()).unwrap()
        };
        assert_eq!(make(&annotations), None);
        annotations.ssh_keys = Some("ssh-ed25519 AAAA".to_owned());
        let config = make(&annotations).unwrap();
        assert!(config.ssh_key.is_some() && config.hostname.is_none());
        let mode = fs::metadata(config.ssh_key.unwrap()).unwrap().permissions();
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
            0o600
        );
    }
}
