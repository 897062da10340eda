//! The disk images and kernels the tests and `cargo xtask run` boot, made of distribution packages
//! and kept until their recipe changes.

mod debian12;
mod disk;
mod firmware;
mod guest;
mod kernel;
mod mini;
mod pod;
mod sata;
mod shape;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::{self, DirLock};
use crate::lab::{Layout, setup_tools};
use crate::packages::{Mirror, Tools};
use crate::progress::step;

pub use guest::{GuestFiles, ROOT as GUEST_ROOT};
pub use pod::{POD_INIT, pod_initrd};
pub use shape::{KernelKind, RootFs, Shape, Table};

/// One kind of test image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// A stock kernel as bzImage and as ELF, and a small initial RAM disk for booting it directly.
    Kernel,
    /// A 64 MiB disk with MBR, GRUB, the stock kernel and busybox; boots in seconds.
    Mini,
    /// What boots from SATA: a disk like the mini disk, with the stock kernel for hardware and no
    /// virtio drivers; that kernel by itself; GRUB's rescue disc; the installer on a disk.
    Sata,
    /// A whole distribution on a GPT disk: GRUB for BIOS and UEFI, systemd, cloud-init, ssh.
    Debian12,
    /// UEFI firmware: Cloud Hypervisor's, and OVMF of two releases.
    Firmware,
}

/// Where the images lie.
#[derive(Debug, Clone)]
pub struct Images {
    dir: PathBuf,
}

/// What the making of an image works with.
struct Workshop {
    mirror: Mirror,
    tools: Tools,
    /// Where apt's lists and downloads are kept.
    apt: PathBuf,
}

impl Images {
    /// The images of this user, or of `$EDGEVMM_IMAGES`.
    #[must_use]
    pub fn of_this_user() -> Self {
        Self {
            dir: cache::images_dir(),
        }
    }

