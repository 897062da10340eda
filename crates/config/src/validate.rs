//! What must hold of a machine as a whole. Nothing here looks at the host.

mod boot;
mod disk;

use std::collections::HashSet;
use std::hash::Hash;
use std::path::{Path, PathBuf};

use crate::channel::check_channels;
use boot::{MAX_CMDLINE, check_boot};
use disk::{MAX_QUEUES, MAX_SERIAL, check_disks};

use crate::{
    ByteSize, CloudInitConfig, ConsoleOutput, DiskConfig, FirmwareChoice, NameError,
    NetBackendConfig, NetConfig, PortForward, TopologyError, VmConfig, check_name,
};

/// PCI devices that fit a machine, beside its bridges.
const MAX_PCI_DEVICES: usize = 28;
/// The random number generator and the console.
const FIXED_PCI_DEVICES: usize = 2;
/// Least memory with which SeaBIOS and a kernel start.
const MIN_MEMORY: ByteSize = ByteSize::mib(16);
/// Longest serial number of the machine, in bytes; far below what SMBIOS can hold.
const MAX_SYSTEM_SERIAL: usize = 64;
/// Longest name of a network interface of Linux, in bytes.
const MAX_INTERFACE_NAME: usize = 15;

/// Why a configuration describes no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The name can't be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The vCPUs have no topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// Memory is too small.
    #[error("{0} of memory is too little to boot: use at least {MIN_MEMORY}")]
    MemorySize(ByteSize),
    /// Memory isn't made of whole pages.
    #[error("{size} of memory is not a multiple of its pages: use a multiple of {page}")]
    MemoryPages {
        /// Memory.
        size: ByteSize,
        /// Page size.
        page: ByteSize,
    },
    /// Nothing to start.
    #[error("There is nothing to boot: give a disk image, or a kernel with --kernel")]
    NothingToBoot,
    /// A kernel's companion came without it.
    #[error("`{0}` needs a kernel to go with it: add --kernel, or leave it out")]
    NoKernel(&'static str),
    /// A kernel, and a file for firmware.
    #[error("A kernel starts without firmware: leave out --kernel or `{0}`")]
    KernelAndFile(&'static str),
    /// A kernel, and firmware that would start another one.
    #[error("A kernel starts without firmware: leave out --kernel, or --firmware {0}")]
    KernelAndFirmware(FirmwareChoice),
    /// No firmware, and no kernel to do without.
    #[error(
        "Without firmware nothing starts a disk: give a kernel with --kernel, or leave out --firmware none"
    )]
    NeitherKernelNorFirmware,
    /// A file for other firmware.
    #[error("`{what}` is of no use to --firmware {firmware}: leave out one of both")]
    OtherFirmware {
        /// The flag of the file.
        what: &'static str,
        /// What was chosen.
        firmware: FirmwareChoice,
    },
    /// A boot menu without firmware.
    #[error(
        "A kernel starts without firmware, so there is no menu: leave out --kernel or --boot-menu"
    )]
    KernelAndMenu,
    /// A network to boot from without firmware.
    #[error(
        "A kernel starts without firmware, so no network is booted from: leave out --kernel, or \
         `bootindex` of the network interface"
    )]
    KernelAndNetBoot,
    /// A ROM that nothing uses.
    #[error(
        "Nothing boots from the network: give a --net interface a `bootindex`, or leave out --net-rom"
    )]
    UnusedNetRom,
    /// Files for two firmwares.
    #[error(
        "`--bios` and `--uefi` or `--uefi-vars` are for different firmware: leave out one of both"
    )]
    BiosAndUefi,
    /// The command line is too long or not a line.
    #[error("The kernel command line has {0}: keep it to one line of at most {MAX_CMDLINE} bytes")]
    Cmdline(String),
    /// A path is empty.
    #[error("The path of the {0} is empty: give a file, or leave it out")]
    EmptyPath(&'static str),
    /// Two disks share an image that one of them writes to.
    #[error(
        "{} is there twice, and both would write over each other: make both `ro` or `snapshot`, or \
         copy the image", .0.display()
    )]
    SharedDisk(PathBuf),
    /// Two disks share an overlay that one of them writes to.
    #[error(
        "The overlay {} is there twice, and both disks would write over each other: give each its \
         own", .0.display()
    )]
    SharedOverlay(PathBuf),
    /// An internal snapshot would be written.
    #[error(
        "The internal snapshot of disk {} can only be read: add `ro`, or `snapshot` to throw \
         writes away", .0.display()
    )]
    SnapshotWritten(PathBuf),
    /// An overlay would be over an internal snapshot.
    #[error(
        "Disk {} can't have an overlay over its internal snapshot: leave one of both out",
        .0.display()
    )]
    SnapshotOverlay(PathBuf),
    /// The overlay's size can't be one.
    #[error(
        "The overlay of disk {} can't have {size}: use whole sectors of 512 bytes, like 20G",
        path.display()
    )]
    OverlaySize {
        /// The image.
        path: PathBuf,
        /// Size asked for.
        size: ByteSize,
    },
    /// A disk's serial number can't be one.
    #[error(
        "The serial number of disk {} is unfit: use 1 to {MAX_SERIAL} printable ASCII \
         characters", .0.display()
    )]
    DiskSerial(PathBuf),
    /// Two things are the same that must differ.
    #[error("{what} {value} is there twice: change one of them")]
    Duplicate {
        /// Kind of thing.
        what: &'static str,
        /// Which.
        value: String,
    },
    /// A raw image has no backing files.
    #[error("Disk {} is raw, so it has no backing files: leave out `backing` or `format`", .0.display())]
    RawBacking(PathBuf),
    /// A disk is asked for what it can't have on its bus, or as a CD-ROM drive.
    #[error("{what} {} can't have `{key}`: leave it out", path.display())]
    DriveKey {
        /// What it is, such as "CD-ROM drive".
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// Too few or many queues.
    #[error("Disk {} can't have {queues} queues: use 1 to {MAX_QUEUES}", path.display())]
    DiskQueues {
        /// The image.
        path: PathBuf,
        /// Queues asked for.
        queues: u16,
    },
    /// A limit of a disk is none.
    #[error("Disk {} can't have `{key}`: {reason}", path.display())]
    DiskLimit {
        /// The image.
        path: PathBuf,
        /// The limit's key.
        key: &'static str,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
    /// The name of a tap can't be one.
    #[error(
        "`{0}` can't name a tap device: use 1 to {MAX_INTERFACE_NAME} characters without spaces \
         and slashes"
    )]
    TapName(String),
    /// The name of a channel can't be one.
    #[error(
        "`{0}` can't name a channel: use 1 to 64 letters, digits and `._-:+`, the first a letter or \
         digit, like org.example.0"
    )]
    ChannelName(String),
    /// A channel has the name of the agent's.
    #[error(
        "edgevmm talks to the guest agent itself: leave the channel out, or add --no-agent to talk \
         to it by the socket"
    )]
    AgentChannel,
    /// The path of a channel's socket can't be one.
    #[error("The socket of channel {0} can't be at its path: use 1 to 107 bytes")]
    ChannelSocket(String),
    /// More channels than a machine has.
    #[error("The machine can't have {0} channels: use at most 16")]
    Channels(usize),
    /// The host name can't be one.
    #[error("`{0}` can't be a host name: use letters, digits, `-` and `.`, like web-1")]
    Hostname(String),
    /// The machine's serial number can't be one.
    #[error(
        "The machine's serial number is unfit: use 1 to {MAX_SYSTEM_SERIAL} printable ASCII \
         characters"
    )]
    SystemSerial,
    /// More devices than slots.
    #[error(
        "The machine has {0} PCI devices, more than {MAX_PCI_DEVICES}: use fewer disks and network \
         interfaces"
    )]
    PciDevices(usize),
}

