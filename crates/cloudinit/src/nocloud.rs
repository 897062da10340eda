//! Seeds of cloud-init's NoCloud data source: a small disk labelled `cidata`.
//!
//! cloud-init takes a volume labelled `cidata` that has both `meta-data` and `user-data`; the latter
//! may be empty. Host name and SSH keys travel in the meta-data, so that the user-data goes to the
//! guest byte by byte as given.
//!
//! The keys are for the image's default user (`debian`, `ubuntu`, ...). They reach root too, but
//! with a forced command that points to that user, unless the user-data says `disable_root: false`.
//! User-data with a `users` list that leaves out `default` has no default user, and then nobody
//! gets the keys but root; such user-data names its own keys.
//!
//! cloud-init reapplies what is per instance whenever the instance id differs from the one on the
//! guest's disk.

use std::net::Ipv4Addr;

use serde_json::{Map, Value};
use thiserror::Error;

use crate::iso9660::{Iso, IsoError};
use crate::sshkey::{SshKeyError, parse_authorized_keys};
use crate::userdata::{UserDataError, UserDataFormat};

/// Label by which cloud-init finds the volume.
const LABEL: &str = "cidata";
/// Largest user-data and network configuration.
const MAX_FILE: usize = 16 << 20;
/// cloud-init names a directory after the instance id.
const MAX_INSTANCE_ID: usize = 128;
/// Longest host name with its domain (RFC 1123 2.1).
const MAX_HOSTNAME: usize = 253;
const MAX_LABEL: usize = 63;

/// What the guest is told on its first boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seed {
    /// Passed to cloud-init as it is.
    pub user_data: Option<Vec<u8>>,
    /// Public keys for the default user, each a line or a whole file of authorized_keys form.
    pub ssh_keys: Vec<String>,
    /// Host name, with its domain if it has one.
    pub hostname: Option<String>,
    /// Identity of the machine: letters, digits, `.`, `-` and `_`.
    pub instance_id: String,
    /// Network configuration (version 1 or 2), passed as it is; without it cloud-init asks for
    /// addresses by DHCP on the first interface.
    pub network_config: Option<Vec<u8>>,
}

/// Why a seed could not be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SeedError {
    /// cloud-init would ignore the user-data.
    #[error(transparent)]
    UserData(#[from] UserDataError),
    /// An SSH key is none.
    #[error("Invalid SSH public key")]
    SshKey(#[from] SshKeyError),
    /// The host name is none.
    #[error(
        "Host name {hostname:?} is not letters, digits and hyphens in parts of at most \
         {MAX_LABEL}, joined by dots, {MAX_HOSTNAME} in all"
    )]
    Hostname {
        /// The name as given.
        hostname: String,
    },
    /// The instance id cannot name a directory.
    #[error(
        "Instance id {id:?} is not 1 to {MAX_INSTANCE_ID} letters, digits, '.', '-' or '_', \
         or begins with '.'"
    )]
    InstanceId {
        /// The id as given.
        id: String,
    },
    /// The network configuration is not text.
    #[error("Network configuration is not UTF-8 text (byte {offset})")]
    NetworkConfig {
        /// Where the text ends.
        offset: usize,
    },
    /// A part of the seed is too large.
    #[error("{file} has {bytes} bytes, more than the {MAX_FILE} allowed")]
    Size {
        /// Name of the file in the seed.
        file: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] IsoError),
}

impl Seed {
    /// Writes the seed as a disk image of whole 2048-byte sectors. The same seed gives the same
    /// bytes.
    ///
    /// # Errors
    /// Fails when a part is invalid or larger than 16 MiB, and for user-data that cloud-init would
    /// ignore.
    pub fn build(&self) -> Result<Vec<u8>, SeedError> {
        let user_data = self.user_data.as_deref().unwrap_or_default();
        check_size("user-data", user_data)?;
        UserDataFormat::detect(user_data)?;
        let meta_data = self.meta_data()?;
        check_size("meta-data", meta_data.as_bytes())?;

        // cloud-init does not look at dates; the epoch keeps the image reproducible.
        let mut iso = Iso::new(LABEL, 0)?;
        iso.add("meta-data", meta_data.into_bytes())?;
        iso.add("user-data", user_data.to_vec())?;
        if let Some(config) = &self.network_config {
            check_size("network-config", config)?;
            std::str::from_utf8(config).map_err(|error| SeedError::NetworkConfig {
                offset: error.valid_up_to(),
            })?;
            iso.add("network-config", config.clone())?;
        }
        Ok(iso.build()?)
    }

    /// The meta-data, in JSON: every JSON text is YAML, without YAML's traps of quoting.
    fn meta_data(&self) -> Result<String, SeedError> {
        check_instance_id(&self.instance_id)?;
        let mut map = Map::new();
        map.insert(
            "instance-id".to_owned(),
            Value::from(self.instance_id.as_str()),
        );
        if let Some(hostname) = &self.hostname {
            check_hostname(hostname)?;
            map.insert("local-hostname".to_owned(), Value::from(hostname.as_str()));
        }
        let mut keys = Vec::new();
        for text in &self.ssh_keys {
            keys.extend(parse_authorized_keys(text)?);
        }
        if !keys.is_empty() {
            map.insert("public-keys".to_owned(), Value::from(keys));
        }
        Ok(format!("{:#}\n", Value::from(map)))
    }
}

fn check_size(file: &'static str, data: &[u8]) -> Result<(), SeedError> {
    if data.len() > MAX_FILE {
        return Err(SeedError::Size {
            file,
            bytes: data.len(),
        });
    }
    Ok(())
}

fn check_instance_id(id: &str) -> Result<(), SeedError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let size = 1..=MAX_INSTANCE_ID;
    if !size.contains(&id.len()) || id.starts_with('.') || !id.chars().all(allowed) {
        return Err(SeedError::InstanceId { id: id.to_owned() });
    }
    Ok(())
}

/// Host names by RFC 1123; not an IPv4 address, of which cloud-init makes another name.
fn check_hostname(hostname: &str) -> Result<(), SeedError> {
    let label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let valid = hostname.len() <= MAX_HOSTNAME
        && hostname.split('.').all(label)
        && hostname.parse::<Ipv4Addr>().is_err();
    if !valid {
        return Err(SeedError::Hostname {
            hostname: hostname.to_owned(),
        });
    }
    Ok(())
}
