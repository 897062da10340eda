//! What starts the guest and what it learns about itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which firmware starts the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirmwareChoice {
    /// None for a kernel that is given; else what the first boot disk's partitions ask for.
    #[default]
    Auto,
    /// SeaBIOS: boot loaders in the MBR, as of legacy disks.
    Bios,
    /// UEFI: boot loaders in an EFI system partition.
    Uefi,
    /// The project's own: it reads the disk inside the guest and starts the Linux kernel on it,
    /// without a boot loader.
    Fast,
    /// None: a kernel that is given starts by itself.
    None,
}

impl FirmwareChoice {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Bios, Self::Uefi, Self::Fast, Self::None];

    /// Its name in flags and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bios => "bios",
            Self::Uefi => "uefi",
            Self::Fast => "fast",
            Self::None => "none",
        }
    }
}

impl std::fmt::Display for FirmwareChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What starts the guest: a kernel when one is given, else the firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// The firmware.
    pub firmware: FirmwareChoice,
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
    /// UEFI image; that of the host's packages when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uefi: Option<PathBuf>,
    /// File that keeps the guest's UEFI variables from run to run. Made when it is not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uefi_vars: Option<PathBuf>,
    /// Option ROM by which SeaBIOS boots from the network; that of the host's packages when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_rom: Option<PathBuf>,
    /// The firmware waits for a key that shows what it can boot from.
    pub menu: bool,
}

/// What the cloud-init seed tells the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CloudInitConfig {
    /// In which form cloud-init is told.
    pub datasource: DataSource,
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

/// Which of cloud-init's data sources reads the seed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataSource {
    /// A volume labelled `cidata`.
    #[default]
    #[serde(rename = "nocloud")]
    NoCloud,
    /// OpenStack's volume labelled `config-2`.
    ConfigDrive,
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
