//! The guests of the matrix: like the mini disk, of any release, with either partition table and
//! several root file systems, bootable by BIOS and by UEFI.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::disk::{self, MIB};
use super::shape::{KernelKind, RootFs, Shape, Table};
use super::{Workshop, write};
use crate::kernel::{self, Initrd, Kernel};
use crate::packages::{self, Apt, Tools};
use crate::process;

const INITRD_INIT: &str = include_str!("guest-initrd.sh");
const STARTUP: &str = include_str!("guest-rcs.sh");

/// What the images depend on.
pub(super) const RECIPE: &[&str] = &[include_str!("guest.rs"), INITRD_INIT, STARTUP];

/// Where the partitions begin and end, in both tables; the last MiB is the GPT's backup's.
const BIOS_BOOT: u64 = MIB;
const ESP: u64 = 2 * MIB;
/// The root's place. XFS takes no less than 300 MiB.
pub const ROOT: std::ops::Range<u64> = 34 * MIB..419 * MIB;
const SIZE: u64 = 420 * MIB;

/// The packages with programs that make and check file systems.
const FS_PACKAGES: &[&str] = &["e2fsprogs", "xfsprogs", "btrfs-progs"];

const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "ahci",
    "ata_piix",
    "sd_mod",
    "crc32c_generic",
    "libcrc32c",
];

const INITTAB: &str = "::wait:/etc/rcS\n::shutdown:/bin/busybox umount -a -r\n";

/// GRUB modules put into its core.
const GRUB_MODULES: &[&str] = &[
    "biosdisk",
    "part_gpt",
    "part_msdos",
    "ext2",
    "xfs",
    "btrfs",
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

/// What GRUB reads first, in its core or on the ESP.
const GRUB_EARLY: &str = "search --no-floppy --label root --set=root\n\
                          set prefix=($root)/boot/grub\n\
                          configfile ($root)/boot/grub/grub.cfg\n";

/// A package of the closure that is wanted for the tools: libraries and the programs.
fn is_tool(file: &str) -> bool {
    ["lib", "zlib"]
        .iter()
        .chain(FS_PACKAGES)
        .any(|prefix| file.starts_with(prefix))
}

/// Unpacks the programs that make and check file systems.
pub(super) fn make_tools(workshop: &Workshop, dir: &Path) -> Result<()> {
    let apt = Apt::open(&workshop.apt, &workshop.mirror, workshop.mirror.lab_suite())?;
    packages::unpack(&apt.download(FS_PACKAGES, is_tool)?, dir)
}

/// A package of the closure that a guest is made of.
fn is_part(file: &str) -> bool {
    let versioned = kernel::PACKAGES.iter().any(|prefix| {
        file.strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    });
    let others = [
        "busybox-static_",
        "grub-common_",
        "grub2-common_",
        "grub-pc-bin_",
        "grub-efi-amd64-bin_",
        "grub-efi-amd64-unsigned_",
    ];
    versioned || others.iter().any(|name| file.starts_with(name))
}

/// Takes kernel, busybox and GRUB out of the packages of a release, and makes RAM disks.
pub(super) fn make_parts(
    workshop: &Workshop,
    suite: &str,
    kernel: KernelKind,
    dir: &Path,
) -> Result<()> {
    let mirror = &workshop.mirror;
    let package = match kernel {
        KernelKind::Cloud => mirror.cloud_kernel(),
        KernelKind::Generic => mirror.generic_kernel(),
    };
    let work = tempfile::tempdir_in(dir)?;
    let tree = work.path();
    let apt = Apt::open(&workshop.apt, mirror, suite)?;
    let names = [
        package,
        "grub-pc-bin",
        "grub-efi-amd64-bin",
        "busybox-static",
    ];
    packages::unpack(&apt.download(&names, is_part)?, tree)?;
    let kernel = Kernel::index(tree, &workshop.tools)?;
    fs::copy(kernel.image(), dir.join("vmlinuz"))?;
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| tree.join(path));
    let busybox = busybox.iter().find(|path| path.is_file());
    let busybox = busybox.with_context(|| format!("No busybox in {suite}"))?;
    fs::copy(busybox, dir.join("busybox"))?;
    fs::copy(
        tree.join("usr/lib/grub/x86_64-efi/monolithic/grubx64.efi"),
        dir.join("grubx64.efi"),
    )
    .with_context(|| format!("No GRUB for UEFI in {suite}"))?;
    make_core(&workshop.tools, tree, dir)?;
    let modules = kernel.modules()?;
    for root in RootFs::ALL {
        let init = INITRD_INIT.replace("@ROOT@", root.name());
        let wanted = [MODULES, &[root.name()]].concat();
        let initrd = Initrd::new(busybox, &init)?
            .modules(&modules, &wanted)?
            .finish();
        let plain = dir.join(initrd_name(root));
        fs::write(&plain, initrd)?;
        process::output(
            Command::new("gzip")
                .args(["-1n", "--suffix=.packed"])
                .arg(&plain),
        )?;
        fs::rename(plain.with_extension("packed"), plain)?;
    }
    Ok(())
}

