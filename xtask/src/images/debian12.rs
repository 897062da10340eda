//! A whole distribution as cloud providers make it: GPT with BIOS-boot partition, ESP and ext4;
//! GRUB both ways, systemd, cloud-init, ssh, guest agent.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Workshop;
use super::disk::{self, MIB};
use crate::process;

const CUSTOMIZE: &str = include_str!("debian12-customize.sh");

/// What the image depends on.
pub(super) const RECIPE: &[&str] = &[include_str!("debian12.rs"), CUSTOMIZE];

/// The size of the disk: room for the tests to write to.
const SIZE: u64 = 2048 * MIB;

/// Where the partitions begin; the last MiB is left for the backup of the partition table.
const BIOS_BOOT: u64 = MIB;
const ESP: u64 = 2 * MIB;
const ROOT: u64 = 34 * MIB;

const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "systemd-resolved",
    "dbus",
    "udev",
    "cloud-init",
    "cloud-guest-utils",
    "qemu-guest-agent",
    "openssh-server",
    "iproute2",
    "iputils-ping",
    "netcat-openbsd",
    "netbase",
    "initramfs-tools",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "grub2-common",
    "zstd",
    "sudo",
    "ca-certificates",
    "kmod",
    "procps",
    "e2fsprogs",
];

pub(super) fn make(workshop: &Workshop, dir: &Path) -> Result<()> {
    let tools = &workshop.tools;
    let work = tempfile::tempdir_in(dir)?;
    let tar = work.path().join("root.tar");
    bootstrap(workshop, &tar)?;
    let mut unpack = Command::new("tar");
    unpack
        .arg("-C")
        .arg(work.path())
        .arg("-xf")
        .arg(&tar)
        .args([
            "./usr/lib/edgevmm-image/core.img",
            "./usr/lib/edgevmm-image/bootx64.efi",
            "./usr/lib/grub/i386-pc/boot.img",
        ]);
    process::output(&mut unpack)?;
    let made = work.path().join("usr/lib/edgevmm-image");
    let raw = work.path().join("disk.raw");
    File::create(&raw)?.set_len(SIZE)?;
    let layout = format!(
        "label: gpt\nunit: sectors\n\
         start={},size=2048,type=21686148-6449-6E6F-744E-656564454649,name=BIOS\n\
         start={},size=65536,type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B,name=ESP\n\
         start={},size={},type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709,name=root\n",
        BIOS_BOOT / 512,
        ESP / 512,
        ROOT / 512,
        (SIZE - MIB - ROOT) / 512
    );
    disk::partition(tools, &raw, &layout)?;
    let features = [
        "-O",
        "^metadata_csum_seed,^orphan_file",
        "-m",
        "1",
        "-J",
        "size=16",
    ];
    disk::make_ext4(tools, &tar, &raw, ROOT..SIZE - MIB, "root", &features)?;
    let boot = fs::read(work.path().join("usr/lib/grub/i386-pc/boot.img"))?;
    disk::embed_grub(
        &raw,
        &boot,
        fs::read(made.join("core.img"))?,
        BIOS_BOOT / 512,
    )?;
    let esp = work.path().join("esp");
    make_esp(workshop, &made.join("bootx64.efi"), &esp)?;
    disk::place(&raw, ESP, &esp)?;
    disk::to_qcow2(tools, &raw, &dir.join("debian12.qcow2"))
}

/// Installs the distribution into a tar file; its own scripts run, so it takes root's rights, be it
/// only in a user namespace.
fn bootstrap(workshop: &Workshop, tar: &Path) -> Result<()> {
    ensure_mmdebstrap()?;
    let suite = workshop.mirror.guest_suite();
    let mut include = vec![workshop.mirror.cloud_kernel()];
    include.extend(PACKAGES);
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=apt", "--format=tar"]);
    mmdebstrap.arg(format!("--include={}", include.join(",")));
    for left_out in ["man", "doc", "locale"] {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{left_out}/*"));
    }
    // By way of the environment: whoever runs the hook may not be able to read this user's files.
    mmdebstrap.env("CUSTOMIZE", CUSTOMIZE);
    mmdebstrap.arg("--customize-hook=printf %s \"$CUSTOMIZE\" | chroot \"$1\" sh -s");
    mmdebstrap
        .arg(suite)
        .arg(tar)
        .arg(workshop.mirror.source_line(suite));
    process::output(&mut mmdebstrap).map(drop)
}

fn ensure_mmdebstrap() -> Result<()> {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| dir.join("mmdebstrap").exists())
    });
    if found {
        Ok(())
    } else {
        crate::host::install(&["mmdebstrap"])
    }
}

fn make_esp(workshop: &Workshop, loader: &Path, esp: &Path) -> Result<()> {
    let tools = &workshop.tools;
    File::create(esp)?.set_len(ROOT - ESP)?;
    process::output(
        tools
            .command("usr/sbin/mkfs.fat")
            .args(["-n", "ESP"])
            .arg(esp),
    )?;
    for (program, arguments) in [
        ("usr/bin/mtools", ["mmd", "::/EFI"]),
        ("usr/bin/mtools", ["mmd", "::/EFI/BOOT"]),
    ] {
        let [applet, target] = arguments;
        process::output(
            tools
                .command(program)
                .args(["-c", applet, "-i"])
                .arg(esp)
                .arg(target),
        )?;
    }
    let mut copy = tools.command("usr/bin/mtools");
    copy.args(["-c", "mcopy", "-i"])
        .arg(esp)
        .arg(loader)
        .arg("::/EFI/BOOT/BOOTX64.EFI");
    process::output(&mut copy)
        .context("Cannot fill the ESP")
        .map(drop)
}