impl VmConfig {
    /// Checks everything that can be told without the host.
    ///
    /// # Errors
    ///
    /// Says which rule is broken first, and what to do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(name) = &self.name {
            check_name(name)?;
        }
        self.cpus.topology()?;
        self.check_memory()?;
        let net = self.nets.iter().any(|net| net.bootindex.is_some());
        let disk = !self.disks.iter().all(DiskConfig::is_empty);
        check_boot(&self.boot, disk || net, net)?;
        let mut indices = Unique::new("The boot index");
        let of_disks = self.disks.iter().map(|disk| disk.bootindex);
        let of_nets = self.nets.iter().map(|net| net.bootindex);
        of_disks
            .chain(of_nets)
            .try_for_each(|index| indices.add(index))?;
        check_disks(&self.disks)?;
        check_nets(&self.nets)?;
        self.cloud_init.as_ref().map_or(Ok(()), check_cloud_init)?;
        if let ConsoleOutput::File(path) = &self.console.output {
            check_path("console", path)?;
        }
        check_channels(&self.channels, self.agent)?;
        if let Some(path) = &self.debugcon {
            check_path("debug port", path)?;
        }
        let serial = self.identity.serial.as_deref();
        if serial.is_some_and(|serial| !is_printable(serial, MAX_SYSTEM_SERIAL)) {
            return Err(ConfigError::SystemSerial);
        }
        let seed = usize::from(self.cloud_init.is_some());
        let ports = usize::from(self.agent || !self.channels.is_empty());
        match FIXED_PCI_DEVICES + seed + ports + self.disk_functions() + self.nets.len() {
            0..=MAX_PCI_DEVICES => Ok(()),
            devices => Err(ConfigError::PciDevices(devices)),
        }
    }

    fn check_memory(&self) -> Result<(), ConfigError> {
        let size = self.memory.size;
        let page = ByteSize(if self.memory.hugepages {
            2 << 20
        } else {
            4 << 10
        });
        if size < MIN_MEMORY {
            Err(ConfigError::MemorySize(size))
        } else if !size.0.is_multiple_of(page.0) {
            Err(ConfigError::MemoryPages { size, page })
        } else {
            Ok(())
        }
    }
}