    /// The kernel as bzImage.
    #[must_use]
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("kernel/vmlinuz")
    }

    /// The same kernel as ELF with a PVH entry.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("kernel/vmlinux")
    }

    /// An initial RAM disk that says `INIT-FIRST-LINE` on the console and powers off; with
    /// `edgevmm.shell` on the kernel's command line it loads the virtio drivers, gets an address by
    /// DHCP and gives a shell instead.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("kernel/initrd")
    }

    /// The unpacked package that the kernel is from, with its modules.
    #[must_use]
    pub fn kernel_tree(&self) -> PathBuf {
        kernel::tree(&self.dir.join("kernel"))
    }

    /// The mini disk, raw.
    #[must_use]
    pub fn mini_raw(&self) -> PathBuf {
        self.dir.join("mini/mini.raw")
    }

    /// The mini disk as qcow2.
    #[must_use]
    pub fn mini_qcow2(&self) -> PathBuf {
        self.dir.join("mini/mini.qcow2")
    }

    /// A file of [`Image::Sata`]: "vmlinuz", "initrd" (as [`Images::initrd`]), "sata.raw",
    /// "grub-rescue.iso" or "installer.raw".
    #[must_use]
    pub fn sata(&self, file: &str) -> PathBuf {
        self.dir.join("sata").join(file)
    }

    /// The distribution's disk, qcow2.
    #[must_use]
    pub fn debian12(&self) -> PathBuf {
        self.dir.join("debian12/debian12.qcow2")
    }

    /// UEFI by PVH.
    #[must_use]
    pub fn cloudhv(&self) -> PathBuf {
        self.dir.join("firmware/CLOUDHV.fd")
    }

    /// The code and the variables' template of OVMF from the lab's release.
    #[must_use]
    pub fn ovmf(&self) -> [PathBuf; 2] {
        firmware::OVMF_FILES.map(|file| self.dir.join("firmware/new").join(file))
    }

    /// The same from the guests' release, which is older.
    #[must_use]
    pub fn old_ovmf(&self) -> [PathBuf; 2] {
        firmware::OVMF_FILES.map(|file| self.dir.join("firmware/old").join(file))
    }

    /// The files of one kind.
    #[must_use]
    pub fn files(&self, image: Image) -> Vec<PathBuf> {
        match image {
            Image::Kernel => vec![self.vmlinuz(), self.vmlinux(), self.initrd()],
            Image::Mini => vec![self.mini_raw(), self.mini_qcow2()],
            Image::Sata => [
                "vmlinuz",
                "initrd",
                "sata.raw",
                "grub-rescue.iso",
                "installer.raw",
            ]
            .map(|file| self.sata(file))
            .into(),
            Image::Debian12 => vec![self.debian12()],
            Image::Firmware => {
                let ovmf = self.ovmf().into_iter().chain(self.old_ovmf());
                ovmf.chain([self.cloudhv()]).collect()
            }
        }
    }

    /// Makes an image unless it is there, made by this recipe.
    ///
    /// # Errors
    /// No apt, no network, or not enough disk.
    pub fn ensure(&self, image: Image) -> Result<()> {
        let mirror = Mirror::of_this_system()?;
        let kernel = cache::recipe((&mirror, kernel::RECIPE));
        let (name, recipe) = match image {
            Image::Kernel => ("kernel", kernel),
            Image::Mini => ("mini", cache::recipe((kernel, mini::RECIPE, disk::RECIPE))),
            Image::Sata => (
                "sata",
                cache::recipe((kernel, mini::RECIPE, disk::RECIPE, sata::RECIPE)),
            ),
            Image::Debian12 => (
                "debian12",
                cache::recipe((&mirror, debian12::RECIPE, disk::RECIPE)),
            ),
            Image::Firmware => ("firmware", cache::recipe((&mirror, firmware::RECIPE))),
        };
        let dir = self.dir.join(name);
        if cache::is_fresh(&dir, recipe) {
            return Ok(());
        }
        if image == Image::Mini {
            self.ensure(Image::Kernel)?;
        }
        let workshop = Workshop::open(mirror)?;
        let _lock = DirLock::exclusive(&self.dir)?;
        cache::ensure(&dir, recipe, |dir| {
            step(&format!("Making the test image '{name}'"), || match image {
                Image::Kernel => kernel::make(&workshop, dir),
                Image::Mini => mini::make(&workshop, &self.kernel_tree(), dir),
                Image::Sata => sata::make(&workshop, dir),
                Image::Debian12 => debian12::make(&workshop, dir),
                Image::Firmware => firmware::make(&workshop, dir),
            })
        })
        .map(drop)
    }

    /// Makes a guest of the matrix unless it is there, made by this recipe.
    ///
    /// # Errors
    /// No apt, no network, no such release on the mirror, or not enough disk.
    pub fn ensure_guest(&self, shape: Shape) -> Result<GuestFiles> {
        let mirror = Mirror::of_this_system()?;
        let recipe = cache::recipe((&mirror, guest::RECIPE, disk::RECIPE, shape));
        let guests = self.dir.join("guests");
        let (tools, dir) = (guests.join("tools"), guests.join(shape.to_string()));
        let parts = guests.join(format!("{}-{}", shape.suite, shape.kernel.name()));
        let fs_tools = Tools::new(&tools);
        let files = GuestFiles {
            disk: dir.join("disk.qcow2"),
            kernel: parts.join("vmlinuz"),
            initrd: parts.join(guest::initrd_name(shape.root)),
            cmdline: guest::cmdline(),
            tools: fs_tools.clone(),
        };
        if cache::is_fresh(&dir, recipe) {
            return Ok(files);
        }
        let workshop = Workshop::open(mirror)?;
        let common = cache::recipe((&workshop.mirror, guest::RECIPE, disk::RECIPE));
        let _lock = DirLock::exclusive(&self.dir)?;
        cache::ensure(&tools, common, |dir| guest::make_tools(&workshop, dir))?;
        step(&format!("Making the guest '{shape}'"), || {
            cache::ensure(&parts, common, |dir| {
                guest::make_parts(&workshop, shape.suite, shape.kernel, dir)
            })?;
            cache::ensure(&dir, recipe, |dir| {
                guest::make(&workshop, &fs_tools, &parts, shape, dir)
            })
        })?;
        Ok(files)
    }
}

impl Workshop {
    fn open(mirror: Mirror) -> Result<Self> {
        let layout = Layout::of_this_user();
        Ok(Self {
            mirror,
            tools: setup_tools(&layout)?,
            apt: layout.dir().join("apt"),
        })
    }
}

/// Writes a text file, making its directory.
fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
}
