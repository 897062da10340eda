//! Annotations `edgevmm.io/*` of a pod: what a pod's specification has no field for.

use std::collections::BTreeMap;

use edgevmm_config::{
    ByteSize, CpuConfig, DiskBus, FirmwareChoice, WatchdogAction, WatchdogConfig,
};
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use uuid::Uuid;

use crate::disks::{DisksError, Wishes};
use crate::network::{Mode, is_interface};

/// What all of ours begin with.
const PREFIX: &str = "edgevmm.io/";
/// Names after the prefix, in the order in which messages list them.
const NAMES: [&str; 22] = [
    "cloud-init",
    "cmdline",
    "container",
    "cpus",
    "create-disk",
    "disk",
    "disk-bus",
    "disks",
    "firmware",
    "initrd",
    "kernel",
    "lan",
    "memory",
    "network",
    "network-data",
    "overlay",
    "serial",
    "spoof",
    "ssh-keys",
    "user-data",
    "uuid",
    "watchdog",
];
/// Longest user-data and SSH keys, in bytes: what a pod's annotations have in all.
const MAX_TEXT: usize = 256 << 10;

/// What annotations ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Guest memory; what the container's limit leaves when absent.
    pub memory: Option<ByteSize>,
    /// vCPUs; as many as the container may use when absent.
    pub cpus: Option<CpuConfig>,
    /// Name of the image in the container image's folder /disk.
    pub disk: Option<String>,
    /// How the guest reaches disks of which nothing else is said.
    pub disk_bus: Option<DiskBus>,
    /// How it has each disk.
    pub disks: Wishes,
    /// What boots it.
    pub firmware: Option<FirmwareChoice>,
    /// Absolute path of a kernel in the container image.
    pub kernel: Option<String>,
    /// Absolute path of its initial RAM disk.
    pub initrd: Option<String>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// How it is connected to the pod's network.
    pub network: Option<Mode>,
    /// Name of the pod's container that is the machine.
    pub container: Option<String>,
    /// Interface of the node to whose network it is connected too.
    pub lan: Option<String>,
    /// Whether a guest that has the pod's addresses may send as others.
    pub spoof: bool,
    /// Volumes that get an empty disk of that size when they have none.
    pub create_disk: Vec<(String, ByteSize)>,
    /// Volume that keeps what the guest writes to the disk in the container image.
    pub overlay: Option<String>,
    /// Volume with what cloud-init is told.
    pub cloud_init: Option<String>,
    /// What cloud-init is told.
    pub user_data: Option<String>,
    /// How cloud-init sets up the guest's network.
    pub network_data: Option<String>,
    /// The machine's UUID, which cloud-init knows it by.
    pub uuid: Option<Uuid>,
    /// The machine's serial number.
    pub serial: Option<String>,
    /// What becomes of a guest that hangs; it has no watchdog when absent.
    pub watchdog: Option<WatchdogConfig>,
    /// Public keys that may log in by cloud-init, each on a line.
    pub ssh_keys: Option<String>,
}

/// Why annotations make no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// There is none of that name.
    #[error("There is no annotation `{PREFIX}{0}`: use one of {list}", list = NAMES.join(", "))]
    Unknown(String),
    /// The value can't be one.
    #[error("`{value}` is no value for the annotation `{PREFIX}{name}`: {expected}")]
    Value {
        /// Name after the prefix.
        name: String,
        /// The value.
        value: String,
        /// What to write.
        expected: &'static str,
    },
    /// What is said of disks can't be.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// Two say the same thing.
    #[error("The annotations `{PREFIX}{0}` and `{PREFIX}{1}` exclude each other: leave one out")]
    Both(&'static str, &'static str),
    /// A kernel's companion came without it.
    #[error("The annotation `{PREFIX}{0}` needs `{PREFIX}kernel` to go with it")]
    NoKernel(&'static str),
}