fn check_path(what: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.as_os_str().is_empty() {
        Err(ConfigError::EmptyPath(what))
    } else {
        Ok(())
    }
}

fn is_printable(text: &str, longest: usize) -> bool {
    let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    (1..=longest).contains(&text.len()) && text.bytes().all(printable)
}

/// Remembers values and refuses one that comes again.
#[derive(Debug)]
struct Unique<T> {
    what: &'static str,
    seen: HashSet<T>,
}

impl<T: Eq + Hash + ToString> Unique<T> {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            seen: HashSet::new(),
        }
    }

    fn add(&mut self, value: Option<T>) -> Result<(), ConfigError> {
        let Some(value) = value else { return Ok(()) };
        let text = value.to_string();
        if self.seen.insert(value) {
            Ok(())
        } else {
            Err(ConfigError::Duplicate {
                what: self.what,
                value: text,
            })
        }
    }
}

fn check_nets(nets: &[NetConfig]) -> Result<(), ConfigError> {
    let mut macs = Unique::new("The MAC address");
    let mut taps = Unique::new("The tap device");
    let mut forwards: Vec<&PortForward> = Vec::new();
    for net in nets {
        macs.add(net.mac)?;
        match &net.backend {
            NetBackendConfig::Tap { tap, lease } => {
                check_tap(tap)?;
                let lease = lease.as_deref();
                let search = lease.into_iter().flat_map(|lease| &lease.search);
                let hostname = lease.and_then(|lease| lease.hostname.as_ref());
                search
                    .chain(hostname)
                    .try_for_each(|name| check_hostname(name))?;
                taps.add(Some(tap.as_str()))?;
            }
            NetBackendConfig::User { forwards: more, .. } => {
                for forward in more {
                    if forwards.iter().any(|other| collide(other, forward)) {
                        let (what, value) = ("The host port of the forward", forward.to_string());
                        return Err(ConfigError::Duplicate { what, value });
                    }
                    forwards.push(forward);
                }
            }
        }
    }
    Ok(())
}

/// Whether two forwards listen at the same place. No address stands for all.
fn collide(one: &PortForward, other: &PortForward) -> bool {
    let addresses = one.address.zip(other.address);
    (one.protocol, one.host) == (other.protocol, other.host)
        && addresses.is_none_or(|(one, other)| one == other)
}

fn check_tap(tap: &str) -> Result<(), ConfigError> {
    let fit = (1..=MAX_INTERFACE_NAME).contains(&tap.len())
        && !tap
            .chars()
            .any(|letter| "/:%".contains(letter) || letter.is_whitespace() || letter.is_control())
        && !matches!(tap, "." | "..");
    if fit {
        Ok(())
    } else {
        Err(ConfigError::TapName(tap.escape_debug().to_string()))
    }
}

fn check_cloud_init(seed: &CloudInitConfig) -> Result<(), ConfigError> {
    for (what, path) in [
        ("user-data", &seed.user_data),
        ("SSH keys", &seed.ssh_key),
        ("network configuration", &seed.network_config),
    ] {
        path.as_deref()
            .map_or(Ok(()), |path| check_path(what, path))?;
    }
    seed.hostname.as_deref().map_or(Ok(()), check_hostname)
}

