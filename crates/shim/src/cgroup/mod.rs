//! The control group of a container, version 1 or 2: made, limited, read and removed here, as there
//! is no runc that would.

mod path;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use path::relative;

use crate::spec::Resources;

/// Where control groups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// Hierarchies of version 1 that a container gets a group in. Those of processors are one on most hosts,
/// which have it by three names.
const V1: [&str; 7] = [
    "memory",
    "cpu,cpuacct",
    "cpu",
    "cpuacct",
    "pids",
    "devices",
    "freezer",
];
/// Controllers of version 2 that a container's group needs.
const V2: [&str; 4] = ["memory", "cpu", "pids", "io"];
/// Times that a group is removed again, as it is busy until the last process has gone.
const REMOVALS: u32 = 100;
/// Time between two of them.
const PAUSE: Duration = Duration::from_millis(10);

/// Which version the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

/// A container's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    version: Version,
    folders: Vec<PathBuf>,
    /// Limits that were set, by file.
    limits: Arc<Mutex<Limits>>,
}

type Limits = BTreeMap<&'static str, String>;

impl Cgroup {
    /// Makes the group at a path below the mount, with the limits given. Limits that the host does
    /// not take are told and left out: a container without them is better than none.
    ///
    /// # Errors
    ///
    /// When there is no memory group, or none at all.
    pub fn create(
        group: &Path,
        resources: &Resources,
        warn: impl FnMut(String),
    ) -> io::Result<Self> {
        let mount = Path::new(MOUNT);
        let cgroup = if mount.join("cgroup.controllers").exists() {
            Self::create_v2(mount, group)?
        } else {
            Self::create_v1(mount, group)?
        };
        cgroup.limit(resources, warn);
        Ok(cgroup)
    }

    fn create_v2(mount: &Path, group: &Path) -> io::Result<Self> {
        let mut folder = mount.to_owned();
        for part in group {
            hand_down(&folder);
            folder.push(part);
            make(&folder)?;
        }
        Ok(Self {
            version: Version::V2,
            folders: vec![folder],
            limits: Arc::default(),
        })
    }

    fn create_v1(mount: &Path, group: &Path) -> io::Result<Self> {
        let mut folders = Vec::new();
        for hierarchy in V1 {
            let Ok(hierarchy) = mount.join(hierarchy).canonicalize() else {
                continue;
            };
            let folder = hierarchy.join(group);
            if hierarchy.join("cgroup.procs").exists() && !folders.contains(&folder) {
                fs::create_dir_all(&folder)?;
                folders.push(folder);
            }
        }
        if folders.is_empty() {
            let message = format!("no control groups are mounted at {}", mount.display());
            return Err(io::Error::other(message));
        }
        Ok(Self {
            version: Version::V1,
            folders,
            limits: Arc::default(),
        })
    }

    /// Sets limits; those that are not given stay as they are.
    pub fn limit(&self, resources: &Resources, mut warn: impl FnMut(String)) {
        let mut values = self.values(resources);
        self.write(&mut values, &mut warn);
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.extend(values);
    }

    /// Sets the limits again where somebody has taken them. systemd does not know our groups in its
    /// slices, as no unit stands for them: it may take the controllers from a slice when it is
    /// reloaded, and the limits go with them.
    pub fn restore(&self, mut warn: impl FnMut(String)) {
        let limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |file: &str| {
            limits.contains_key(file)
                && self.read(file).is_none_or(|value| value.starts_with("max"))
        };
        if self.version != Version::V2 || !taken("memory.max") {
            return;
        }
        let mut values: Vec<_> = limits.clone().into_iter().collect();
        drop(limits);
        for folder in self.folders.iter().filter_map(|folder| folder.parent()) {
            hand_down(folder);
        }
        warn("The control group's limits were gone, and are set again".to_owned());
        self.write(&mut values, &mut warn);
    }