impl Annotations {
    /// Reads ours among all annotations of a container.
    ///
    /// # Errors
    ///
    /// Names the one that is unknown or has a wrong value.
    pub fn parse(all: &BTreeMap<String, String>) -> Result<Self, AnnotationError> {
        let mut ours = Self::default();
        for (key, value) in all {
            if let Some(name) = key.strip_prefix(PREFIX) {
                ours.set(name, value)?;
            }
        }
        if ours.kernel.is_none() {
            let initrd = ours.initrd.as_ref().map(|_| "initrd");
            let cmdline = ours.cmdline.as_ref().map(|_| "cmdline");
            if let Some(name) = initrd.or(cmdline) {
                return Err(AnnotationError::NoKernel(name));
            }
        }
        for (name, text) in [
            ("user-data", &ours.user_data),
            ("network-data", &ours.network_data),
        ] {
            if ours.cloud_init.is_some() && text.is_some() {
                return Err(AnnotationError::Both("cloud-init", name));
            }
        }
        Ok(ours)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), AnnotationError> {
        let wrong = |expected| AnnotationError::Value {
            name: name.to_owned(),
            value: value.chars().take(100).collect(),
            expected,
        };
        match name {
            "memory" => {
                let size = value.parse();
                self.memory = Some(size.map_err(|_| wrong("write a size, like 512M"))?);
            }
            "cpus" => {
                self.cpus = Some(cpus(value).ok_or_else(|| wrong(CPUS))?);
            }
            "disk" => self.disk = Some(file_name(value).ok_or_else(|| wrong(DISK))?),
            "disk-bus" => {
                self.disk_bus = Some(match value {
                    "virtio" => DiskBus::Virtio,
                    "sata" => DiskBus::Sata,
                    _ => return Err(wrong("write virtio or sata")),
                });
            }
            "disks" => self.disks = Wishes::parse(value)?,
            "firmware" => {
                let choice = [
                    FirmwareChoice::Auto,
                    FirmwareChoice::Bios,
                    FirmwareChoice::Uefi,
                    FirmwareChoice::Fast,
                ];
                let choice = choice.into_iter().find(|choice| choice.name() == value);
                let expected = "write auto, bios, uefi or fast";
                self.firmware = Some(choice.ok_or_else(|| wrong(expected))?);
            }
            "kernel" => self.kernel = Some(path(value).ok_or_else(|| wrong(PATH))?),
            "initrd" => self.initrd = Some(path(value).ok_or_else(|| wrong(PATH))?),
            "cmdline" => self.cmdline = Some(value.to_owned()),
            "network" => {
                self.network = Some(match value {
                    "bridge" => Mode::Bridge,
                    "masquerade" => Mode::Masquerade,
                    "none" => Mode::None,
                    _ => return Err(wrong("write bridge, masquerade or none")),
                });
            }
            "container" => self.container = Some(file_name(value).ok_or_else(|| wrong(CONTAINER))?),
            "lan" => {
                let name = Some(value).filter(|name| is_interface(name));
                let name =
                    name.ok_or_else(|| wrong("write the name of an interface, like eth1"))?;
                self.lan = Some(name.to_owned());
            }
            "spoof" => {
                self.spoof = match value {
                    "allow" => true,
                    "deny" => false,
                    _ => return Err(wrong("write allow or deny")),
                };
            }
            "create-disk" => self.create_disk = sizes(value).ok_or_else(|| wrong(SIZES))?,
            "overlay" => self.overlay = Some(volume(value).ok_or_else(|| wrong(VOLUME))?),
            "cloud-init" => self.cloud_init = Some(volume(value).ok_or_else(|| wrong(VOLUME))?),
            "user-data" => self.user_data = Some(text(value).ok_or_else(|| wrong(TEXT))?),
            "network-data" => self.network_data = Some(text(value).ok_or_else(|| wrong(TEXT))?),
            "uuid" => self.uuid = Some(value.parse().map_err(|_| wrong("write a UUID"))?),
            "serial" => self.serial = Some(value.to_owned()),
            "watchdog" => {
                let action = WatchdogAction::deserialize(
                    StrDeserializer::<serde::de::value::Error>::new(value),
                );
                let action = action.map_err(|_| wrong(WATCHDOG))?;
                self.watchdog = Some(WatchdogConfig { action });
            }
            "ssh-keys" => self.ssh_keys = Some(text(value).ok_or_else(|| wrong(TEXT))?),
            _ => {
                let name = name.chars().take(100).collect();
                return Err(AnnotationError::Unknown(name));
            }
        }
        Ok(())
    }
}

