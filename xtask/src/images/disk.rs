//! Puts disks together in plain files: no loop devices, no mounting, no root.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::packages::Tools;
use crate::process;

/// What every image made here depends on.
pub(super) const RECIPE: &str = include_str!("disk.rs");

pub(super) const MIB: u64 = 1 << 20;
pub(super) const SECTOR: usize = 512;

/// Where GRUB's `boot.img` keeps the sector its core begins at.
const CORE_SECTOR: usize = 0x5c;
/// A jump in `boot.img` that makes it trust the drive number of the BIOS, when turned into nothing.
const DRIVE_CHECK: usize = 0x66;
/// Code in `boot.img` ends where an MBR's disk signature and partition table begin.
const BOOT_CODE: usize = 440;
/// Where the first sector of GRUB's core keeps the list of the others.
const BLOCK_LIST: usize = 0x1f4;
/// The segment the rest of GRUB's core is loaded at.
const CORE_SEGMENT: u16 = 0x820;

/// Writes a partition table, described as `sfdisk` wants it.
pub(super) fn partition(tools: &Tools, disk: &Path, layout: &str) -> Result<()> {
    let mut sfdisk = tools.command("usr/sbin/sfdisk");
    let mut child = sfdisk
        .args(["--quiet", "--no-tell-kernel", "--no-reread"])
        .arg(disk)
        .stdin(Stdio::piped())
        .spawn()
        .context("Cannot start sfdisk")?;
    child
        .stdin
        .take()
        .context("sfdisk has no input")?
        .write_all(layout.as_bytes())?;
    ensure!(
        child.wait()?.success(),
        "sfdisk failed on {}",
        disk.display()
    );
    Ok(())
}

/// Makes an ext4 file system with the content of a tar file in the bytes `range` of `disk`.
pub(super) fn make_ext4(
    tools: &Tools,
    tar: &Path,
    disk: &Path,
    range: Range<u64>,
    label: &str,
    options: &[&str],
) -> Result<()> {
    let mut mke2fs = tools.command("usr/sbin/mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-L", label, "-E"]);
    mke2fs.arg(format!(
        "offset={},lazy_itable_init=0,lazy_journal_init=0",
        range.start
    ));
    mke2fs.env("MKE2FS_CONFIG", tools.path("etc/mke2fs.conf"));
    mke2fs.args(options).arg("-d").arg(tar).arg(disk);
    mke2fs.arg(format!("{}k", (range.end - range.start) / 1024));
    process::output(&mut mke2fs).map(drop)
}

/// Makes a disk bootable by BIOS: `boot` into its first sector, `core` at sector `core_start`.
pub(super) fn embed_grub(
    disk: &Path,
    boot: &[u8],
    mut core: Vec<u8>,
    core_start: u64,
) -> Result<()> {
    let sectors = u16::try_from(core.len().div_ceil(SECTOR)).context("GRUB's core is too big")?;
    ensure!(
        u64::from(sectors) < MIB / 512 - 1,
        "GRUB's core does not fit before the partition"
    );
    ensure!(
        boot.len() == SECTOR && core.len() > SECTOR,
        "Not GRUB's images"
    );
    core[BLOCK_LIST..][..8].copy_from_slice(&(core_start + 1).to_le_bytes());
    core[BLOCK_LIST + 8..][..2].copy_from_slice(&(sectors - 1).to_le_bytes());
    core[BLOCK_LIST + 10..][..2].copy_from_slice(&CORE_SEGMENT.to_le_bytes());
    let mut file = File::options().read(true).write(true).open(disk)?;
    let mut first = [0; SECTOR];
    file.read_exact(&mut first)?;
    first[..BOOT_CODE].copy_from_slice(&boot[..BOOT_CODE]);
    first[CORE_SECTOR..][..8].copy_from_slice(&core_start.to_le_bytes());
    first[DRIVE_CHECK..][..2].fill(0x90);
    file.rewind()?;
    file.write_all(&first)?;
    file.seek(SeekFrom::Start(core_start * 512))?;
    file.write_all(&core)?;
    Ok(())
}

/// Writes a file at an offset of a disk.
pub(super) fn place(disk: &Path, offset: u64, from: &Path) -> Result<()> {
    let mut to = File::options().write(true).open(disk)?;
    to.seek(SeekFrom::Start(offset))?;
    std::io::copy(&mut File::open(from)?, &mut to)?;
    Ok(())
}

/// Converts a raw disk.
pub(super) fn to_qcow2(tools: &Tools, raw: &Path, qcow2: &Path) -> Result<()> {
    let mut convert = tools.command("usr/bin/qemu-img");
    convert
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .arg(raw)
        .arg(qcow2);
    process::output(&mut convert).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn grub_finds_the_rest_of_its_core() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(2 * MIB).unwrap();
        disk.as_file().write_all(&[0xee; SECTOR]).unwrap();
        let core = vec![0xcc; 3 * SECTOR + 1];
        embed_grub(disk.path(), &[0xbb; SECTOR], core, 2048).unwrap();
        let bytes = std::fs::read(disk.path()).unwrap();
        assert_eq!(bytes[CORE_SECTOR..CORE_SECTOR + 8], 2048_u64.to_le_bytes());
        assert_eq!(bytes[..CORE_SECTOR], [0xbb; CORE_SECTOR]);
        assert_eq!(bytes[BOOT_CODE..SECTOR], [0xee; SECTOR - BOOT_CODE]);
        let list = &bytes[2048 * SECTOR + BLOCK_LIST..];
        assert_eq!(list[..8], 2049_u64.to_le_bytes());
        assert_eq!(list[8..12], [3, 0, 0x20, 0x08]);
        assert_eq!(list[12..12 + 2 * SECTOR + 1], [0xcc; 2 * SECTOR + 1]);
    }

    #[test]
    fn refuses_a_core_that_would_reach_the_partition() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let core = vec![0; 2 * 1024 * 1024];
        assert!(embed_grub(disk.path(), &[0; SECTOR], core, 1).is_err());
    }
}
