//! Gives a machine the volumes of its container, as KubeVirt does:
//!
//! - what the kubelet writes from the API (ConfigMaps, Secrets, projected and downward API volumes) as
//!   a read-only ISO 9660 disk labelled `cfgdata` with a file for each key, made anew at each start;
//! - any other folder (a claim, an emptyDir, a hostPath) by the one disk image at its top;
//! - block devices (`volumeDevices`) as disks.
//!
//! What a machine can't take is refused by name: left out in silence it would look like lost data.
//! The specification of a container tells what a volume is by where the kubelet has it, below
//! `pods/UID/volumes/kubernetes.io~KIND/NAME`; of other paths it tells nothing. So a volume is called by
//! its name in the pod where the path has that one, and else by where it is mounted: `/srv/data` is
//! `srv-data`. That name is the disk's serial number.

mod block;
mod files;
mod given;
mod image;

use std::io;
use std::path::{Component, Path, PathBuf};

use edgevmm_cloudinit::IsoError;
use edgevmm_config::{CloudInitConfig, DiskConfig};
use uuid::Uuid;

pub use files::{File, read_files, write_private};
pub use given::{Given, Over};

use crate::annotations::Annotations;
use crate::disks::{Disk, is_read_only};
use crate::seed::SeedError;
use crate::spec::{Mount, Spec};

/// Folder in the bundle for what is made of volumes.
const FOLDER: &str = "volumes";
/// Label of disks with files from the API.
const LABEL: &str = "cfgdata";
/// File that keeps what the guest writes over an image.
const OVERLAY: &str = "edgevmm-overlay.qcow2";
/// Longest serial number of a disk, in bytes.
const MAX_SERIAL: usize = 20;
/// Kinds of volumes that the kubelet writes from the API, as it has them in paths.
const FROM_API: [&str; 4] = ["configmap", "secret", "projected", "downward-api"];
/// Kinds whose path has the name that the pod's specification gives them.
const NAMED: [&str; 5] = [
    "configmap",
    "secret",
    "projected",
    "downward-api",
    "empty-dir",
];

/// What every container of a pod is given without being asked, and a guest does without: its network
/// and name come otherwise, and its log is its console. A service account is a credential of the
/// cluster, which no guest is given unless its pod has a volume of its own for it.
const UNASKED: [&str; 6] = [
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/dev/shm",
    "/dev/termination-log",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// Why a machine can't have a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// There is none of that name.
    #[error(
        "The annotation edgevmm.io/{annotation} names the volume `{name}`, which the container does \
         not mount; it mounts {mounted}"
    )]
    Unknown {
        /// Name of the annotation after the prefix.
        annotation: &'static str,
        /// The name.
        name: String,
        /// Names of those that it mounts.
        mounted: String,
    },
    /// Two are called the same.
    #[error("Two volumes of the container would be called `{0}`: mount one at another path")]
    SameName(String),
    /// It is not of the kind that is needed.
    #[error(
        "The annotation edgevmm.io/{annotation} names the volume `{name}`, which is {found}: use \
         {expected}"
    )]
    Unfit {
        /// Name of the annotation after the prefix.
        annotation: &'static str,
        /// The name.
        name: String,
        /// What it is.
        found: &'static str,
        /// What to use.
        expected: &'static str,
    },
    /// It can't be read.
    #[error("Can't use the volume `{name}`")]
    Read {
        /// Its name.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Its files make no disk.
    #[error("Can't make a disk of the files in the volume `{name}`")]
    Iso {
        /// Its name.
        name: String,
        /// Why.
        source: IsoError,
    },
    /// There is no image in it.
    #[error(
        "The volume `{name}` mounted at {place} has no disk image at its top, and a machine can't \
         share other files with its host: put disk.img or one file *.qcow2, *.raw, *.vmdk, *.vdi, \
         *.vhd or *.vhdx there, have an empty disk made by the annotation \
         `edgevmm.io/create-disk: {name}=10G`, or take the volume out of the container"
    )]
    NoImage {
        /// Its name.
        name: String,
        /// Where it is mounted.
        place: String,
    },
    /// There are several.
    #[error(
        "The volume `{name}` has several disk images at its top ({images}): leave one, or call the \
         one to be used disk.img (raw)"
    )]
    SeveralImages {
        /// Its name.
        name: String,
        /// Some of the images.
        images: String,
    },
    /// It is a file.
    #[error(
        "A single file is mounted at {0}, which a machine can't be given: mount the whole volume, \
         without subPath"
    )]
    SingleFile(String),
    /// It is a device of another kind.
    #[error(
        "The container is given the device {0}, and a machine can only be given block devices; a \
         privileged container is given all of its host's, so don't make it privileged"
    )]
    Device(String),
    /// The host does not have a device.
    #[error("The host has no block device {numbers} for {place}")]
    NoDevice {
        /// Where the container has it.
        place: String,
        /// Its numbers.
        numbers: String,
        /// What the kernel says.
        source: io::Error,
    },
}