    /// Leaves of the values those that could be written.
    fn write(&self, values: &mut Vec<(&'static str, String)>, warn: &mut impl FnMut(String)) {
        values.retain(|(file, value)| {
            let Some(path) = self.find(file) else {
                warn(format!("The host has no {file} to limit a container by"));
                return false;
            };
            let written = fs::write(&path, value);
            if let Err(error) = &written {
                warn(format!(
                    "Can't write {value} to {}: {error}",
                    path.display()
                ));
            }
            written.is_ok()
        });
    }

    /// Files and what to write to them.
    fn values(&self, resources: &Resources) -> Vec<(&'static str, String)> {
        let mut values = Vec::new();
        let cpu = &resources.cpu;
        let period = cpu.period.filter(|period| *period > 0);
        let pids = resources.pids.limit.filter(|limit| *limit > 0);
        let memory = resources.memory.bytes();
        match self.version {
            Version::V1 => {
                values.extend(memory.map(|limit| ("memory.limit_in_bytes", limit.to_string())));
                values.extend(cpu.shares.map(|shares| ("cpu.shares", shares.to_string())));
                values.extend(period.map(|period| ("cpu.cfs_period_us", period.to_string())));
                values.extend(
                    cpu.quota
                        .map(|quota| ("cpu.cfs_quota_us", quota.to_string())),
                );
            }
            Version::V2 => {
                values.extend(memory.map(|limit| ("memory.max", limit.to_string())));
                let weight = cpu.shares.filter(|shares| *shares > 0).map(weight);
                values.extend(weight.map(|weight| ("cpu.weight", weight.to_string())));
                let quota = cpu.quota.map(|quota| match quota {
                    1.. => quota.to_string(),
                    _ => "max".to_owned(),
                });
                values
                    .extend(quota.map(|quota| {
                        ("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)))
                    }));
            }
        }
        values.extend(pids.map(|limit| ("pids.max", limit.to_string())));
        values
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its folders: one, or one for each controller.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// The content of one of its files; `None` where there is none.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.find(file)?).ok()
    }

    /// IDs of its processes.
    pub fn processes(&self) -> Vec<u32> {
        let text = self.read("cgroup.procs").unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        let paths = self.folders.iter().map(|folder| folder.join(file));
        paths.into_iter().find(|path| path.exists())
    }
}

/// The weight of version 2 for shares of version 1, on a scale from 1 to 10000 in place of 2 to
/// 262144.
fn weight(shares: u64) -> u64 {
    1 + shares.clamp(2, 262_144).saturating_sub(2) * 9999 / 262_142
}

/// Has a group hand controllers down to those in it, which each does only when it is told to.
fn hand_down(folder: &Path) {
    for controller in V2 {
        let file = folder.join("cgroup.subtree_control");
        let _ = fs::write(file, format!("+{controller}"));
    }
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Removes folders of a group, once their last processes are gone.
///
/// # Errors
///
/// When some stay, the first of them; all others are removed nevertheless.
pub fn remove(folders: &[PathBuf]) -> io::Result<()> {
    folders
        .iter()
        .map(|folder| remove_one(folder))
        .fold(Ok(()), Result::and)
}

fn remove_one(folder: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for _ in 0..REMOVALS {
        result = match fs::remove_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::ResourceBusy) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    result.map_err(|error| {
        let message = format!(
            "Can't remove the control group {}: {error}",
            folder.display()
        );
        io::Error::new(error.kind(), message)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn resources() -> Resources {
        serde_json::from_str(
            r#"{"memory":{"limit":1048576},"cpu":{"shares":1024,"quota":50000,"period":100000},
                "pids":{"limit":7}}"#,
        )
        .unwrap()
    }

    fn values(version: Version) -> Vec<String> {
        let cgroup = Cgroup {
            version,
            folders: Vec::new(),
            limits: Arc::default(),
        };
        let values = cgroup.values(&resources()).into_iter();
        values
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    }

    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let v2 = [
            "memory.max=1048576",
            "cpu.weight=39",
            "cpu.max=50000 100000",
            "pids.max=7",
        ];
        assert_eq!(values(Version::V2), v2);
        let v1 = values(Version::V1);
        assert!(
            v1.contains(&"memory.limit_in_bytes=1048576".to_owned()),
            "{v1:?}"
        );
        assert!(v1.contains(&"cpu.cfs_quota_us=50000".to_owned()), "{v1:?}");
        assert_eq!(
            [weight(2), weight(262_144), weight(u64::MAX)],
            [1, 10_000, 10_000]
        );
    }

    #[test]
    fn what_the_host_lacks_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            version: Version::V2,
            folders: vec![folder.path().to_owned()],
            limits: Arc::default(),
        };
        let mut warnings = Vec::new();
        cgroup.limit(&resources(), |warning| warnings.push(warning));
        assert_eq!(warnings.len(), 4);
        fs::write(folder.path().join("cgroup.procs"), "1\n22\n").unwrap();
        assert_eq!(cgroup.processes(), [1, 22]);
    }

    #[test]
    fn limits_that_were_taken_are_set_again() {
        let slice = tempfile::tempdir().unwrap();
        let folder = slice.path().join("group");
        fs::create_dir(&folder).unwrap();
        let file = |name| folder.join(name);
        for name in ["memory.max", "cpu.max", "cpu.weight", "pids.max"] {
            fs::write(file(name), "max\n").unwrap();
        }
        let cgroup = Cgroup {
            version: Version::V2,
            folders: vec![folder.clone()],
            limits: Arc::default(),
        };
        cgroup.restore(|warning| panic!("{warning}"));
        cgroup.limit(&resources(), |warning| panic!("{warning}"));
        cgroup.restore(|warning| panic!("{warning}"));
        fs::write(file("memory.max"), "max\n").unwrap();
        fs::write(file("cpu.max"), "max 100000\n").unwrap();
        let mut warnings = 0;
        cgroup.restore(|_| warnings += 1);
        assert_eq!(warnings, 1);
        assert_eq!(fs::read_to_string(file("memory.max")).unwrap(), "1048576");
        assert_eq!(fs::read_to_string(file("cpu.max")).unwrap(), "50000 100000");
    }

    #[test]
    fn removing_is_fine_twice_and_tells_what_stays() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("group");
        fs::create_dir(&group).unwrap();
        remove(std::slice::from_ref(&group)).unwrap();
        remove(&[group]).unwrap();
        let stays = folder.path().join("stays");
        fs::create_dir_all(stays.join("child")).unwrap();
        let goes = folder.path().join("goes");
        fs::create_dir(&goes).unwrap();
        let error = remove(&[stays.clone(), goes.clone()]).unwrap_err();
        assert!(error.to_string().contains("stays"), "{error}");
        assert!(stays.exists() && !goes.exists());
    }
}
