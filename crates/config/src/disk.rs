//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A disk image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Format; found from the content when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The guest can't write.
    #[serde(default)]
    pub ro: bool,
    /// Serial number that the guest sees, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Place in the firmware's boot order, lowest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootindex: Option<u32>,
    /// Backing files from the nearest to the base. An image that names a backing file itself is
    /// refused unless its chain is given here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
    /// Guest writes go to a throw-away overlay; the image stays as it is.
    #[serde(default)]
    pub snapshot: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Request queues; as many as vCPUs (at most 4) when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

impl DiskConfig {
    /// The image at `path`, writable, with everything else by default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }
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