/// What a machine gets by its container's volumes.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Disks, in the order in which a firmware tries them.
    pub disks: Vec<Disk>,
    /// Files that these disks are made of, which the VMM is to be given.
    pub given: Vec<Given>,
    /// Where what the guest writes to the container image's disk is to be kept.
    pub overlay: Option<Given>,
    /// What cloud-init is told.
    pub cloud_init: Option<CloudInitConfig>,
}

impl Volumes {
    /// Has the volume that is meant for it keep what is written over the image at `base`, and tells
    /// where the VMM finds it. `None` when no volume is.
    pub fn keep_writes(&mut self, base: &Path) -> Option<PathBuf> {
        let mut overlay = self.overlay.take()?;
        let link = overlay.link.clone();
        overlay.over = Some(Over {
            path: base.to_owned(),
            format: None,
        });
        self.given.push(overlay);
        Some(link)
    }
}

/// A volume that is mounted in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume<'a> {
    /// What it is called.
    pub name: String,
    /// Where it is on the host.
    pub source: &'a Path,
    /// Where the container has it.
    place: &'a str,
    from_api: bool,
    read_only: bool,
}

impl<'a> Volume<'a> {
    fn new(mount: &'a Mount) -> Self {
        let place = mount.destination.as_str();
        let (kind, name) = kubelet_volume(&mount.source).unwrap_or_default();
        let name = match NAMED.contains(&kind) {
            true => name.to_owned(),
            false => name_of_place(place),
        };
        Self {
            name,
            source: &mount.source,
            place,
            from_api: FROM_API.contains(&kind),
            // The second is of the mounts below it, too.
            read_only: mount
                .options
                .iter()
                .any(|option| option == "ro" || option == "rro"),
        }
    }

    /// All volumes that a container mounts, each once.
    ///
    /// # Errors
    ///
    /// When two are called the same.
    pub fn all(spec: &'a Spec) -> Result<Vec<Self>, VolumeError> {
        let mut volumes: Vec<Self> = Vec::new();
        let asked = |mount: &&Mount| {
            !UNASKED.contains(&mount.destination.as_str()) && !is_kubelets_own(&mount.source)
        };
        for mount in spec
            .mounts
            .iter()
            .filter(|mount| mount.is_bind())
            .filter(asked)
        {
            if volumes.iter().any(|other| other.source == mount.source) {
                continue;
            }
            let volume = Self::new(mount);
            if volumes.iter().any(|other| other.name == volume.name) {
                return Err(VolumeError::SameName(volume.name));
            }
            volumes.push(volume);
        }
        Ok(volumes)
    }

    /// The one that an annotation names, by its name or by where it is mounted.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn find<'v>(
        volumes: &'v [Self],
        annotation: &'static str,
        name: &str,
    ) -> Result<&'v Self, VolumeError> {
        let found = volumes.iter().find(|volume| volume.is_called(name));
        found.ok_or_else(|| {
            let names: Vec<_> = volumes.iter().map(|volume| volume.name.as_str()).collect();
            let mounted = match names.as_slice() {
                [] => "none".to_owned(),
                names => names.join(", "),
            };
            VolumeError::Unknown {
                annotation,
                name: name.to_owned(),
                mounted,
            }
        })
    }

    /// Checks that its files are from the API.
    ///
    /// # Errors
    ///
    /// When they are not.
    pub fn expect_files(&self, annotation: &'static str) -> Result<(), VolumeError> {
        if self.from_api {
            return Ok(());
        }
        Err(VolumeError::Unfit {
            annotation,
            name: self.name.clone(),
            found: "none with files from the API",
            expected: "a ConfigMap or a Secret",
        })
    }

    fn expect_written(&self, annotation: &'static str) -> Result<(), VolumeError> {
        if !self.from_api && !self.read_only {
            return Ok(());
        }
        Err(VolumeError::Unfit {
            annotation,
            name: self.name.clone(),
            found: "read-only",
            expected: "a claim or an emptyDir",
        })
    }

    /// A file in it that the VMM is to be given.
    fn given(&self, folder: &Path, file: &str) -> Given {
        Given {
            folder: self.source.to_owned(),
            file: file.to_owned(),
            link: folder.join(&self.name).join(file),
            over: None,
        }
    }

    fn as_disk(&self, config: DiskConfig) -> Disk {
        Disk {
            name: self.name.clone(),
            place: self.place.to_owned(),
            config,
        }
    }

    fn is_called(&self, name: &str) -> bool {
        self.name == name || self.place == name
    }

    fn failed(&self, source: io::Error) -> VolumeError {
        VolumeError::Read {
            name: self.name.clone(),
            source,
        }
    }
}

