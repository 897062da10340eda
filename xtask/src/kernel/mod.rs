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

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// Downloads the kernel that `package` depends on and unpacks it into `root`.
    ///
    /// # Errors
    /// No such package, no network, or the disk is full.
    pub fn fetch(apt: &Apt, package: &str, root: &Path, tools: &Tools) -> Result<Self> {
        let archives = apt.download(&[package], |file| {
            ["linux-image-", "linux-modules-"].iter().any(|prefix| {
                file.strip_prefix(prefix)
                    .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
            })
        })?;
        packages::unpack(&archives, root)?;
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
        let boot = root.join("boot");
        let release = fs::read_dir(&boot)
            .with_context(|| format!("Cannot read {}", boot.display()))?
            .flatten()
            .find_map(|entry| {
                entry
                    .file_name()
                    .to_str()?
                    .strip_prefix("vmlinuz-")
                    .map(str::to_owned)
            })
            .with_context(|| format!("No kernel in {}", boot.display()))?;
        Ok(Self {
            root: root.to_owned(),
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
    pub fn image(&self) -> PathBuf {
        self.root
            .join("boot")
            .join(format!("vmlinuz-{}", self.release))
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
        Modules::open(&self.root.join("usr/lib/modules").join(&self.release))
    }
}
