//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, DiskBus, DiskKind};

/// A disk image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device; empty for a CD-ROM drive without a disc.
    pub path: PathBuf,
    /// What the guest takes it for.
    #[serde(default)]
    pub kind: DiskKind,
    /// How the guest reaches it; by the kind's own way when absent, see [`DiskConfig::bus`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<DiskBus>,
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
    /// Further files that the image's data is in, in the order in which it names them: the external
    /// data file of a qcow2, the extents of a VMDK. Like backing files, they are only used if given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_file: Vec<PathBuf>,
    /// The disk in an OVA archive of several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// ID or name of an internal snapshot of a qcow2, to be read in place of its present state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_snapshot: Option<String>,
    /// File that keeps what the guest writes, over the image, which stays as it is. Made when it
    /// is not there yet. With `ro` or `snapshot` it is only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PathBuf>,
    /// Size of the disk with its overlay, which may be larger than the image. As large as the
    /// image when absent; an overlay that is there grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<ByteSize>,
    /// Guest writes go to a throw-away overlay; the image stays as it is.
    #[serde(default)]
    pub snapshot: bool,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Request queues; as many as vCPUs (at most 4) when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// By which means the image is read and written.
    #[serde(default)]
    pub aio: DiskAio,
    /// What to do about requests that the host fails.
    #[serde(default, alias = "error-policy")]
    pub error_policy: DiskErrorPolicy,
    /// Bytes a second, of reads and writes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps: Option<ByteSize>,
    /// Bytes a second of reads.
    #[serde(default, alias = "bps-read", skip_serializing_if = "Option::is_none")]
    pub bps_read: Option<ByteSize>,
    /// Bytes a second of writes.
    #[serde(default, alias = "bps-write", skip_serializing_if = "Option::is_none")]
    pub bps_write: Option<ByteSize>,
    /// Bytes at once after a rest, for each of the limits on bytes; a tenth of a second's worth
    /// when absent.
    #[serde(default, alias = "bps-burst", skip_serializing_if = "Option::is_none")]
    pub bps_burst: Option<ByteSize>,
    /// Requests a second, of reads and writes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Reads a second.
    #[serde(default, alias = "iops-read", skip_serializing_if = "Option::is_none")]
    pub iops_read: Option<u64>,
    /// Writes a second.
    #[serde(default, alias = "iops-write", skip_serializing_if = "Option::is_none")]
    pub iops_write: Option<u64>,
    /// Requests at once after a rest, for each of the limits on requests; a tenth of a second's
    /// worth when absent.
    #[serde(default, alias = "iops-burst", skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
}

/// By which means a disk image is read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAio {
    /// io_uring where the host has and allows it, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or nothing.
    IoUring,
    /// Calls that block, in the thread of each queue.
    Threads,
}

/// What to do about requests that the host fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskErrorPolicy {
    /// Pause the machine; the requests are tried again when it goes on.
    #[default]
    Stop,
    /// Tell the guest.
    Report,
    /// Tell the guest that all is well.
    Ignore,
    /// Pause for want of space, tell the guest of other errors.
    EnoSpace,
}

impl DiskConfig {
    /// The image at `path`, writable, with everything else by default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ..Self::default()
        }
    }

    /// Which image the disk is made of, and how it is read.
    #[must_use]
    pub fn image(&self) -> ImageConfig {
        let Self {
            path,
            format,
            backing,
            data_file,
            member,
            internal_snapshot,
            ..
        } = self.clone();
        ImageConfig {
            path,
            format,
            backing,
            data_file,
            member,
            internal_snapshot,
        }
    }

    /// Whether the guest's writes go into the image itself.
    #[must_use]
    pub fn is_written(&self) -> bool {
        !self.is_cdrom() && !self.ro && !self.snapshot && self.overlay.is_none()
    }
}

/// An image by itself, as the tools for images take it. The keys are those of [`DiskConfig`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Format; found from the content when absent.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// Backing files from the nearest to the base.
    #[serde(default)]
    pub backing: Vec<PathBuf>,
    /// Further files that the image's data is in.
    #[serde(default)]
    pub data_file: Vec<PathBuf>,
    /// The disk in an OVA archive of several.
    #[serde(default)]
    pub member: Option<String>,
    /// ID or name of an internal snapshot of a qcow2.
    #[serde(default)]
    pub internal_snapshot: Option<String>,
}

/// A disk image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU copy-on-write 2 and 3.
    Qcow2,
    /// VMware's disks. They are only read, as are all that follow.
    Vmdk,
    /// Archives of machines.
    Ova,
    /// Virtual PC's disks and Hyper-V's of the first generation.
    Vhd,
    /// Hyper-V's disks.
    Vhdx,
    /// VirtualBox's disks.
    Vdi,
}
