//! What starts the guest and what it learns about itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What starts the guest: a kernel when one is given, else the firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// Kernel for direct boot: ELF with a PVH note, or bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// BIOS image; Debian's SeaBIOS when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bios: Option<PathBuf>,
}

/// What the cloud-init seed tells the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CloudInitConfig {
    /// File with the user-data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<PathBuf>,
    /// File with public keys, in authorized_keys form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_key: Option<PathBuf>,
    /// Host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// File with the network configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_config: Option<PathBuf>,
}

/// Identity that the guest reads from SMBIOS.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityConfig {
    /// Machine UUID; made at the start when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<uuid::Uuid>,
    /// System serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}