/// The name of the RAM disk that mounts such a root.
pub(super) fn initrd_name(root: RootFs) -> String {
    format!("initrd-{}", root.name())
}

/// Has the release's own GRUB make its core for BIOS.
fn make_core(tools: &Tools, tree: &Path, dir: &Path) -> Result<()> {
    let early = dir.join("early.cfg");
    write(&early, GRUB_EARLY)?;
    let modules = tree.join("usr/lib/grub/i386-pc");
    let mut mkimage = tools.command_at(&tree.join("usr/bin/grub-mkimage"));
    mkimage.args(["-O", "i386-pc", "-p", "/boot/grub", "-d"]);
    mkimage.arg(&modules).arg("-c").arg(&early).arg("-o");
    mkimage.arg(dir.join("core.img")).args(GRUB_MODULES);
    process::output(&mut mkimage)?;
    fs::copy(modules.join("boot.img"), dir.join("boot.img"))?;
    Ok(())
}

/// Makes a guest's disk, qcow2, of a release's `parts`. `fs_tools` make its root.
pub(super) fn make(
    workshop: &Workshop,
    fs_tools: &Tools,
    parts: &Path,
    shape: Shape,
    dir: &Path,
) -> Result<()> {
    let work = tempfile::tempdir_in(dir)?;
    let tree = work.path().join("root");
    write_root(parts, shape.root, &tree)?;
    let raw = work.path().join("disk.raw");
    File::create(&raw)?.set_len(SIZE)?;
    disk::partition(&workshop.tools, &raw, &layout(shape.table))?;
    match shape.root {
        RootFs::Ext4 => {
            let tar = work.path().join("root.tar");
            let mut pack = Command::new("tar");
            pack.args(["--owner=0", "--group=0", "--numeric-owner", "-C"]);
            pack.arg(&tree).arg("-cf").arg(&tar).arg(".");
            process::output(&mut pack)?;
            // What the GRUB of older releases knows.
            let features = ["-O", "^metadata_csum_seed,^orphan_file", "-J", "size=8"];
            disk::make_ext4(&workshop.tools, &tar, &raw, ROOT, "root", &features)?;
        }
        RootFs::Xfs | RootFs::Btrfs => {
            let part = work.path().join("part.raw");
            File::create(&part)?.set_len(ROOT.end - ROOT.start)?;
            if shape.root == RootFs::Xfs {
                make_xfs(fs_tools, &tree, &part)?;
            } else {
                let mut mkfs = fs_tools.command("usr/sbin/mkfs.btrfs");
                mkfs.args(["-q", "-L", "root", "--rootdir"]).arg(&tree);
                process::output(mkfs.arg(&part))?;
            }
            disk::place(&raw, ROOT.start, &part)?;
        }
    }
    let core_start = match shape.table {
        Table::Gpt => BIOS_BOOT / 512,
        Table::Mbr => 1,
    };
    let (boot, core) = (
        fs::read(parts.join("boot.img"))?,
        fs::read(parts.join("core.img"))?,
    );
    disk::embed_grub(&raw, &boot, core, core_start)?;
    let esp = work.path().join("esp");
    make_esp(&workshop.tools, parts, work.path(), &esp)?;
    disk::place(&raw, ESP, &esp)?;
    disk::to_qcow2(&workshop.tools, &raw, &dir.join("disk.qcow2"))
}

