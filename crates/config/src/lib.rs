//! The description of a virtual machine: one set of types behind flags, files and the API.
//!
//! A [`VmConfig`] is what a user wrote. [`VmConfig::validate`] checks it as a whole; host
//! resources (files, taps) are opened later by the VMM.

mod boot;
mod channel;
mod console;
mod cpu;
mod disk;
mod drive;
mod file;
mod flag;
mod incident;
mod keys;
mod lease;
mod mac;
mod name;
mod net;
mod size;
mod topology;
mod validate;
mod yaml;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use boot::{BootConfig, CloudInitConfig, DataSource, FirmwareChoice, IdentityConfig};
pub use channel::{AGENT_CHANNEL, ChannelConfig};
pub use console::{ConsoleConfig, ConsoleDevice, ConsoleOutput};
pub use cpu::{CpuConfig, MemoryConfig};
pub use disk::{DiskAio, DiskConfig, DiskErrorPolicy, DiskFormat, ImageConfig};
pub use drive::{DiskBus, DiskKind, SATA_PORTS};
pub use file::{ConfigFileError, ConfigTextError, MAX_FILE_SIZE};
pub use flag::{FlagError, escape_value};
pub use incident::{PanicAction, WatchdogAction, WatchdogConfig};
pub use lease::{Gateway6, LeaseConfig, Network, Network6, NetworkTextError, RouteConfig};
pub use mac::{MacAddr, MacAddrError};
pub use name::{MAX_NAME_LEN, NameError, check_name, name_from};
pub use net::{
    NetBackendConfig, NetConfig, NetConfigError, PortForward, PortForwardError, Protocol,
};
pub use size::{ByteSize, ByteSizeError};
pub use topology::{Topology, TopologyError};
pub use validate::{ConfigError, check_hostname};
pub use yaml::to_yaml;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Name, unique among the machines of a user. Made from the first disk when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Virtual CPUs.
    pub cpus: CpuConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Disks in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// What starts the guest.
    pub boot: BootConfig,
    /// Network interfaces in the order in which the guest finds them.
    pub nets: Vec<NetConfig>,
    /// cloud-init seed; none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInitConfig>,
    /// Where the console goes.
    pub console: ConsoleConfig,
    /// Whether a guest agent finds its channel.
    pub agent: bool,
    /// Other channels between guest and host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<ChannelConfig>,
    /// Identity that the guest reads from SMBIOS.
    pub identity: IdentityConfig,
    /// File or `-` (standard error) for the firmware's debug port; none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debugcon: Option<PathBuf>,
    /// What to do when the guest's kernel panics, if it tells.
    pub on_panic: PanicAction,
    /// Watchdog; none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogConfig>,
    /// Seconds between the power button and the kill when a stop is asked for.
    pub stop_timeout: u32,
}

/// A machine that boots a cloud image once it gets a disk: 2 vCPUs, 1 GiB, a user network, a
/// minute to stop.
impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: None,
            cpus: CpuConfig::default(),
            memory: MemoryConfig::default(),
            disks: Vec::new(),
            boot: BootConfig::default(),
            nets: vec![NetConfig::user()],
            cloud_init: None,
            console: ConsoleConfig::default(),
            agent: true,
            channels: Vec::new(),
            identity: IdentityConfig::default(),
            debugcon: None,
            on_panic: PanicAction::default(),
            watchdog: None,
            stop_timeout: 60,
        }
    }
}
