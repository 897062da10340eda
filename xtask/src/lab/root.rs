//! L1's file systems: an initial RAM disk that finds the root disk, and the root disk itself, a
//! squashfs of the unpacked packages that an overlay in RAM makes writable.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};

use crate::kernel::{Initrd, Kernel, unpacked_path};
use crate::packages::Tools;
use crate::process;

/// What L1 has inside and what is run from its tree on this system.
pub(super) const PACKAGES: &[&str] = &[
    // A system to run commands in.
    "base-files",
    "base-passwd",
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "gawk",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libc-bin",
    "mount",
    "nftables",
    "passwd",
    "procps",
    "psmisc",
    "sed",
    "tar",
    "util-linux",
    // What the tests use.
    "dnsmasq-base",
    "e2fsprogs",
    "ethtool",
    "iperf3",
    "jq",
    "netcat-openbsd",
    "openssh-client",
    "passt",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
    "socat",
    "sshpass",
    "strace",
    "tcpdump",
    // What makes the images; mke2fs loads libarchive to read a tar file.
    "dosfstools",
    "fdisk",
    "grub-common",
    "grub-efi-amd64-bin",
    "grub-pc-bin",
    "libarchive13t64",
    "mtools",
    "squashfs-tools",
];

/// Parts of the tree only this system's side uses.
const HOST_ONLY: &[&str] = &[
    "usr/lib/grub",
    "usr/bin/mksquashfs",
    "usr/share/mime",
    ".recipe",
];

/// Modules the initial RAM disk needs to find the root.
const EARLY_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "squashfs",
    "overlay",
];

/// Modules that commands in L1 may load, with what they depend on.
const MODULES: &[&str] = &[
    "kvm-amd",
    "kvm-intel",
    "tun",
    "tap",
    "veth",
    "bridge",
    "macvlan",
    "macvtap",
    "ipvlan",
    "vxlan",
    "dummy",
    "vhost_net",
    "vhost_vsock",
    "vhost_vdpa",
    "virtio_net",
    "virtio_scsi",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vsock_loopback",
    "9p",
    "9pnet_virtio",
    "fuse",
    "virtiofs",
    "ext4",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_utf8",
    "xfs",
    "overlay",
    "squashfs",
    "loop",
    "nbd",
    "sd_mod",
    "sr_mod",
    "dm_mod",
    "vfio-pci",
    "sch_ingress",
    "sch_htb",
    "sch_netem",
    "cls_u32",
    "cls_bpf",
    "cls_flower",
    "cls_matchall",
    "act_mirred",
    "act_nat",
    "act_skbedit",
    "af_packet",
    "msr",
    // Asked for by name by what needs CRC-32C: nf_tables, ext4, xfs.
    "crc32c-intel",
    "crc32c_generic",
];

/// Directories of modules taken as a whole.
const MODULE_DIRECTORIES: &[&str] = &["kernel/net/netfilter/", "kernel/net/ipv4/netfilter/"];

pub(super) const INITRD_INIT: &str = include_str!("initrd-init.sh");

/// Completes an unpacked tree by what the packages' scripts would have made.
pub(super) fn complete(root: &Path) -> Result<()> {
    let etc = root.join("etc");
    for (from, to) in [
        ("usr/share/base-passwd/passwd.master", "passwd"),
        ("usr/share/base-passwd/group.master", "group"),
    ] {
        fs::copy(root.join(from), etc.join(to)).with_context(|| format!("Cannot copy {from}"))?;
    }
    fs::write(
        etc.join("hosts"),
        "127.0.0.1 localhost lab\n::1 localhost\n",
    )?;
    fs::write(
        etc.join("nsswitch.conf"),
        "passwd: files\ngroup: files\nhosts: files dns\n",
    )?;
    for (link, target) in [("awk", "gawk"), ("nc", "nc.openbsd"), ("pager", "less")] {
        let link = root.join("usr/bin").join(link);
        if fs::symlink_metadata(&link).is_err() {
            symlink(target, link)?;
        }
    }
    for dir in [
        "host", "share", "dev", "proc", "sys", "run", "tmp", "root", "mnt",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    Ok(())
}

/// Writes the initial RAM disk.
pub(super) fn write_initrd(tools: &Tools, kernel: &Kernel, path: &Path) -> Result<()> {
    let initrd = Initrd::new(&tools.path("usr/bin/busybox"), INITRD_INIT)?
        .modules(&kernel.modules()?, EARLY_MODULES)?
        .finish();
    fs::write(path, initrd).with_context(|| format!("Cannot write {}", path.display()))
}

/// Writes the root disk: the tree with `kernel`'s modules and `agent`, all owned by root.
pub(super) fn write_image(tools: &Tools, kernel: &Kernel, agent: &Path, path: &Path) -> Result<()> {
    let staging = tempfile::tempdir_in(path.parent().context("An image without a directory")?)?;
    let extra = staging.path();
    copy_modules(tools, kernel, extra)?;
    let sbin = extra.join("usr/local/sbin");
    fs::create_dir_all(&sbin)?;
    let installed = sbin.join("edgevmm-lab");
    fs::copy(agent, &installed).with_context(|| format!("Cannot copy {}", agent.display()))?;
    fs::set_permissions(&installed, fs::Permissions::from_mode(0o755))?;
    merge(&tools.path(""), extra)?;
    let mut squash = tools.command("usr/bin/mksquashfs");
    squash.arg(extra).arg(path);
    squash.args([
        "-noappend",
        "-quiet",
        "-no-progress",
        "-all-root",
        "-no-xattrs",
    ]);
    // Packing would only be undone under emulation.
    squash.args([
        "-noI",
        "-noD",
        "-noF",
        "-noX",
        "-no-duplicates",
        "-wildcards",
    ]);
    process::output(squash.arg("-e").args(HOST_ONLY)).map(drop)
}

fn copy_modules(tools: &Tools, kernel: &Kernel, root: &Path) -> Result<()> {
    let modules = kernel.modules()?;
    let mut wanted = modules.closure(MODULES);
    wanted.extend(
        MODULE_DIRECTORIES
            .iter()
            .flat_map(|prefix| modules.below(prefix)),
    );
    wanted.sort();
    wanted.dedup();
    let to = root.join("usr/lib/modules").join(kernel.release());
    for path in wanted {
        let file = to.join(unpacked_path(&path));
        fs::create_dir_all(file.parent().context("A module without a directory")?)?;
        File::create(&file)?.write_all(&modules.read(&path)?)?;
    }
    for list in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        fs::copy(modules.dir().join(list), to.join(list))?;
    }
    symlink("usr/lib", root.join("lib"))?;
    let mut depmod = tools.command("usr/sbin/depmod");
    process::output(depmod.arg("-b").arg(root).arg(kernel.release()))?;
    fs::remove_file(root.join("lib")).map_err(Into::into)
}

/// Adds the tree at `from` to the one at `to`, by hard links: nothing is changed afterwards.
fn merge(from: &Path, to: &Path) -> Result<()> {
    let mut copy = std::process::Command::new("cp");
    copy.args([
        "--recursive",
        "--link",
        "--no-dereference",
        "--preserve=mode",
    ]);
    process::output(copy.arg(from.join(".")).arg(to)).map(drop)
}