/// An ESP as the GRUB of a Debian that was installed leaves it, on the removable path.
fn make_esp(tools: &Tools, parts: &Path, work: &Path, esp: &Path) -> Result<()> {
    let efi = work.join("EFI");
    write(&efi.join("debian/grub.cfg"), GRUB_EARLY)?;
    fs::create_dir(efi.join("BOOT"))?;
    fs::copy(parts.join("grubx64.efi"), efi.join("BOOT/BOOTX64.EFI"))?;
    File::create(esp)?.set_len(ROOT.start - ESP)?;
    let mut mkfs = tools.command("usr/sbin/mkfs.fat");
    process::output(mkfs.args(["-n", "ESP"]).arg(esp))?;
    let mut copy = tools.command("usr/bin/mtools");
    copy.args(["-c", "mcopy", "-s", "-i"]).arg(esp).arg(&efi);
    process::output(copy.arg("::")).map(drop)
}

fn layout(table: Table) -> String {
    let [bios, esp, root, end] = [BIOS_BOOT, ESP, ROOT.start, ROOT.end].map(|at| at / 512);
    match table {
        Table::Gpt => format!(
            "label: gpt\nunit: sectors\n\
             start={bios},size={},type=21686148-6449-6E6F-744E-656564454649,name=BIOS\n\
             start={esp},size={},type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B,name=ESP\n\
             start={root},size={},type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709,name=root\n",
            esp - bios,
            root - esp,
            end - root
        ),
        Table::Mbr => format!(
            "label: dos\nunit: sectors\n\
             start={esp},size={},type=ef\nstart={root},size={},type=83,bootable\n",
            root - esp,
            end - root
        ),
    }
}

/// XFS with what the oldest kernel and GRUB know, filled by a prototype file.
fn make_xfs(tools: &Tools, tree: &Path, part: &Path) -> Result<()> {
    let mut proto = "boot\n0 0\nd--755 0 0\n".to_owned();
    describe(tree, &mut proto)?;
    let file = part.with_extension("proto");
    fs::write(&file, proto)?;
    let mut mkfs = tools.command("usr/sbin/mkfs.xfs");
    mkfs.args([
        "-q",
        "-L",
        "root",
        "-i",
        "nrext64=0,exchange=0",
        "-n",
        "parent=0",
    ]);
    mkfs.args(["-m", "bigtime=0,inobtcount=0,rmapbt=0", "-p"]);
    process::output(mkfs.arg(&file).arg(part)).map(drop)
}

/// The entries of a directory and its end, as `mkfs.xfs -p` wants them.
fn describe(dir: &Path, proto: &mut String) -> Result<()> {
    for entry in fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()? {
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_str().context("A name that is not UTF-8")?;
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            writeln!(
                proto,
                "{name} l--777 0 0 {}",
                fs::read_link(&path)?.display()
            )?;
        } else if kind.is_dir() {
            writeln!(proto, "{name} d--755 0 0")?;
            describe(&path, proto)?;
        } else {
            writeln!(proto, "{name} ---755 0 0 {}", path.display())?;
        }
    }
    writeln!(proto, "$")?;
    Ok(())
}

fn write_root(parts: &Path, root: RootFs, tree: &Path) -> Result<()> {
    for dir in ["bin", "sbin", "dev", "proc", "sys", "root", "boot/grub"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::copy(parts.join("busybox"), tree.join("bin/busybox"))?;
    symlink("busybox", tree.join("bin/sh"))?;
    symlink("../bin/busybox", tree.join("sbin/init"))?;
    write(&tree.join("etc/inittab"), INITTAB)?;
    write(&tree.join("etc/rcS"), STARTUP)?;
    fs::set_permissions(tree.join("etc/rcS"), fs::Permissions::from_mode(0o755))?;
    fs::copy(parts.join("vmlinuz"), tree.join("boot/vmlinuz"))?;
    fs::copy(parts.join(initrd_name(root)), tree.join("boot/initrd"))?;
    write(
        &tree.join("boot/grub/grub.cfg"),
        &format!(
            "serial --unit=0 --speed=115200\n\
             terminal_input console serial\n\
             terminal_output console serial\n\
             set timeout=0\n\
             menuentry guest {{\n\
             linux /boot/vmlinuz {}\n\
             initrd /boot/initrd\n\
             }}\n",
            cmdline()
        ),
    )
}

/// What the kernel is told.
pub(super) fn cmdline() -> &'static str {
    "root=LABEL=root rw console=ttyS0,115200 quiet"
}

/// A guest's files.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    /// The disk, qcow2.
    pub disk: PathBuf,
    /// Its kernel and RAM disk, for booting it directly.
    pub kernel: PathBuf,
    /// See `kernel`.
    pub initrd: PathBuf,
    /// What its boot loader tells the kernel.
    pub cmdline: &'static str,
    /// Programs that check file systems.
    pub tools: Tools,
}
