//! The stock kernel for virtual machines, and an initial RAM disk to boot it with directly.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Workshop;
use crate::kernel::{Initrd, Kernel};
use crate::packages::Apt;

pub(super) const INIT: &str = include_str!("kernel-init.sh");
pub(super) const DHCP_SCRIPT: &str = include_str!("udhcpc.sh");

/// What the image depends on.
pub(super) const RECIPE: &[&str] = &[include_str!("kernel.rs"), INIT, DHCP_SCRIPT];

/// Drivers for what a virtual machine has.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_console",
    "virtio_rng",
    "pvpanic-mmio",
    "af_packet",
    "crc32c_generic",
    "ext4",
];

/// Where the unpacked kernel lies in the image's directory.
pub(super) fn tree(dir: &Path) -> PathBuf {
    dir.join("tree")
}

pub(super) fn make(workshop: &Workshop, dir: &Path) -> Result<()> {
    let tree = tree(dir);
    let suite = workshop.mirror.guest_suite();
    let apt = Apt::open(&workshop.apt, &workshop.mirror, suite)?;
    let kernel = Kernel::fetch(&apt, workshop.mirror.cloud_kernel(), &tree, &workshop.tools)?;
    fs::copy(kernel.image(), dir.join("vmlinuz"))?;
    kernel.write_vmlinux(&dir.join("vmlinux"))?;
    let initrd = Initrd::new(&workshop.tools.path("usr/bin/busybox"), INIT)?
        .program("bin/udhcpc.sh", DHCP_SCRIPT)
        .modules(&kernel.modules()?, MODULES)?
        .finish();
    fs::write(dir.join("initrd"), initrd)?;
    Ok(())
}
