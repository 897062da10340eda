//! A small "legacy" disk: MBR, one ext4 partition, GRUB between them, stock kernel, busybox.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::disk::{self, MIB};
use super::kernel::DHCP_SCRIPT;
use super::{Workshop, write};
use crate::kernel::{Initrd, Kernel};
use crate::process;

const INITRD_INIT: &str = include_str!("mini-initrd.sh");
const STARTUP: &str = include_str!("mini-rcs.sh");

/// What the image depends on, besides the kernel.
pub(super) const RECIPE: &[&str] = &[include_str!("mini.rs"), INITRD_INIT, STARTUP, DHCP_SCRIPT];

/// The size of the disk; the partition begins after the first MiB.
const SIZE: u64 = 64 * MIB;

/// Drivers for what old and new virtual machines have.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "ata_piix",
    "ahci",
    "nvme",
    "crc32c_generic",
    "ext4",
    "virtio_net",
    "e1000",
    "af_packet",
    "virtio_balloon",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];

const INITTAB: &str = "::sysinit:/etc/rcS\nttyS0::respawn:-/bin/sh\n::ctrlaltdel:/bin/poweroff\n\
                       ::shutdown:/bin/umount -a -r\n";

const GRUB_CONFIG: &str = "serial --unit=0 --speed=115200\n\
                           terminal_input console serial\n\
                           terminal_output console serial\n\
                           set timeout=0\n\
                           menuentry mini {\n\
                           linux /boot/vmlinuz root=LABEL=miniroot rw console=tty0 \
                           console=ttyS0,115200 quiet net.ifnames=0\n\
                           initrd /boot/initrd\n\
                           }\n";

/// GRUB modules that the whole of booting needs, put into its core.
const GRUB_MODULES: &[&str] = &[
    "biosdisk",
    "part_msdos",
    "ext2",
    "search",
    "search_label",
    "configfile",
    "normal",
    "linux",
    "echo",
    "serial",
    "terminal",
    "test",
];

pub(super) fn make(workshop: &Workshop, kernel_tree: &Path, dir: &Path) -> Result<()> {
    let raw = dir.join("mini.raw");
    write_disk(workshop, &Kernel::open(kernel_tree)?, MODULES, &raw)?;
    disk::to_qcow2(&workshop.tools, &raw, &dir.join("mini.qcow2"))
}

/// Writes such a disk with this kernel, and these of its modules in the initial RAM disk.
pub(super) fn write_disk(
    workshop: &Workshop,
    kernel: &Kernel,
    modules: &[&str],
    raw: &Path,
) -> Result<()> {
    let tools = &workshop.tools;
    let work = tempfile::tempdir_in(raw.parent().context("A disk without a directory")?)?;
    let root = work.path().join("root");
    write_root(workshop, kernel, modules, &root)?;
    let tar = work.path().join("root.tar");
    let mut pack = Command::new("tar");
    pack.args(["--owner=0", "--group=0", "--numeric-owner", "-C"])
        .arg(&root)
        .arg("-cf")
        .arg(&tar);
    process::output(pack.arg("."))?;
    File::create(raw)?.set_len(SIZE)?;
    let layout = "label: dos\nlabel-id: 0x4d494e49\nstart=2048,type=83,bootable\n";
    disk::partition(tools, raw, layout)?;
    // Without a journal and checksums, so that also an old GRUB and an old e2fsck know it.
    let features = "^has_journal,^metadata_csum,^64bit,^orphan_file";
    disk::make_ext4(
        tools,
        &tar,
        raw,
        MIB..SIZE,
        "miniroot",
        &["-O", features, "-N", "2048"],
    )?;
    let early = work.path().join("early.cfg");
    write(
        &early,
        "search --no-floppy --label miniroot --set=root\nset prefix=($root)/boot/grub\n\
         configfile ($root)/boot/grub/grub.cfg\n",
    )?;
    let core = work.path().join("core.img");
    let grub = tools.path("usr/lib/grub/i386-pc");
    let mut mkimage = tools.command("usr/bin/grub-mkimage");
    mkimage
        .args(["-O", "i386-pc", "-p", "/boot/grub", "-d"])
        .arg(&grub);
    mkimage
        .arg("-c")
        .arg(&early)
        .arg("-o")
        .arg(&core)
        .args(GRUB_MODULES);
    process::output(&mut mkimage)?;
    disk::embed_grub(raw, &fs::read(grub.join("boot.img"))?, fs::read(core)?, 1)
}

fn write_root(workshop: &Workshop, kernel: &Kernel, modules: &[&str], root: &Path) -> Result<()> {
    for dir in [
        "bin",
        "sbin",
        "dev",
        "proc",
        "sys",
        "tmp",
        "run",
        "root",
        "var",
        "mnt",
        "boot/grub",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = workshop.tools.path("usr/bin/busybox");
    fs::copy(&busybox, root.join("bin/busybox"))?;
    for applet in process::output(Command::new(&busybox).arg("--list"))?.lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    symlink("../bin/busybox", root.join("sbin/init"))?;
    write(&root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    write(&root.join("etc/inittab"), INITTAB)?;
    write(&root.join("etc/resolv.conf"), "")?;
    for (path, script) in [("etc/rcS", STARTUP), ("bin/udhcpc.sh", DHCP_SCRIPT)] {
        write(&root.join(path), script)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755))?;
    }
    fs::copy(kernel.image(), root.join("boot/vmlinuz"))?;
    let initrd = Initrd::new(&busybox, INITRD_INIT)?
        .modules(&kernel.modules()?, modules)?
        .finish();
    fs::write(root.join("boot/initrd"), gzip(&initrd)?)?;
    write(&root.join("boot/grub/grub.cfg"), GRUB_CONFIG)
}

/// Packs an initial RAM disk, so that the disk stays small and the firmware has less to read.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new("gzip")
        .arg("-1n")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start gzip")?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (mut stdin, mut stdout) = stdin.zip(stdout).context("gzip has no pipes")?;
    let mut packed = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes));
        stdout.read_to_end(&mut packed)
    })?;
    ensure!(child.wait()?.success(), "gzip failed");
    Ok(packed)
}