/// Checks a host name: labels, and with dots between them a domain's too.
///
/// # Errors
///
/// When it is none.
pub fn check_hostname(hostname: &str) -> Result<(), ConfigError> {
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if hostname.len() <= 253 && hostname.split('.').all(label) {
        Ok(())
    } else {
        Err(ConfigError::Hostname(crate::keys::shorten(hostname)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn check(yaml: &str) -> Result<(), String> {
        VmConfig::parse(yaml)
            .unwrap()
            .validate()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sound_machines_pass() {
        for yaml in [
            "disks: [{path: a}]",
            "boot: {kernel: k}",
            "{nets: [{tap: tap0, bootindex: 1}], boot: {net_rom: r}}",
            "boot: {kernel: k, initrd: i, cmdline: console=ttyS0}",
            "{memory: {size: 16M}, disks: [{path: a, serial: '12345678901234567890'}]}",
            "{memory: {size: 32M, hugepages: true}, boot: {kernel: k}, nets: []}",
            "{boot: {kernel: k}, nets: [{type: user, forwards: ['127.0.0.1:80:80', \
             '127.0.0.2:80:80', 'udp:80:80']}, {tap: tap0}]}",
            "{boot: {kernel: k}, cloud_init: {hostname: web-1.example.org}}",
        ] {
            assert_eq!(check(yaml), Ok(()), "{yaml}");
        }
    }

    #[test]
    fn each_rule_has_its_message() {
        for (yaml, expected) in [
            ("{}", "nothing to boot"),
            (
                "{disks: [{path: a, bootindex: 1}], nets: [{tap: t, bootindex: 1}]}",
                "The boot index 1 is there twice",
            ),
            (
                "{boot: {kernel: k}, nets: [{type: user, bootindex: 1}]}",
                "no network is booted from",
            ),
            (
                "{disks: [{path: a}], boot: {net_rom: r}}",
                "Nothing boots from the network",
            ),
            ("name: ../x", "can't name a machine"),
            ("cpus: {count: 3, cores: 2}", "3 vCPUs can't form 2 cores"),
            ("memory: {size: 8M}", "8M of memory is too little"),
            ("memory: {size: 16777217}", "use a multiple of 4K"),
            (
                "memory: {size: 17M, hugepages: true}",
                "use a multiple of 2M",
            ),
            ("boot: {initrd: i}", "`initrd` needs a kernel"),
            ("boot: {cmdline: c}", "`cmdline` needs a kernel"),
            (
                "boot: {kernel: k, bios: b}",
                "leave out --kernel or `--bios`",
            ),
            ("boot: {kernel: ''}", "path of the kernel is empty"),
            (
                "boot: {kernel: k, cmdline: \"a\\nb\"}",
                "the character '\\n'",
            ),
            (
                "{boot: {kernel: k}, nets: [{tap: a/b}]}",
                "can't name a tap device",
            ),
            (
                "{boot: {kernel: k}, nets: [{tap: a}, {tap: a}]}",
                "tap device a is there twice",
            ),
            (
                "{boot: {kernel: k}, nets: [{tap: a, mac: '52:54:00:00:00:01'}, \
                 {tap: b, mac: '52:54:00:00:00:01'}]}",
                "52:54:00:00:00:01 is there twice",
            ),
            (
                "{boot: {kernel: k}, nets: [{type: user, forwards: ['80:80']}, \
                 {type: user, forwards: ['127.0.0.1:80:81']}]}",
                "127.0.0.1:80:81 is there twice",
            ),
            (
                "{boot: {kernel: k}, nets: [{tap: a, address: 10.0.0.2/24, search: [a..b]}]}",
                "a..b",
            ),
            (
                "{boot: {kernel: k}, cloud_init: {hostname: -a}}",
                "can't be a host name",
            ),
            (
                "{boot: {kernel: k}, cloud_init: {hostname: a..b}}",
                "can't be a host name",
            ),
            (
                "{boot: {kernel: k}, cloud_init: {user_data: ''}}",
                "path of the user-data is empty",
            ),
            (
                "{boot: {kernel: k}, identity: {serial: ''}}",
                "machine's serial number is unfit",
            ),
            (
                "{boot: {kernel: k}, console: {output: {file: ''}}}",
                "path of the console is empty",
            ),
            (
                "{boot: {kernel: k}, debugcon: ''}",
                "path of the debug port is empty",
            ),
        ] {
            let error = check(yaml).unwrap_err();
            assert!(error.contains(expected), "{yaml}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn limits_are_exact() {
        let config = |taps: usize, cmdline: usize| VmConfig {
            boot: crate::BootConfig {
                kernel: Some("k".into()),
                cmdline: Some("a".repeat(cmdline)),
                ..Default::default()
            },
            agent: false,
            nets: (0..taps)
                .map(|tap| format!("tap=t{tap}").parse().unwrap())
                .collect(),
            ..VmConfig::default()
        };
        assert_eq!(config(26, 2047).validate(), Ok(()));
        assert_eq!(config(27, 0).validate(), Err(ConfigError::PciDevices(29)));
        assert!(matches!(
            config(0, 2048).validate(),
            Err(ConfigError::Cmdline(_))
        ));
    }
}
