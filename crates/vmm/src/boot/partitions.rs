//! Which firmware a disk was made for, by its partition table alone: MBR, and GPT (UEFI 2.10,
//! section 5).
//!
//! The disk is hostile: at most `TABLE_MAX` bytes are read beside two sectors, once, and nothing
//! of it is used but types and a flag. Checksums are not looked at, as a wrong answer costs no more
//! than a boot that fails. Left out: extended partitions, which no firmware starts from.

use edgevmm_block::{BlockBackend, BlockError, VolatileSlice};

/// Length of what is looked at of an MBR and a GPT header, and the least of sectors.
const SECTOR: usize = 512;
/// Largest sectors that disks have.
const SECTOR_MAX: usize = 4096;
/// Largest table of GPT entries that is read; others have been cut off.
const TABLE_MAX: usize = 64 << 10;

/// Boot code of the MBR ends where its disk signature begins.
const BOOT_CODE: usize = 440;
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY: usize = 16;
const MBR_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const TYPE_GPT: u8 = 0xee;
const TYPE_ESP: u8 = 0xef;

const GPT_MAGIC: &[u8; 8] = b"EFI PART";
const GPT_ENTRY_MIN: usize = 128;
/// The attribute that boot code of syslinux looks for.
const LEGACY_BOOTABLE: u64 = 1 << 2;
/// C12A7328-F81F-11D2-BA4B-00A0C93EC93B as it is stored.
const GUID_ESP: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];
/// 21686148-6449-6E6F-744E-656564454649 as it is stored.
const GUID_BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";

