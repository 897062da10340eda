#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::testing::disk_of;

/// A program of the administrator's, which may not be on the path.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env(
        "PATH",
        format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()),
    );
    command
}

/// An ext4 file system of 4 MiB with a few files.
fn ext4(options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    std::fs::create_dir_all(root.join("boot/grub")).unwrap();
    std::fs::write(root.join("boot/grub/grub.cfg"), "set timeout=0\n").unwrap();
    std::fs::write(root.join("boot/big"), big()).unwrap();
    std::os::unix::fs::symlink("boot/big", root.join("vmlinuz")).unwrap();
    std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
    let image = directory.path().join("image");
    let made = tool("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-L", "root", "-d"])
        .arg(&root)
        .args(options)
        .arg(&image)
        .arg("4M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    std::fs::read(Path::new(&image)).unwrap()
}

fn big() -> Vec<u8> {
    (0..300_001_u32).map(|i| (i % 251) as u8).collect()
}

/// Bytes of a FAT12 file system: boot sector, one table, root directory, data in sectors.
struct Fat(Vec<u8>);

impl Fat {
    const SECTORS: usize = 256;
    const ROOT: usize = 3;
    const DATA: usize = 4;

    fn new() -> Self {
        let mut bytes = vec![0; Self::SECTORS * 512];
        let boot: [(usize, &[u8]); 10] = [
            (0, &[0xeb, 0x3c, 0x90]),
            (11, &[0, 2, 1, 1, 0, 1, 16, 0, 0, 1]),
            (22, &[2, 0]),
            (36, &[0x80, 0, 0x29]),
            (39, &[0x78, 0x56, 0x34, 0x12]),
            (43, b"ESP        "),
            (54, b"FAT12   "),
            (510, &[0x55, 0xaa]),
            (512, &[0xf8, 0xff, 0xff]),
            (0, &[]),
        ];
        for (at, value) in boot {
            bytes[at..at + value.len()].copy_from_slice(value);
        }
        Self(bytes)
    }

    fn link(&mut self, cluster: usize, next: u16) {
        let at = 512 + cluster * 3 / 2;
        let shift = cluster % 2 * 4;
        let old = u16::from_le_bytes([self.0[at], self.0[at + 1]]);
        let value = old & !(0xfff << shift) | next << shift;
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn entry(&mut self, sector: usize, index: usize, entry: &[u8; 32]) {
        let at = sector * 512 + index * 32;
        self.0[at..at + 32].copy_from_slice(entry);
    }

    fn put(&mut self, cluster: usize, bytes: &[u8]) {
        let at = (Self::DATA + cluster - 2) * 512;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn short(name: &[u8; 11], attributes: u8, cluster: u16, len: u32) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    entry[26..28].copy_from_slice(&cluster.to_le_bytes());
    entry[28..].copy_from_slice(&len.to_le_bytes());
    entry
}

/// One entry of a long name of at most 13 characters.
fn long(name: &str, of: &[u8; 11]) -> [u8; 32] {
    let mut entry = [0xff; 32];
    entry[0] = 0x41;
    entry[11] = 0x0f;
    entry[12] = 0;
    entry[13] = of
        .iter()
        .fold(0_u8, |sum, b| sum.rotate_right(1).wrapping_add(*b));
    entry[26..28].fill(0);
    let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
    for (place, unit) in places.iter().zip(name.encode_utf16().chain([0])) {
        entry[*place..place + 2].copy_from_slice(&unit.to_le_bytes());
    }
    entry
}

/// `/EFI/Linux-6.1.efi` of three clusters that are not in a row.
fn fat() -> Fat {
    let mut fat = Fat::new();
    fat.entry(Fat::ROOT, 0, &short(b"ESP        ", 8, 0, 0));
    fat.entry(Fat::ROOT, 1, &short(b"EFI        ", 16, 2, 0));
    fat.link(2, 0xfff);
    let mut directory = Vec::new();
    directory.extend(short(b".          ", 16, 2, 0));
    directory.extend(short(b"..         ", 16, 0, 0));
    directory.extend(long("Linux-6.1.efi", b"LINUX-~1EFI"));
    directory.extend(short(b"LINUX-~1EFI", 0, 3, 1100));
    fat.put(2, &directory);
    for (cluster, next) in [(3, 9), (9, 5), (5, 0xfff)] {
        fat.link(cluster, next);
    }
    fat.put(3, &[3; 512]);
    fat.put(9, &[9; 512]);
    fat.put(5, &[5; 512]);
    fat
}

#[test]
fn ext4_files_are_found_and_read() {
    for options in [
        &[][..],
        &["-O", "^extents,^64bit,^metadata_csum"],
        &["-b", "1024"],
    ] {
        let volume = Volume::open(&disk_of(ext4(options))).unwrap();
        assert_eq!(volume.label(), "root");
        assert_eq!(volume.uuid().len(), 36);
        let config = volume.read("//boot/./grub/grub.cfg", 100).unwrap();
        assert_eq!(config.as_deref(), Some(&b"set timeout=0\n"[..]));
        let mut file = volume.open_file("/vmlinuz").unwrap().unwrap();
        let mut bytes = vec![0; 300_001];
        file.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, big());
        let mut part = [0; 5000];
        file.read_at(100_000, &mut part).unwrap();
        assert_eq!(part[..], big()[100_000..105_000]);
        assert!(file.read_at(299_999, &mut part).is_err());
        assert!(volume.find("/nothing/there").unwrap().is_none());
        assert!(volume.find("/loop").is_err());
        assert!(matches!(
            volume.find("/boot/").unwrap(),
            Some(Node::Directory)
        ));
        assert!(volume.names("/boot").unwrap().contains(&"grub".to_owned()));
        assert!(volume.names("/vmlinuz").unwrap().is_empty());
        assert!(volume.read("/boot/big", 1000).is_err());
    }
}

/// A directory's block that is only in the journal, as after a crash.
#[test]
fn what_only_the_journal_has_is_read_from_there() {
    for options in [
        &["-b", "1024", "-J", "size=1"][..],
        &["-b", "1024", "-J", "size=1", "-O", "^64bit,^metadata_csum"],
    ] {
        let bytes = ext4(options);
        let at = bytes.windows(5).position(|w| w == b"\x03\x01big");
        let block = at.unwrap() / 1024;
        let mut newer = bytes[block * 1024..][..1024].to_vec();
        newer[at.unwrap() % 1024 + 2..][..3].copy_from_slice(b"gib");
        let directory = tempfile::tempdir().unwrap();
        let (image, content) = (
            directory.path().join("image"),
            directory.path().join("block"),
        );
        std::fs::write(&image, bytes).unwrap();
        std::fs::write(&content, newer).unwrap();
        let commands = format!("jo\njw -b {block} {}\njc\n", content.display());
        let script = directory.path().join("script");
        std::fs::write(&script, commands).unwrap();
        let written = tool("debugfs")
            .arg("-w")
            .arg("-f")
            .arg(&script)
            .arg(&image)
            .output();
        assert!(written.unwrap().status.success());
        let volume = Volume::open(&disk_of(std::fs::read(&image).unwrap())).unwrap();
        assert_eq!(volume.read("/boot/gib", 1 << 20).unwrap(), Some(big()));
        assert!(volume.find("/boot/big").unwrap().is_none());
    }
}

#[test]
fn fat_files_are_found_and_read() {
    let volume = Volume::open(&disk_of(fat().0)).unwrap();
    assert_eq!(
        (volume.uuid().as_str(), volume.label().as_str()),
        ("1234-5678", "ESP")
    );
    assert_eq!(volume.names("/efi").unwrap(), [".", "..", "Linux-6.1.efi"]);
    let mut file = volume
        .open_file("/efi/../EFI/linux-6.1.EFI")
        .unwrap()
        .unwrap();
    let mut bytes = vec![0; 1100];
    file.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [vec![3; 512], vec![9; 512], vec![5; 76]].concat());
    file.read_at(510, &mut bytes[..4]).unwrap();
    assert_eq!(bytes[..4], [3, 3, 9, 9]);
    assert!(volume.find("/EFI/Linux").unwrap().is_none());
    assert!(volume.find("/EFI/Linux-6.1.efi/x").unwrap().is_none());
}