const CPUS: &str = "write a number of vCPUs, like 2, and how they are arranged if that matters, like \
                    4,sockets=2,cores=2; the product of all that is given must be that number";
const WATCHDOG: &str = "write reset, shutdown, end, pause or report";
const DISK: &str = "write the name of a file in the image's folder /disk, like disk.qcow2";
const PATH: &str = "write the absolute path of a file in the container image, like /boot/vmlinuz";
const CONTAINER: &str = "write the name of a container of the pod";
const VOLUME: &str = "write the name of a volume, or where the container mounts it";
const SIZES: &str = "write volumes with sizes in whole MiB, like data=10G,logs=512M";
const TEXT: &str = "write at most 256 KiB of text";

/// A name that leads nowhere else.
fn file_name(value: &str) -> Option<String> {
    let plain = !value.is_empty() && value != "." && value != "..";
    (plain && !value.contains(['/', '\0'])).then(|| value.to_owned())
}

fn volume(value: &str) -> Option<String> {
    let plain = !value.is_empty() && !value.chars().any(char::is_control);
    plain.then(|| value.to_owned())
}

/// Volumes with sizes of disks.
fn sizes(value: &str) -> Option<Vec<(String, ByteSize)>> {
    let pairs = value.split(',').map(|pair| {
        let (name, size) = pair.trim().split_once('=')?;
        let size: ByteSize = size.parse().ok()?;
        let fits = size.0 > 0 && size.0.is_multiple_of(1 << 20) && i64::try_from(size.0).is_ok();
        let name = volume(name).filter(|_| fits)?;
        Some((name, size))
    });
    pairs.collect()
}

/// A number of vCPUs and their topology, as `edgevmm run --cpus` takes it.
fn cpus(value: &str) -> Option<CpuConfig> {
    value.split(',').next()?.parse::<u8>().ok()?;
    let cpus: CpuConfig = value.parse().ok()?;
    cpus.topology().is_ok().then_some(cpus)
}

fn text(value: &str) -> Option<String> {
    (value.len() <= MAX_TEXT).then(|| value.to_owned())
}