/// What a disk was made for, and how that shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootStyle {
    /// BIOS.
    Bios(&'static str),
    /// UEFI.
    Uefi(&'static str),
}

/// Finds out what `disk` was made for.
///
/// # Errors
/// Fails when the disk can't be read.
pub fn boot_style(disk: &dyn BlockBackend) -> Result<BootStyle, BlockError> {
    let mbr = match read_sector(disk, 0)? {
        Some(mbr) if mbr.ends_with(&MBR_SIGNATURE) => mbr,
        _ => return Ok(BootStyle::Bios("it has no partition table")),
    };
    let entries = mbr.get(MBR_ENTRIES..).unwrap_or_default();
    let has = |kind| {
        let mut entries = entries.chunks_exact(MBR_ENTRY);
        entries.any(|entry| entry.get(4) == Some(&kind))
    };
    if has(TYPE_GPT)
        && let Some(style) = gpt_style(disk)?
    {
        return Ok(style);
    }
    let boot_code = mbr.iter().take(BOOT_CODE).any(|byte| *byte != 0);
    Ok(if has(TYPE_ESP) && !boot_code {
        BootStyle::Uefi("its MBR has an EFI system partition and no boot code")
    } else if boot_code {
        BootStyle::Bios("its MBR has boot code")
    } else {
        BootStyle::Bios("its MBR has no EFI system partition")
    })
}

/// What the GPT says, if there is one and it says anything.
fn gpt_style(disk: &dyn BlockBackend) -> Result<Option<BootStyle>, BlockError> {
    let last = (disk.size() / sector_len(disk) as u64).saturating_sub(1);
    for lba in [1, last] {
        let header = read_sector(disk, lba)?;
        if let Some(header) = header.filter(|header| header.starts_with(GPT_MAGIC)) {
            let entries = read_entries(disk, &header)?;
            return Ok(entries.as_ref().and_then(style_of));
        }
    }
    Ok(None)
}

/// Entries of a GPT, and the length of each.
struct Entries(Vec<u8>, usize);

/// Reads the entries that a header tells of, as far as there are any.
fn read_entries(
    disk: &dyn BlockBackend,
    header: &[u8; SECTOR],
) -> Result<Option<Entries>, BlockError> {
    let field = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|it| it.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let lba = u64::from(field(72)) | u64::from(field(76)) << 32;
    let len = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
    let (count, size) = (len(field(80)), len(field(84)));
    let possible = size >= GPT_ENTRY_MIN && size.is_power_of_two() && size <= TABLE_MAX;
    if !possible {
        return Ok(None);
    }
    let table = count.saturating_mul(size).min(TABLE_MAX);
    let mut entries = vec![0; table.next_multiple_of(sector_len(disk))];
    let whole = read(disk, lba, &mut entries)?;
    entries.truncate(table);
    Ok(whole.then_some(Entries(entries, size)))
}

fn style_of(Entries(entries, size): &Entries) -> Option<BootStyle> {
    let is = |kind: [u8; 16]| {
        let mut entries = entries.chunks_exact(*size);
        entries.any(move |entry| entry.starts_with(&kind))
    };
    let legacy = entries.chunks_exact(*size).any(|entry| {
        let attributes = entry.get(48..56).and_then(|it| it.try_into().ok());
        let used = entry.iter().take(16).any(|byte| *byte != 0);
        used && u64::from_le_bytes(attributes.unwrap_or_default()) & LEGACY_BOOTABLE != 0
    });
    if is(GUID_BIOS_BOOT) {
        Some(BootStyle::Bios("its GPT has a BIOS boot partition"))
    } else if legacy {
        Some(BootStyle::Bios("its GPT has a partition marked for BIOS"))
    } else if is(GUID_ESP) {
        Some(BootStyle::Uefi(
            "its GPT has an EFI system partition and none for BIOS",
        ))
    } else {
        None
    }
}

fn sector_len(disk: &dyn BlockBackend) -> usize {
    let len = usize::try_from(disk.limits().logical_block).unwrap_or(SECTOR);
    len.clamp(SECTOR, SECTOR_MAX)
}

/// The begin of a sector; `None` when the disk ends before.
fn read_sector(disk: &dyn BlockBackend, lba: u64) -> Result<Option<[u8; SECTOR]>, BlockError> {
    let mut bytes = vec![0; sector_len(disk)];
    let whole = read(disk, lba, &mut bytes)?;
    Ok(bytes.first_chunk().copied().filter(|_| whole))
}

/// Reads from a sector on; false when the disk ends before.
fn read(disk: &dyn BlockBackend, lba: u64, bytes: &mut [u8]) -> Result<bool, BlockError> {
    let Some(offset) = lba.checked_mul(sector_len(disk) as u64) else {
        return Ok(false);
    };
    let end = offset.checked_add(bytes.len() as u64);
    if end.is_none_or(|end| end > disk.size()) {
        return Ok(false);
    }
    disk.read_vectored(&[VolatileSlice::from(bytes)], offset)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use edgevmm_block::{DiskOptions, ImageFormat};
    use tempfile::NamedTempFile;

    use super::BootStyle::{Bios, Uefi};
    use super::*;

    const SIZE: u64 = 64 << 20;
    const ESP: &str = "type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
    const BIOS_BOOT: &str = "type=21686148-6449-6E6F-744E-656564454649";

    fn style(disk: &NamedTempFile) -> BootStyle {
        let options = DiskOptions {
            format: Some(ImageFormat::Raw),
            ..DiskOptions::new(disk.reopen().unwrap(), "disk")
        };
        boot_style(&*edgevmm_block::open(options).unwrap()).unwrap()
    }

    fn blank() -> NamedTempFile {
        let disk = NamedTempFile::new().unwrap();
        disk.as_file().set_len(SIZE).unwrap();
        disk
    }

    /// A disk that sfdisk has partitioned.
    fn disk(table: &str) -> NamedTempFile {
        let disk = blank();
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        let mut sfdisk = Command::new("sfdisk");
        sfdisk.env("PATH", path).args(["--quiet", "--no-reread"]);
        let mut child = sfdisk
            .arg(disk.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        input.unwrap().write_all(table.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        disk
    }

    fn add_boot_code(disk: &NamedTempFile) {
        disk.as_file().write_all_at(&[0xeb, 0x63, 0x90], 0).unwrap();
    }

    #[test]
    fn gpt_tells_by_its_partitions() {
        for (partitions, expected) in [
            (format!("size=1M,{BIOS_BOOT}\nsize=32M,{ESP}\n"), false),
            (format!("size=32M,{ESP}\n"), true),
            (format!("size=8M\nsize=32M,{ESP}\n"), true),
            (format!("size=1M,{BIOS_BOOT}\n"), false),
            (
                format!("size=32M,{ESP}\nsize=8M,attrs=LegacyBIOSBootable\n"),
                false,
            ),
            ("size=32M\n".to_owned(), false),
        ] {
            let disk = disk(&format!("label: gpt\n{partitions}"));
            let style = style(&disk);
            assert_eq!(matches!(style, Uefi(_)), expected, "{partitions} {style:?}");
        }
    }

    #[test]
    fn the_backup_tells_what_the_first_gpt_can_not() {
        let disk = disk(&format!("label: gpt\nsize=32M,{ESP}\n"));
        disk.as_file().write_all_at(&[0; 512 * 33], 512).unwrap();
        assert!(matches!(style(&disk), Uefi(_)));
        let header = (SIZE - 512) as usize;
        disk.as_file()
            .write_all_at(&[0; 512], header as u64)
            .unwrap();
        assert_eq!(style(&disk), Bios("its MBR has no EFI system partition"));
    }

    #[test]
    fn mbr_tells_by_its_boot_code() {
        let disk = disk("label: dos\nsize=32M,type=ef\nsize=8M,type=83,bootable\n");
        assert!(matches!(style(&disk), Uefi(_)));
        add_boot_code(&disk);
        assert_eq!(style(&disk), Bios("its MBR has boot code"));
    }

    #[test]
    fn whatever_else_is_for_bios() {
        assert_eq!(style(&blank()), Bios("it has no partition table"));
        let linux = disk("label: dos\nsize=32M,type=83\n");
        assert!(matches!(style(&linux), Bios(_)));
        let short = NamedTempFile::new().unwrap();
        File::create(short.path()).unwrap().set_len(512).unwrap();
        assert!(matches!(style(&short), Bios(_)));
    }

    #[test]
    fn no_header_is_believed() {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..200 {
            let disk = disk_of_round(round);
            let mut bytes = [0xff; 20];
            for byte in bytes.iter_mut().take(round % 21) {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (random >> 56) as u8;
            }
            disk.as_file().write_all_at(&bytes, 512 + 70).unwrap();
            style(&disk);
        }
    }

    fn disk_of_round(round: usize) -> NamedTempFile {
        let disk = blank();
        disk.as_file().set_len(SIZE - round as u64 % 2).unwrap();
        let mut mbr = [0; 512];
        mbr[450] = TYPE_GPT;
        mbr[510..].copy_from_slice(&MBR_SIGNATURE);
        disk.as_file().write_all_at(&mbr, 0).unwrap();
        disk.as_file().write_all_at(GPT_MAGIC, 512).unwrap();
        disk
    }
}
