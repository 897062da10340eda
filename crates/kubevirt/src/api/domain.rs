//! The machine itself: processors, memory, firmware, devices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_with::skip_serializing_none;

use super::disks::{Amounts, Disk};
use super::network::Interface;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A machine's hardware.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// Processors.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// What the pod asks for.
    #[serde(default)]
    pub resources: Resources,
    /// Model of the board.
    pub machine: Option<Machine>,
    /// Firmware, or what boots without.
    pub firmware: Option<Firmware>,
    /// The clock.
    pub clock: Option<Clock>,
    /// Parts of the platform.
    pub features: Option<Features>,
    /// Devices.
    #[serde(default)]
    pub devices: Devices,
    /// Threads for disks: each disk has its own here.
    pub io_threads_policy: Option<String>,
}

/// Processors.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cpu {
    /// Cores of a socket.
    pub cores: Option<u32>,
    /// Sockets.
    pub sockets: Option<u32>,
    /// Most sockets while it runs; none are added here.
    pub max_sockets: Option<u32>,
    /// Threads of a core.
    pub threads: Option<u32>,
    /// `host-model` or `host-passthrough`, which are the same here.
    pub model: Option<String>,
}

/// Memory.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// What the guest has.
    pub guest: Option<Quantity>,
    /// Most of it while it runs; none is added here.
    pub max_guest: Option<Quantity>,
}

/// What the pod asks for.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// At least.
    pub requests: Option<Amounts>,
    /// At most.
    pub limits: Option<Amounts>,
    /// Don't ask for what the machine needs beside the guest.
    pub overcommit_guest_overhead: Option<bool>,
}

/// Model of the board.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// `q35`, also with a version.
    #[serde(rename = "type")]
    pub kind: Option<String>,
}

/// Firmware, or what boots without.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Firmware {
    /// BIOS or UEFI.
    pub bootloader: Option<Bootloader>,
    /// A kernel.
    pub kernel_boot: Option<KernelBoot>,
    /// The machine's UUID.
    pub uuid: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
}

/// BIOS or UEFI.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Bootloader {
    /// BIOS.
    pub bios: Option<Bios>,
    /// UEFI.
    pub efi: Option<Efi>,
}

/// BIOS.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Bios {
    /// Show it on the serial console, as it always is here.
    pub use_serial: Option<bool>,
}

/// UEFI.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Efi {
    /// Boot only what is signed: true when absent.
    pub secure_boot: Option<bool>,
    /// Keep its variables.
    pub persistent: Option<bool>,
}

/// A kernel.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KernelBoot {
    /// Where it is.
    pub container: Option<KernelContainer>,
    /// Its command line.
    pub kernel_args: Option<String>,
}

/// A container image with a kernel.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KernelContainer {
    /// The image.
    pub image: String,
    /// When to pull it.
    pub image_pull_policy: Option<String>,
    /// Secret to pull it with.
    pub image_pull_secret: Option<String>,
    /// Absolute path of the kernel in it.
    pub kernel_path: Option<String>,
    /// Absolute path of the initial RAM disk.
    pub initrd_path: Option<String>,
}

/// The clock.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Clock {
    /// The hardware clock has UTC.
    pub utc: Option<Empty>,
    /// Timers.
    pub timer: Option<Timers>,
}

/// Timers. All that are asked for are there.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timers {
    /// The clock that KVM has for guests.
    pub kvm: Option<Timer>,
    /// The interval timer.
    pub pit: Option<Timer>,
    /// The real-time clock.
    pub rtc: Option<Timer>,
    /// The high precision event timer: there is none.
    pub hpet: Option<Timer>,
}

/// A timer.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Timer {
    /// Whether there is one.
    pub present: Option<bool>,
    /// What becomes of ticks that came too late: KVM decides.
    pub tick_policy: Option<String>,
}

/// Parts of the platform.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Features {
    /// Always there.
    pub acpi: Option<Enabled>,
    /// Always there.
    pub apic: Option<Enabled>,
}

/// Whether there is one.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Enabled {
    /// True when absent.
    pub enabled: Option<bool>,
}

/// Devices.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Devices {
    /// Disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Random numbers: always there.
    pub rng: Option<Empty>,
    /// Resets a guest that hangs.
    pub watchdog: Option<Watchdog>,
    /// There is no display; accepted, as manifests have it.
    pub autoattach_graphics_device: Option<bool>,
    /// There is no display to point at; accepted.
    pub autoattach_input_device: Option<bool>,
    /// Always there.
    pub autoattach_mem_balloon: Option<bool>,
    /// Without interfaces, make one on the pod's network: true when absent.
    pub autoattach_pod_interface: Option<bool>,
    /// Always there.
    pub autoattach_serial_console: Option<bool>,
    /// Always so: the pod's log is the serial console.
    pub log_serial_console: Option<bool>,
    /// Always one queue for each disk and vCPU.
    pub block_multi_queue: Option<bool>,
}

/// Resets a guest that hangs.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Watchdog {
    /// What the guest calls it.
    #[serde(default)]
    pub name: String,
    /// The model that there is.
    pub i6300esb: Option<WatchdogModel>,
}

/// What a watchdog does.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WatchdogModel {
    /// `reset`, `poweroff` or `shutdown`.
    pub action: Option<String>,
}

/// A field that says something by being there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Empty {}
