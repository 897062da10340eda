//! What a seed tells the guest, for any of cloud-init's data sources that read a volume.
//!
//! User-data goes to the guest byte by byte as given; host name and SSH keys travel in the metadata.
//!
//! The keys are for the image's default user (`debian`, `ubuntu`, ...). They reach root too, but
//! with a forced command that points to that user, unless the user-data says `disable_root: false`.
//! User-data with a `users` list that leaves out `default` has no default user, and then nobody
//! gets the keys but root; such user-data names its own keys.
//!
//! cloud-init reapplies what is per instance whenever the instance id differs from the one on the
//! guest's disk.

use std::net::Ipv4Addr;

use thiserror::Error;

use crate::iso9660::{Iso, IsoError};
use crate::sshkey::{SshKeyError, parse_authorized_keys};
use crate::userdata::{UserDataError, UserDataFormat};
use crate::{config_drive, nocloud};

/// Largest user-data and network configuration.
const MAX_FILE: usize = 16 << 20;
/// cloud-init names a directory after the instance id.
const MAX_INSTANCE_ID: usize = 128;
/// Longest host name with its domain (RFC 1123 2.1).
const MAX_HOSTNAME: usize = 253;
const MAX_LABEL: usize = 63;

/// Which of cloud-init's data sources a seed is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DataSource {
    /// A volume labelled `cidata`.
    #[default]
    NoCloud,
    /// OpenStack's volume labelled `config-2`, which other programs than cloud-init read as well.
    ConfigDrive,
}

/// What the guest is told on its first boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seed {
    /// In which form it is told.
    pub data_source: DataSource,
    /// Passed to cloud-init as it is.
    pub user_data: Option<Vec<u8>>,
    /// Public keys for the default user, each a line or a whole file of authorized_keys form.
    pub ssh_keys: Vec<String>,
    /// Host name, with its domain if it has one.
    pub hostname: Option<String>,
    /// Identity of the machine: letters, digits, `.`, `-` and `_`.
    pub instance_id: String,
    /// Network configuration, passed as it is: for NoCloud of cloud-init's version 1 or 2, for a
    /// config drive OpenStack's `network_data.json`. Without it cloud-init asks for addresses by
    /// DHCP on the first interface.
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
    /// The network configuration is not what the data source reads.
    #[error(
        "A config drive takes OpenStack's network_data.json as network configuration: a JSON object \
         with \"links\", \"networks\" and \"services\"; for cloud-init's own form use NoCloud"
    )]
    NetworkData,
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
        let metadata = self.metadata()?;
        let network = self.network_config.as_deref().map(network_text);
        let network = network.transpose()?;
        let (label, files) = match self.data_source {
            DataSource::NoCloud => (nocloud::LABEL, nocloud::files(&metadata, network)),
            DataSource::ConfigDrive => (
                config_drive::LABEL,
                config_drive::files(&metadata, network)?,
            ),
        };
        // cloud-init does not look at dates; the epoch keeps the image reproducible.
        let mut iso = Iso::new(label, 0)?;
        for (path, text) in files {
            check_size(path, text.as_bytes())?;
            iso.add(path, text.into_bytes())?;
        }
        iso.add(self.data_source.user_data_path(), user_data.to_vec())?;
        Ok(iso.build()?)
    }

    fn metadata(&self) -> Result<Metadata<'_>, SeedError> {
        check_instance_id(&self.instance_id)?;
        if let Some(hostname) = &self.hostname {
            check_hostname(hostname)?;
        }
        let mut keys = Vec::new();
        for text in &self.ssh_keys {
            keys.extend(parse_authorized_keys(text)?);
        }
        Ok(Metadata {
            instance_id: &self.instance_id,
            hostname: self.hostname.as_deref(),
            keys,
        })
    }
}

impl DataSource {
    fn user_data_path(self) -> &'static str {
        match self {
            DataSource::NoCloud => nocloud::USER_DATA,
            DataSource::ConfigDrive => config_drive::USER_DATA,
        }
    }
}

/// What a seed says of the machine, checked.
#[derive(Debug)]
pub(crate) struct Metadata<'s> {
    pub instance_id: &'s str,
    pub hostname: Option<&'s str>,
    pub keys: Vec<String>,
}

/// A file of a seed: path and content.
pub(crate) type SeedFile = (&'static str, String);

fn network_text(config: &[u8]) -> Result<&str, SeedError> {
    check_size("network-config", config)?;
    std::str::from_utf8(config).map_err(|error| SeedError::NetworkConfig {
        offset: error.valid_up_to(),
    })
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
