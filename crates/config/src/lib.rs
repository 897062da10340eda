//! The description of a virtual machine: one set of types behind flags, files and the API.
//!
//! A [`VmConfig`] is what a user wrote. [`VmConfig::validate`] checks it as a whole; host
//! resources (files, taps) are opened later by the VMM.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Name, unique among the machines of a user. Made from the first disk when absent.
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
    pub cloud_init: Option<CloudInitConfig>,
    /// Where the console goes.
    pub console: ConsoleConfig,
    /// Identity that the guest reads from SMBIOS.
    pub identity: IdentityConfig,
    /// File or `-` (standard error) for the firmware's debug port; none when absent.
    pub debugcon: Option<PathBuf>,
    /// Seconds between the power button and the kill when a stop is asked for.
    pub stop_timeout: u32,
}

/// Virtual CPUs and their topology. `sockets * cores * threads == count`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Number of vCPUs.
    pub count: u8,
    /// Sockets; worked out when absent.
    #[serde(default)]
    pub sockets: Option<u8>,
    /// Cores per socket; worked out when absent.
    #[serde(default)]
    pub cores: Option<u8>,
    /// Threads per core; 1 when absent.
    #[serde(default)]
    pub threads: Option<u8>,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in bytes; files and flags take `512M`, `4G`.
    pub size: ByteSize,
    /// Backs it with huge pages of the host (must be reserved beforehand).
    #[serde(default)]
    pub hugepages: bool,
}

/// A number of bytes, written as `512M`, `4G`, `65536`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Format; found from the content when absent.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// The guest can't write.
    #[serde(default)]
    pub ro: bool,
    /// Serial number that the guest sees, at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Place in the firmware's boot order, lowest first.
    #[serde(default)]
    pub bootindex: Option<u32>,
    /// Backing files from the nearest to the base. An image that names a backing file itself is
    /// refused unless its chain is given here.
    #[serde(default)]
    pub backing: Vec<PathBuf>,
    /// Guest writes go to a throw-away overlay; the image stays as it is.
    #[serde(default)]
    pub snapshot: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Request queues; as many as vCPUs (at most 4) when absent.
    #[serde(default)]
    pub queues: Option<u16>,
}

/// A disk image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU copy-on-write 2 and 3.
    Qcow2,
}

/// What starts the guest: a kernel when one is given, else the firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootConfig {
    /// Kernel for direct boot: ELF with a PVH note, or bzImage.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// BIOS image; Debian's SeaBIOS when absent.
    pub bios: Option<PathBuf>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its host end.
    #[serde(flatten)]
    pub backend: NetBackendConfig,
    /// MAC address; derived from the machine's UUID when absent.
    #[serde(default)]
    pub mac: Option<MacAddr>,
}

/// Host end of a network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum NetBackendConfig {
    /// A tap device of the host.
    Tap {
        /// Interface name.
        tap: String,
    },
    /// A network of its own behind the host's sockets, without privileges.
    User {
        /// Host ports that lead to the guest.
        #[serde(default)]
        forwards: Vec<PortForward>,
        /// The guest reaches the host's loopback services by its gateway's address.
        #[serde(default)]
        host_loopback: bool,
    },
}

/// A host port that leads to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// Host address to listen at; all when absent.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// Host port.
    pub host: u16,
    /// Guest port.
    pub guest: u16,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Transport of a port forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// What the cloud-init seed tells the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CloudInitConfig {
    /// File with the user-data.
    pub user_data: Option<PathBuf>,
    /// File with public keys, in authorized_keys form.
    pub ssh_key: Option<PathBuf>,
    /// Host name.
    pub hostname: Option<String>,
    /// File with the network configuration.
    pub network_config: Option<PathBuf>,
}

/// Where the console goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// The host end.
    pub output: ConsoleOutput,
    /// The device that the guest sees.
    pub device: ConsoleDevice,
}

/// Host end of the console. Clients of the API can attach whatever is chosen here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleOutput {
    /// Standard input and output.
    #[default]
    Stdio,
    /// A pseudo-terminal whose path is told at the start.
    Pty,
    /// Appended to a file.
    File(PathBuf),
    /// Nowhere.
    None,
}

/// Device of the console.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleDevice {
    /// The first serial port: firmware, boot loader and kernel all know it.
    #[default]
    Serial,
    /// virtio console: faster, seen from the kernel's driver on. The serial port stays, unheard.
    Virtio,
}

/// Identity that the guest reads from SMBIOS.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityConfig {
    /// Machine UUID; made at the start when absent.
    pub uuid: Option<uuid::Uuid>,
    /// System serial number.
    pub serial: Option<String>,
}
