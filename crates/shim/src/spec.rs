//! What the shim reads of a container's OCI runtime specification (1.2, config.json).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Longest config.json that is read, in bytes.
const MAX_SPEC: u64 = 4 << 20;
/// Annotation by which CRI tells a pod's sandbox from its containers.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Annotation with the ID of a container's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Annotation with a container's name in its pod.
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
/// Annotations that together name a pod's container again when the pod was made anew.
const POD: [&str; 3] = [
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-name",
    CONTAINER_NAME,
];

/// Why there is no specification.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file can't be read.
    #[error("Can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// It is none.
    #[error("{} is not an OCI runtime specification", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// A container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Spec {
    /// Its root file system.
    pub root: Root,
    /// Host name.
    pub hostname: String,
    /// What others tell of it.
    pub annotations: BTreeMap<String, String>,
    /// What is mounted in it.
    pub mounts: Vec<Mount>,
    /// What runs in it.
    pub process: Process,
    /// What is Linux's.
    pub linux: Linux,
}

/// A root file system.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
}

/// What runs in the container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Its environment, each `NAME=VALUE`.
    pub env: Vec<String>,
    /// How easily it becomes a victim where memory runs out, -1000 to 1000.
    #[serde(rename = "oomScoreAdj")]
    pub oom_score_adj: Option<i32>,
}

/// Something mounted in the container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where.
    pub destination: String,
    /// What of the host, of a bind mount.
    pub source: PathBuf,
    /// Kind of file system, or `bind`.
    #[serde(rename = "type")]
    pub kind: String,
    /// How.
    pub options: Vec<String>,
}

impl Mount {
    /// Whether it shows something of the host.
    pub fn is_bind(&self) -> bool {
        let bind = |option: &String| matches!(option.as_str(), "bind" | "rbind");
        self.kind == "bind" || self.options.iter().any(bind)
    }
}

/// What is Linux's.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// Where the control group is.
    pub cgroups_path: String,
    /// Namespaces to join or make.
    pub namespaces: Vec<Namespace>,
    /// Devices that it has beside those that every container has.
    pub devices: Vec<Device>,
    /// Limits.
    pub resources: Resources,
}

/// A namespace.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// `network`, `uts`, `ipc` and others.
    #[serde(rename = "type")]
    pub kind: String,
    /// That of a process or a mount; a new one when absent.
    pub path: Option<PathBuf>,
}

/// A device.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Where the container has it.
    pub path: String,
    /// `b` for a block device; `c`, `u` and `p` are others.
    #[serde(rename = "type")]
    pub kind: String,
    /// Number of its driver.
    pub major: i64,
    /// Its number among those.
    pub minor: i64,
}

/// Limits of a control group.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Memory.
    pub memory: Memory,
    /// Processors.
    pub cpu: Cpu,
    /// Number of processes.
    pub pids: Pids,
    /// What may be done with devices; of rules for the same device the last one holds.
    pub devices: Vec<DeviceRule>,
}

/// What may be done with a device, or with all.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Whether it may be.
    pub allow: bool,
    /// As of a device; all when absent.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// As of a device; all when absent.
    pub major: Option<i64>,
    /// As of a device; all when absent.
    pub minor: Option<i64>,
    /// Letters of what: `r`, `w` and `m`.
    pub access: String,
}

impl Resources {
    /// Whether a device of the container may be written to.
    pub fn may_write(&self, device: &Device) -> bool {
        let of_it = |rule: &&DeviceRule| {
            let kind = rule.kind.as_deref();
            kind.is_none_or(|kind| kind == "a" || kind == device.kind)
                && rule.major.is_none_or(|major| major == device.major)
                && rule.minor.is_none_or(|minor| minor == device.minor)
        };
        // A rule without any letters is about all of them.
        let of_writes = |rule: &&DeviceRule| rule.access.is_empty() || rule.access.contains('w');
        let rules = self.devices.iter().rev();
        let last = rules.filter(of_it).find(of_writes);
        last.is_some_and(|rule| rule.allow)
    }
}

/// Limits of memory.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// In bytes; none when absent or not positive.
    pub limit: Option<i64>,
}

