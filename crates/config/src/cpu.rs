//! Virtual CPUs and memory.

use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// Virtual CPUs and their topology. `sockets * cores * threads == count`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// Number of vCPUs.
    pub count: u8,
    /// Sockets; worked out when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u8>,
    /// Cores per socket; worked out when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<u8>,
    /// Threads per core; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u8>,
}

impl CpuConfig {
    /// `count` vCPUs as the cores of one socket.
    #[must_use]
    pub const fn new(count: u8) -> Self {
        Self {
            count,
            sockets: None,
            cores: None,
            threads: None,
        }
    }
}

/// Two vCPUs, or one on a host that has no more.
impl Default for CpuConfig {
    fn default() -> Self {
        let host = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(if host > 1 { 2 } else { 1 })
    }
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Size in bytes; files and flags take `512M`, `4G`.
    pub size: ByteSize,
    /// Backs it with huge pages of the host (must be reserved beforehand).
    pub hugepages: bool,
    /// Gives the guest a balloon, by which memory that it does not need goes back to the host. One
    /// with huge pages has none.
    pub balloon: bool,
}

/// 1 GiB: enough for the cloud image of any distribution.
impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize::mib(1024),
            hugepages: false,
            balloon: true,
        }
    }
}
