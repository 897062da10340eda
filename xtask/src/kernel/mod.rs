//! A stock distribution kernel, unpacked: its image, its ELF and its modules.

mod initrd;
mod modules;
mod vmlinux;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::packages::{self, Apt, Tools};
use crate::process;

pub use initrd::Initrd;
pub use modules::{Modules, unpacked_path};

/// The packages of a kernel, before its version.
pub const PACKAGES: &[&str] = &["linux-image-", "linux-binary-", "linux-modules-"];

/// Where packages have modules.
const MODULES: &str = "usr/lib/modules";

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    root: PathBuf,
    image: PathBuf,
    release: String,
}

impl Kernel {
    /// Downloads the kernel that `package` depends on and unpacks it into `root`.
    ///
    /// # Errors
    /// No such package, no network, or the disk is full.
    pub fn fetch(apt: &Apt, package: &str, root: &Path, tools: &Tools) -> Result<Self> {
        let archives = apt.download(&[package], |file| {
            PACKAGES.iter().any(|prefix| {
                file.strip_prefix(prefix)
                    .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
            })
        })?;
        packages::unpack(&archives, root)?;
        Self::index(root, tools)
    }

    /// Opens a kernel package unpacked in `root` and writes the index of its modules.
    ///
    /// # Errors
    /// No kernel in `root`, or the disk is full.
    pub fn index(root: &Path, tools: &Tools) -> Result<Self> {
        let kernel = Self::open(root)?;
        let mut depmod = tools.command("usr/sbin/depmod");
        process::output(depmod.arg("-b").arg(root).arg(&kernel.release))?;
        Ok(kernel)
    }

    /// Opens what [`Kernel::fetch`] made.
    ///
    /// # Errors
    /// No kernel in `root`.
    pub fn open(root: &Path) -> Result<Self> {
        let (image, release) = boot_image(&root.join("boot"))
            .or_else(|| module_image(&root.join(MODULES)))
            .with_context(|| format!("No kernel in {}", root.display()))?;
        Ok(Self {
            root: root.to_owned(),
            image,
            release,
        })
    }

    /// The kernel's release, as `uname -r` shows it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The bzImage.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Writes the ELF kernel (with its PVH note) that is packed in the bzImage.
    ///
    /// # Errors
    /// The image is packed in a way not known here, or a file cannot be read or written.
    pub fn write_vmlinux(&self, path: &Path) -> Result<()> {
        let image = fs::read(self.image()).context("Cannot read the kernel image")?;
        let elf = vmlinux::extract(&image).context("Cannot unpack the kernel image")?;
        fs::write(path, elf).with_context(|| format!("Cannot write {}", path.display()))
    }

    /// The kernel's modules.
    ///
    /// # Errors
    /// `modules.dep` is missing.
    pub fn modules(&self) -> Result<Modules> {
        Modules::open(&self.root.join(MODULES).join(&self.release))
    }
}

/// Where older packages have their kernel.
fn boot_image(boot: &Path) -> Option<(PathBuf, String)> {
    fs::read_dir(boot).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name();
        let release = name.to_str()?.strip_prefix("vmlinuz-")?;
        Some((entry.path(), release.to_owned()))
    })
}

/// Where packages since Linux 7 have it, for kernel-install to copy.
fn module_image(modules: &Path) -> Option<(PathBuf, String)> {
    fs::read_dir(modules).ok()?.flatten().find_map(|entry| {
        let image = entry.path().join("vmlinuz");
        let release = entry.file_name().into_string().ok()?;
        image.is_file().then_some((image, release))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_the_kernel_where_old_and_new_packages_have_it() {
        for image in ["boot/vmlinuz-6.1.0-1", "usr/lib/modules/6.1.0-1/vmlinuz"] {
            let root = tempfile::tempdir().unwrap();
            let image = root.path().join(image);
            assert!(Kernel::open(root.path()).is_err());
            fs::create_dir_all(image.parent().unwrap()).unwrap();
            fs::write(&image, "").unwrap();
            let kernel = Kernel::open(root.path()).unwrap();
            assert_eq!((kernel.image(), kernel.release()), (&*image, "6.1.0-1"));
        }
    }
}