/// Limits of processors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Weight, 1024 for one processor.
    pub shares: Option<u64>,
    /// Microseconds in each period; none when absent or not positive.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
}

/// Limits of processes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// None when absent or not positive.
    pub limit: Option<i64>,
}

impl Memory {
    /// The limit in bytes, if there is one.
    pub fn bytes(&self) -> Option<u64> {
        let limit = u64::try_from(self.limit?).ok()?;
        // cgroup v1 writes "none" as the largest number of pages.
        (limit > 0 && limit < 1 << 60).then_some(limit)
    }
}

impl Spec {
    /// Reads the specification in a bundle.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_SPEC).read_to_end(&mut text));
        if let Err(source) = read {
            return Err(SpecError::Read { path, source });
        }
        serde_json::from_slice(&text).map_err(|source| SpecError::Parse { path, source })
    }

    /// Whether it is a pod's sandbox.
    pub fn is_sandbox(&self) -> bool {
        self.annotations.get(CONTAINER_TYPE).map(String::as_str) == Some("sandbox")
    }

    /// ID of the sandbox, if there is one.
    pub fn sandbox_id(&self) -> Option<&str> {
        self.annotations.get(SANDBOX_ID).map(String::as_str)
    }

    /// The container's name in its pod.
    pub fn container_name(&self) -> Option<&str> {
        self.annotations.get(CONTAINER_NAME).map(String::as_str)
    }

    /// Whether a namespace of a kind is to be made.
    pub fn makes_namespace(&self, kind: &str) -> bool {
        self.namespace(kind).is_some_and(|one| one.path.is_none())
    }

    /// What names the container among all of a cluster: namespace, pod and its name in that. `None`
    /// outside of a pod.
    pub fn pod(&self) -> Option<String> {
        let names = POD.map(|name| self.annotations.get(name).map(String::as_str));
        let names: Option<Vec<&str>> = names.into_iter().collect();
        Some(names?.join("/"))
    }

    /// The host name: a container of a pod has the pod's, of which it is told by its environment.
    pub fn hostname(&self) -> Option<&str> {
        let env = self.process.env.iter();
        let told = || env.rev().find_map(|line| line.strip_prefix("HOSTNAME="));
        let own = Some(self.hostname.as_str()).filter(|name| !name.is_empty());
        own.or_else(told).filter(|name| !name.is_empty())
    }

    /// The namespace of a kind.
    pub fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.linux
            .namespaces
            .iter()
            .find(|namespace| namespace.kind == kind)
    }

    /// What of the host is mounted at a place.
    pub fn mounted_at(&self, place: &str) -> Option<&Path> {
        let mut mounts = self.mounts.iter().filter(|mount| mount.is_bind());
        let mount = mounts.find(|mount| mount.destination == place)?;
        Some(&mount.source)
    }

    /// The root file system's folder.
    pub fn root(&self, bundle: &Path) -> PathBuf {
        bundle.join(&self.root.path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_cri_writes_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let text = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs","readonly":true},"hostname":"p",
            "annotations":{"io.kubernetes.cri.container-type":"container",
            "io.kubernetes.cri.sandbox-id":"s1"},"linux":{"cgroupsPath":"/k/p/c",
            "resources":{"memory":{"limit":268435456,"swap":268435456},
            "cpu":{"shares":512,"quota":-1,"period":100000},"devices":[{"allow":false}]},
            "namespaces":[{"type":"pid"},{"type":"network","path":"/proc/7/ns/net"}]}}"#;
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let spec = Spec::read(folder.path()).unwrap();
        assert!(!spec.is_sandbox());
        assert_eq!(spec.sandbox_id(), Some("s1"));
        assert_eq!((spec.pod(), spec.hostname()), (None, Some("p")));
        assert_eq!(spec.root(folder.path()), folder.path().join("rootfs"));
        assert_eq!(spec.linux.resources.memory.bytes(), Some(256 << 20));
        let network = spec.namespace("network").unwrap();
        assert_eq!(network.path.as_deref(), Some(Path::new("/proc/7/ns/net")));
        for limit in [None, Some(-1), Some(0), Some(0x7fff_ffff_ffff_f000)] {
            assert_eq!(Memory { limit }.bytes(), None);
        }
    }
}
