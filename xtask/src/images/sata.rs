//! What boots without virtio: a disk whose kernel's initial RAM disk has drivers for SATA only, the
//! kernel by itself, GRUB's rescue disc, and the distribution's installer.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::disk::{self, MIB};
use super::{Workshop, kernel, mini};
use crate::kernel::{Initrd, Kernel};
use crate::packages::{self, Apt};
use crate::process;

/// What the image depends on, besides the mini disk's recipe.
pub(super) const RECIPE: &[&str] = &[include_str!("sata.rs")];

/// Drivers for SATA disks and CD-ROM drives, and no others.
const MODULES: &[&str] = &[
    "ahci",
    "sd_mod",
    "sr_mod",
    "isofs",
    "crc32c_generic",
    "ext4",
];

const RESCUE: &str = "usr/lib/grub-rescue/grub-rescue-cdrom.iso";

/// Size of the disk that the installer is on.
const INSTALLER_SIZE: u64 = 64 * MIB;

pub(super) fn make(workshop: &Workshop, dir: &Path) -> Result<()> {
    let tree = dir.join("tree");
    let apt = Apt::open(
        &workshop.apt,
        &workshop.mirror,
        workshop.mirror.guest_suite(),
    )?;
    let package = workshop.mirror.generic_kernel();
    let kernel = Kernel::fetch(&apt, package, &tree, &workshop.tools)?;
    let initrd = Initrd::new(&workshop.tools.path("usr/bin/busybox"), kernel::INIT)?
        .program("bin/udhcpc.sh", kernel::DHCP_SCRIPT)
        .modules(&kernel.modules()?, MODULES)?
        .finish();
    fs::write(dir.join("initrd"), initrd)?;
    fs::copy(kernel.image(), dir.join("vmlinuz"))?;
    mini::write_disk(workshop, &kernel, MODULES, &dir.join("sata.raw"))?;
    // The tree is large, and the modules were all that was wanted of it.
    fs::remove_dir_all(&tree)?;

    let archives = apt.download(&["grub-rescue-pc"], |file| {
        file.starts_with("grub-rescue-pc_")
    })?;
    packages::unpack(&archives, &tree)?;
    fs::copy(tree.join(RESCUE), dir.join("grub-rescue.iso")).context("No rescue disc")?;
    write_installer(workshop, &apt, &tree, &dir.join("installer.raw"))?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// Writes a disk with the installer's kernel and initial RAM disk in its root directory.
fn write_installer(workshop: &Workshop, apt: &Apt, tree: &Path, raw: &Path) -> Result<()> {
    let package = "debian-installer-12-netboot-amd64";
    let archives = apt.download(&[package], |file| file.starts_with("debian-installer-"))?;
    packages::unpack(&archives, tree)?;
    let files = tree.join("usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64");
    let tar = tree.join("installer.tar");
    let mut pack = std::process::Command::new("tar");
    pack.args(["--owner=0", "--group=0", "-C"]).arg(&files);
    process::output(pack.arg("-cf").arg(&tar).args(["linux", "initrd.gz"]))?;
    fs::File::create(raw)?.set_len(INSTALLER_SIZE)?;
    let layout = "label: dos\nstart=2048,type=83\n";
    disk::partition(&workshop.tools, raw, layout)?;
    let features = "^has_journal,^metadata_csum,^64bit,^orphan_file";
    let area = MIB..INSTALLER_SIZE;
    disk::make_ext4(
        &workshop.tools,
        &tar,
        raw,
        area,
        "installer",
        &["-O", features],
    )
}
