//! On the disks that the fuzz target begins with: made by sfdisk, mke2fs, mkfs.fat and mtools.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::seeds::fast::unpack;
use crate::testing::disk_of;

fn seed(name: &str) -> Vec<u8> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/fast_disk");
    unpack(&std::fs::read(format!("{directory}/{name}")).unwrap())
}

fn choose(disks: Vec<Vec<u8>>) -> Result<Choice, Decline> {
    let disks: Vec<_> = disks.into_iter().map(disk_of).collect();
    Volumes::find(&disks)?.choose()
}

/// Name, command line and number of RAM disks; the kernel must be one.
fn chosen(name: &str) -> (String, String, usize) {
    let mut choice = choose(vec![seed(name)]).unwrap();
    let kernel = &mut choice.kernel;
    let mut magic = [0; 4];
    let at = kernel.piece.offset + 0x202;
    kernel.file.read_at(at, &mut magic).unwrap();
    assert_eq!(magic, *b"HdrS");
    (choice.name, choice.command_line, choice.initrds.len())
}

#[test]
fn grub_decides_on_any_ext_file_system_and_table() {
    for name in ["mbr-ext4", "gpt-ext2", "journal"] {
        let line = "BOOT_IMAGE=/vmlinuz root=LABEL=root".to_owned();
        assert_eq!(chosen(name), ("/vmlinuz".to_owned(), line, 2), "{name}");
    }
}

#[test]
fn boot_loader_entries_and_unified_images_decide_on_a_system_partition() {
    let entry = ("/vmlinuz".to_owned(), "quiet".to_owned(), 1);
    assert_eq!(chosen("esp-entries"), entry);
    let line = "root=LABEL=root quiet".to_owned();
    let image = ("/EFI/Linux/debian-12.efi".to_owned(), line, 1);
    assert_eq!(chosen("esp-unified"), image);
}

#[test]
fn the_first_disk_with_anything_is_the_one() {
    let blank = || vec![0; 1 << 20];
    let name = |disks| choose(disks).map(|choice| choice.name);
    let (entries, unified) = (|| seed("esp-entries"), || seed("esp-unified"));
    assert_eq!(name(vec![entries(), unified()]).unwrap(), "/vmlinuz");
    let later = name(vec![blank(), unified(), entries()]);
    assert_eq!(later.unwrap(), "/EFI/Linux/debian-12.efi");
    let reason = |disks| name(disks).unwrap_err().reason;
    assert_eq!(reason(vec![]), Reason::Disk);
    assert_eq!(reason(vec![blank()]), Reason::Layout);
}

/// A disk with an MBR of partitions of 4 MiB each: their types, and where they begin.
fn with_mbr(mut disk: Vec<u8>, partitions: [(u8, usize); 2]) -> Vec<u8> {
    let mut mbr = vec![0; 512];
    for (index, (kind, first)) in partitions.into_iter().enumerate() {
        let entry = &mut mbr[446 + index * 16..462 + index * 16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&u32::try_from(first / 512).unwrap().to_le_bytes());
        entry[12..16].copy_from_slice(&8192_u32.to_le_bytes());
    }
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    disk[..512].copy_from_slice(&mbr);
    disk
}

#[test]
fn a_file_system_that_is_left_out_is_named_rather_than_one_that_is_unknown() {
    let mut disk = vec![0; 10 << 20];
    disk[5 << 20..][..4].copy_from_slice(b"XFSB");
    for [first, second] in [[1, 5], [5, 1]] {
        let partitions = [(0xda, first << 20), (0x83, second << 20)];
        let decline = choose(vec![with_mbr(disk.clone(), partitions)]).unwrap_err();
        assert_eq!(decline.text, "XFS is left out");
    }
}

#[test]
fn two_boot_loaders_on_a_disk_are_declined() {
    // A system partition's content in place of the second partition of a disk with GRUB.
    let mut disk = seed("gpt-ext2");
    let esp = seed("esp-unified");
    let start = 2048 * 512;
    disk.resize(disk.len() + (4 << 20), 0);
    let at = disk.len() - (4 << 20);
    disk[at..].copy_from_slice(&esp[start..start + (4 << 20)]);
    let disk = with_mbr(disk, [(0x83, start), (0xef, at)]);
    let decline = choose(vec![disk]).unwrap_err();
    assert_eq!(decline.reason, Reason::Nothing);
    assert_eq!(decline.text, "there are configurations of two boot loaders");
}