fn path(value: &str) -> Option<String> {
    let inner = value.strip_prefix('/')?;
    let plain = inner.split('/').all(|part| file_name(part).is_some());
    plain.then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Annotations, AnnotationError> {
        let pairs = pairs.iter();
        let pairs = pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Annotations::parse(&pairs.collect())
    }

    #[test]
    fn all_are_read_and_foreign_ones_are_left_alone() {
        let annotations = parse(&[
            ("edgevmm.io/memory", "512M"),
            ("edgevmm.io/cpus", "4,sockets=2,threads=2"),
            ("edgevmm.io/disks", "data,bus=sata\ncontainerDisk,ro"),
            ("edgevmm.io/watchdog", "end"),
            ("edgevmm.io/disk", "a.qcow2"),
            ("edgevmm.io/disk-bus", "sata"),
            ("edgevmm.io/firmware", "uefi"),
            ("edgevmm.io/kernel", "/boot/vmlinuz"),
            ("edgevmm.io/initrd", "/boot/initrd"),
            ("edgevmm.io/cmdline", "console=ttyS0"),
            ("edgevmm.io/network", "masquerade"),
            ("edgevmm.io/lan", "eth1"),
            ("edgevmm.io/spoof", "allow"),
            ("edgevmm.io/create-disk", "data=10G, /logs=512M"),
            ("edgevmm.io/container", "vm"),
            ("edgevmm.io/overlay", "/state"),
            ("edgevmm.io/cloud-init", "seed"),
            ("edgevmm.io/ssh-keys", "ssh-ed25519 AAAA"),
            ("edgevmm.io/uuid", "67e55044-10b1-426f-9247-bb680e5fe0c8"),
            ("edgevmm.io/serial", "S-1"),
            ("io.kubernetes.cri.container-type", "sandbox"),
        ]);
        let expected = Annotations {
            memory: Some(ByteSize::mib(512)),
            cpus: Some(CpuConfig {
                sockets: Some(2),
                threads: Some(2),
                ..CpuConfig::new(4)
            }),
            disk: Some("a.qcow2".to_owned()),
            disk_bus: Some(DiskBus::Sata),
            disks: Wishes::parse("data,bus=sata\ncontainerDisk,ro").unwrap(),
            firmware: Some(FirmwareChoice::Uefi),
            kernel: Some("/boot/vmlinuz".to_owned()),
            initrd: Some("/boot/initrd".to_owned()),
            cmdline: Some("console=ttyS0".to_owned()),
            network: Some(Mode::Masquerade),
            container: Some("vm".to_owned()),
            lan: Some("eth1".to_owned()),
            spoof: true,
            create_disk: vec![
                ("data".to_owned(), ByteSize::mib(10 << 10)),
                ("/logs".to_owned(), ByteSize::mib(512)),
            ],
            overlay: Some("/state".to_owned()),
            cloud_init: Some("seed".to_owned()),
            user_data: None,
            network_data: None,
            uuid: Some(Uuid::from_u128(0x67e5_5044_10b1_426f_9247_bb68_0e5f_e0c8)),
            serial: Some("S-1".to_owned()),
            watchdog: Some(WatchdogConfig {
                action: WatchdogAction::End,
            }),
            ssh_keys: Some("ssh-ed25519 AAAA".to_owned()),
        };
        assert_eq!(annotations, Ok(expected));
    }

    #[test]
    fn unknown_ones_are_named() {
        let error = parse(&[("edgevmm.io/memroy", "1G")]).unwrap_err();
        assert!(error.to_string().contains("`edgevmm.io/memroy`"), "{error}");
        for name in NAMES {
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn wrong_values_are_told_with_what_is_right() {
        for (name, value) in [
            ("memory", "much"),
            ("cpus", "0"),
            ("cpus", "256"),
            ("cpus", "sockets=2"),
            ("cpus", "4,sockets=3"),
            ("cpus", "4,core=2"),
            ("watchdog", "poweroff"),
            ("disk", "../a"),
            ("disk", ".."),
            ("disk-bus", "ide"),
            ("firmware", "none"),
            ("kernel", "boot/vmlinuz"),
            ("kernel", "/boot/../../etc/shadow"),
            ("initrd", "/"),
            ("network", "user"),
            ("lan", "../eth1"),
            ("spoof", "yes"),
            ("create-disk", "data"),
            ("create-disk", "data=0"),
            ("create-disk", "data=1K"),
            ("create-disk", "data=8388608T"),
            ("create-disk", "=1G"),
            ("overlay", ""),
            ("user-data", &"x".repeat(MAX_TEXT + 1)),
        ] {
            let error = parse(&[(&format!("edgevmm.io/{name}"), value)]).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("write "), "{text}");
        }
        let error = parse(&[("edgevmm.io/disks", "data,bus=ide")]).unwrap_err();
        let text = crate::chain(&error);
        assert!(
            text.contains("edgevmm.io/disks") && text.contains("ide"),
            "{text}"
        );
        let error = parse(&[("edgevmm.io/initrd", "/i")]);
        assert_eq!(error, Err(AnnotationError::NoKernel("initrd")));
        let error = parse(&[
            ("edgevmm.io/user-data", "#!"),
            ("edgevmm.io/cloud-init", "x"),
        ]);
        let expected = AnnotationError::Both("cloud-init", "user-data");
        assert_eq!(error, Err(expected));
    }

    proptest! {
        #[test]
        fn no_value_panics(index in 0..NAMES.len(), value: String) {
            let key = format!("edgevmm.io/{}", NAMES[index]);
            let _ = parse(&[(&key, &value)]);
        }
    }
}