/// Makes what the machine gets by its container's volumes, in a folder of the container's bundle.
///
/// # Errors
///
/// When there is something that a machine can't be given.
pub fn attach(spec: &Spec, annotations: &Annotations, bundle: &Path) -> Result<Volumes, SeedError> {
    let all = Volume::all(spec)?;
    let folder = bundle.join(FOLDER);
    let find = |annotation, name: &String| Volume::find(&all, annotation, name);
    let seed = annotations.cloud_init.as_ref();
    let seed = seed.map(|name| find("cloud-init", name)).transpose()?;
    let overlay = annotations.overlay.as_ref();
    let overlay = overlay.map(|name| find("overlay", name)).transpose()?;
    overlay.map_or(Ok(()), |volume| volume.expect_written("overlay"))?;
    for (name, _) in &annotations.create_disk {
        find("create-disk", name)?.expect_written("create-disk")?;
    }
    let mut volumes = Volumes {
        cloud_init: crate::seed::seed(spec, annotations, seed, bundle)?,
        ..Volumes::default()
    };
    let mut files = Vec::new();
    for volume in &all {
        if seed == Some(volume) {
            continue;
        }
        if overlay == Some(volume) {
            volumes.overlay = Some(volume.given(&folder, OVERLAY));
        } else if volume.from_api {
            let wish = annotations.disks.of(&volume.name, volume.place);
            let bus = match wish {
                Some(wish) if wish.is_cdrom() => Some(wish.bus()),
                wish => wish.and_then(|wish| wish.bus).or(annotations.disk_bus),
            };
            let disk = files::disk(volume, &folder, bus)?;
            files.push(volume.as_disk(disk));
        } else {
            let wish = annotations.disks.of(&volume.name, volume.place);
            let mut volume = volume.clone();
            volume.read_only |= is_read_only(wish);
            let sizes = annotations.create_disk.iter();
            let size = sizes.clone().find(|(name, _)| volume.is_called(name));
            let (disk, given) = image::disk(&volume, &folder, size.map(|(_, size)| *size))?;
            volumes.disks.push(volume.as_disk(disk));
            volumes.given.extend(given);
        }
    }
    volumes.disks.extend(block::disks(spec)?);
    // Nothing boots from these, so they are the last to be tried.
    volumes.disks.extend(files);
    Ok(volumes)
}

/// The kind and the name of a volume by the path that the kubelet gave it.
fn kubelet_volume(path: &Path) -> Option<(&str, &str)> {
    let mut parts = path.components().filter_map(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    });
    parts.find(|part| *part == "pods")?;
    let (_pod, volumes) = (parts.next()?, parts.next()?);
    let kind = parts.next()?.strip_prefix("kubernetes.io~")?;
    let name = parts.next()?;
    (volumes == "volumes").then_some((kind, name))
}

/// Whether it is a file that the kubelet made for the container itself, such as its termination log,
/// which may be mounted anywhere.
fn is_kubelets_own(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().rev().take(5).collect();
    matches!(parts.as_slice(), [_file, _container, folder, _pod, pods]
        if *folder == "containers" && *pods == "pods")
}

/// What a volume is called that is mounted at `place`.
fn name_of_place(place: &str) -> String {
    let plain = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '-' => c,
        _ => '-',
    };
    place.trim_matches('/').chars().map(plain).collect()
}

/// The serial number of a volume's disk: its name, or what tells it from others if that is too long.
pub fn serial(name: &str) -> String {
    if name.len() <= MAX_SERIAL && name.is_ascii() {
        return name.to_owned();
    }
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes());
    let hash = hash.simple().to_string();
    let plain = name.chars().filter(char::is_ascii).take(MAX_SERIAL - 7);
    plain.chain(['-']).chain(hash.chars().take(6)).collect()
}

#[cfg(test)]
mod tests;
