//! The console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
