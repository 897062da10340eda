//! What runs containers and pods: containerds of several releases, runc and the network plugins,
//! unpacked from packages and never installed; and a Kubernetes built from sources.

mod kubernetes;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache::{self, DirLock};
use crate::packages::{self, Apt, Mirror};
use crate::progress::step;

/// What the files depend on.
const RECIPE: &[&str] = &[include_str!("mod.rs")];
const KUBERNETES_RECIPE: &[&str] = &[include_str!("kubernetes.rs")];

/// A containerd, by where it comes from. A distribution that has one release only gives it each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Containerd {
    /// Of the release before, in Debian 1.6.
    Old,
    /// Of the lab's release, in Debian 1.7.
    Current,
    /// Of the newest release, in Debian 2.x.
    New,
}

impl Containerd {
    const ALL: [Self; 3] = [Self::Old, Self::Current, Self::New];

    const fn folder(self) -> &'static str {
        match self {
            Self::Old => "old",
            Self::Current => "current",
            Self::New => "new",
        }
    }

    fn suite(self, mirror: &Mirror) -> &str {
        match self {
            Self::Old => mirror.guest_suite(),
            Self::Current => mirror.lab_suite(),
            Self::New => mirror.newest_suite(),
        }
    }
}

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Pods {
    dir: PathBuf,
}

impl Pods {
    /// Those in this user's cache, which are made unless they are there.
    ///
    /// # Errors
    /// No apt, no network, or not enough disk.
    pub fn ensure() -> Result<Self> {
        let mirror = Mirror::of_this_system()?;
        let pods = Self {
            dir: cache::pods_dir(),
        };
        let _lock = DirLock::exclusive(&pods.dir)?;
        cache::ensure(&pods.programs(), cache::recipe((&mirror, RECIPE)), |dir| {
            step("Downloading and unpacking containerds", || {
                pods.fetch(&mirror, dir)
            })
        })?;
        Ok(pods)
    }

    /// The folder of Kubernetes' programs, etcd and kubectl, which are built unless they are there;
    /// none where this system's distribution does not have the sources.
    ///
    /// # Errors
    /// No apt, no network, not enough disk (3 GB meanwhile), or it does not build.
    pub fn kubernetes(&self) -> Result<Option<PathBuf>> {
        let mirror = Mirror::of_this_system()?;
        if !kubernetes::exists(&mirror) {
            return Ok(None);
        }
        let folder = self.dir.join("kubernetes-1.20");
        let _lock = DirLock::exclusive(&self.dir)?;
        let recipe = cache::recipe((&mirror, KUBERNETES_RECIPE));
        cache::ensure(&folder, recipe, |dir| {
            kubernetes::make(&mirror, &self.dir.join("apt"), dir)
        })?;
        Ok(Some(folder))
    }

    /// The folder of a containerd, its `ctr` and its shim for runc.
    #[must_use]
    pub fn containerd(&self, which: Containerd) -> PathBuf {
        self.programs().join(which.folder()).join("usr/bin")
    }

    /// The folder of runc, which fits all of them.
    #[must_use]
    pub fn runc(&self) -> PathBuf {
        self.programs().join("runc/usr/sbin")
    }

    /// The folder of the network plugins.
    #[must_use]
    pub fn plugins(&self) -> PathBuf {
        self.programs().join("runc/usr/lib/cni")
    }

    fn programs(&self) -> PathBuf {
        self.dir.join("programs")
    }

    fn fetch(&self, mirror: &Mirror, dir: &Path) -> Result<()> {
        let apt = self.dir.join("apt");
        for which in Containerd::ALL {
            let apt = Apt::open(&apt, mirror, which.suite(mirror))?;
            let archives = apt.download(&["containerd"], |file| file.starts_with("containerd_"))?;
            packages::unpack(&archives, &dir.join(which.folder()))?;
        }
        let apt = Apt::open(&apt, mirror, mirror.lab_suite())?;
        let archives = apt.download(&["runc", "containernetworking-plugins"], |file| {
            file.starts_with("runc_") || file.starts_with("containernetworking-plugins_")
        })?;
        packages::unpack(&archives, &dir.join("runc"))
    }
}