#[test]
fn fat_chains_without_end_end() {
    let mut fat = fat();
    fat.link(5, 3);
    let volume = Volume::open(&disk_of(fat.0.clone())).unwrap();
    assert!(volume.open_file("/EFI/Linux-6.1.efi").unwrap().is_some());
    // A directory that goes in a circle ends where directories end.
    fat.link(2, 2);
    fat.put(2, &[0x41; 512]);
    let volume = Volume::open(&disk_of(fat.0)).unwrap();
    assert!(volume.find("/EFI/x").unwrap().is_none());
    assert!(volume.names("/EFI").is_err());
}

#[test]
fn file_systems_that_are_left_out_are_named() {
    let mut bytes = vec![0; 1 << 20];
    let text = |bytes: &[u8]| Volume::open(&disk_of(bytes.to_vec())).unwrap_err().text;
    assert_eq!(text(&bytes), "the file system is unknown");
    bytes[..4].copy_from_slice(b"XFSB");
    assert_eq!(text(&bytes), "XFS is left out");
    assert_eq!(text(&[]), "the file system is unknown");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_damaged_fat_is_read_or_refused(changes in prop::collection::vec((0..5000_usize, any::<u8>()), 1..12)) {
        let mut fat = fat();
        for (at, byte) in changes {
            fat.0[at] = byte;
        }
        if let Ok(volume) = Volume::open(&disk_of(fat.0)) {
            let _ = volume.names("/EFI");
            if let Ok(Some(mut file)) = volume.open_file("/EFI/Linux-6.1.efi") {
                let len = usize::try_from(file.len()).unwrap().min(1 << 20);
                let _ = file.read_at(0, &mut vec![0; len]);
            }
        }
    }
}

/// One image for all cases: making it takes longer than reading it.
#[test]
fn a_damaged_ext4_is_read_or_refused() {
    let image = ext4(&["-O", "^metadata_csum"]);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |end: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % end as u64).unwrap()
    };
    for _ in 0..300 {
        let mut bytes = image.clone();
        for _ in 0..=random(8) {
            // Superblock, group descriptors, inodes and directories are at the front.
            let at = 1024 + random(256 << 10);
            bytes[at] = u8::try_from(random(256)).unwrap();
        }
        if let Ok(volume) = Volume::open(&disk_of(bytes)) {
            let _ = volume.names("/boot");
            if let Ok(Some(mut file)) = volume.open_file("/vmlinuz") {
                let len = usize::try_from(file.len())
                    .unwrap_or(usize::MAX)
                    .min(1 << 20);
                let _ = file.read_at(0, &mut vec![0; len]);
            }
        }
    }
}
