//! What is special about VHD and VHDX: sizes told in two ways, and checksums.

use edgevmm_block::{DiskPaths, Existing, NewFile, open, overlay};

use super::*;

/// Changes a structure of a VHD and its checksum.
fn change_vhd(path: &Path, at: u64, len: usize, sum_at: usize, change: impl FnOnce(&mut [u8])) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    change(&mut bytes);
    bytes[sum_at..sum_at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    bytes[sum_at..sum_at + 4].copy_from_slice(&(!sum).to_be_bytes());
    file.write_all_at(&bytes, at).unwrap();
}

fn change_footers(path: &Path, change: impl Fn(&mut [u8])) {
    let last = std::fs::metadata(path).unwrap().len() - 512;
    let first = File::open(path).unwrap();
    let mut cookie = [0; 8];
    first.read_exact_at(&mut cookie, 0).unwrap();
    if &cookie == b"conectix" {
        change_vhd(path, 0, 512, 64, &change);
    }
    change_vhd(path, last, 512, 64, change);
}

fn vhd(dir: &TempDir, options: &str) -> PathBuf {
    let raw = content(dir, 5 << 20, &mut Random::new());
    let path = dir.path().join("image.vhd");
    run(
        "qemu-img",
        &["convert", "-O", "vpc", "-o", options, str(&raw), str(&path)],
    );
    path
}

#[test]
fn the_size_is_what_the_creator_meant() {
    let mut random = Random::new();
    for options in [
        "subformat=fixed,force_size=on",
        "subformat=dynamic,force_size=on",
    ] {
        let dir = TempDir::new().unwrap();
        let path = vhd(&dir, options);
        for creator in [
            b"qemu", b"qem2", b"vpc ", b"win ", b"d2v ", b"tap\0", b"CTXS",
        ] {
            // A geometry of less than the size.
            change_footers(&path, |footer| {
                footer[28..32].copy_from_slice(creator);
                footer[56..60].copy_from_slice(&[0, 100, 4, 17]);
            });
            compare(&path, ImageFormat::Vhd, &mut random);
        }
        // Azure and VirtualBox, which older versions of QEMU take for Virtual PC.
        for creator in [b"wa\0\0", b"vbox"] {
            change_footers(&path, |footer| footer[28..32].copy_from_slice(creator));
            assert_eq!(
                try_open(&path, Some(ImageFormat::Vhd)).unwrap().size(),
                5 << 20
            );
        }
        // The largest geometry stands for more than it can tell.
        change_footers(&path, |footer| {
            footer[28..32].copy_from_slice(b"vpc ");
            footer[56..60].copy_from_slice(&[0xff, 0xff, 16, 255]);
        });
        compare(&path, ImageFormat::Vhd, &mut random);
    }
}

fn says(path: &Path, format: ImageFormat, word: &str) {
    let told = try_open(path, Some(format)).err().unwrap().to_string();
    assert!(told.contains(word), "{told:?} does not say {word:?}");
}

#[test]
fn one_damaged_footer_of_two() {
    let dir = TempDir::new().unwrap();
    let path = vhd(&dir, "subformat=dynamic");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let last = file.metadata().unwrap().len() - 512;
    file.write_all_at(&[0xff; 100], last).unwrap();
    compare(&path, ImageFormat::Vhd, &mut Random::new());
    file.write_all_at(&[0xff], 70).unwrap();
    says(&path, ImageFormat::Vhd, "checksum");
    file.write_all_at(&[0xff], 0).unwrap();
    says(&path, ImageFormat::Vhd, "no VHD footer");
}

#[test]
fn hostile_vhd() {
    let refused = |options: &str, word: &str, change: &dyn Fn(&mut [u8])| {
        let dir = TempDir::new().unwrap();
        let path = vhd(&dir, options);
        change_footers(&path, change);
        says(&path, ImageFormat::Vhd, word);
    };
    let (fixed, dynamic) = (
        "subformat=fixed,force_size=on",
        "subformat=dynamic,force_size=on",
    );
    refused(fixed, "cut off", &|footer| {
        footer[48..56].copy_from_slice(&[0, 0, 1, 0, 0, 0, 0, 0]);
    });
    refused(fixed, "size", &|footer| footer[48..56].fill(0xff));
    refused(fixed, "size", &|footer| footer[48..56].fill(0));
    refused(fixed, "kind of disk, 9", &|footer| footer[63] = 9);
    refused(fixed, "differs from another", &|footer| footer[63] = 4);
    refused(fixed, "version", &|footer| footer[13] = 2);
    refused(dynamic, "too small", &|footer| {
        footer[48..56].copy_from_slice(&[0, 0, 1, 0, 0, 0, 0, 0]);
    });
    refused(dynamic, "cut off", &|footer| footer[16..24].fill(0x7f));
    refused(dynamic, "cut off", &|footer| footer[16..24].fill(0xff));
    refused(dynamic, "no header", &|footer| footer[23] = 1);
    let header = |word: &str, change: &dyn Fn(&mut [u8])| {
        let dir = TempDir::new().unwrap();
        let path = vhd(&dir, dynamic);
        change_vhd(&path, 512, 1024, 36, change);
        says(&path, ImageFormat::Vhd, word);
    };
    header("cut off", &|header| header[16..24].fill(0xff));
    header("cut off", &|header| header[28..32].fill(0xff));
    header("too small", &|header| header[28..32].fill(0));
    header("blocks of 0", &|header| header[32..36].fill(0));
    header("blocks of 3", &|header| {
        header[32..36].copy_from_slice(&[0, 0, 0, 3]);
    });
    header("blocks of 2147483648", &|header| {
        header[32..36].copy_from_slice(&[0x80, 0, 0, 0]);
    });
}

/// A small VHDX with `change` made at a byte of it, and the checksums of its tables put right.
fn changed_vhdx(dir: &TempDir, changes: &[(u64, &[u8])]) -> PathBuf {
    let path = dir.path().join("image.vhdx");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            "block_size=1M",
            str(&path),
            "9M",
        ],
    );
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    for (at, bytes) in changes {
        file.write_all_at(bytes, *at).unwrap();
    }
    for (at, len) in [
        (64 << 10, 4096),
        (128 << 10, 4096),
        (192 << 10, 65536),
        (256 << 10, 65536),
    ] {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes[4..8].fill(0);
        let sum = crc32c::crc32c(&bytes);
        file.write_all_at(&sum.to_le_bytes(), at + 4).unwrap();
    }
    path
}

#[test]
fn hostile_vhdx() {
    const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
    let refused = |word: &str, changes: &[(u64, &[u8])]| {
        let dir = TempDir::new().unwrap();
        says(&changed_vhdx(&dir, changes), ImageFormat::Vhdx, word);
    };
    let regions = |word: &str, at: u64, bytes: &[u8]| {
        refused(word, &REGIONS.map(|region| (region + at, bytes)));
    };
    // Where the metadata is, and an item of it.
    let dir = TempDir::new().unwrap();
    let file = File::open(changed_vhdx(&dir, &[])).unwrap();
    let mut table = [0; 200];
    let mut metadata = None;
    file.read_exact_at(&mut table, REGIONS[0]).unwrap();
    for entry in table[16..].chunks_exact(32) {
        if entry[..4] == [6, 0xa2, 0x7c, 0x8b] {
            metadata = Some(u64::from_le_bytes(entry[16..24].try_into().unwrap()));
        }
    }
    let metadata = metadata.unwrap();
    let item = |id: [u8; 4]| {
        let mut table = [0; 200];
        file.read_exact_at(&mut table, metadata + 32).unwrap();
        let entry = table
            .chunks_exact(32)
            .position(|entry| entry[..4] == id)
            .unwrap();
        let at = u32::from_le_bytes(table[entry * 32 + 16..][..4].try_into().unwrap());
        (metadata + 32 + 32 * entry as u64, metadata + u64::from(at))
    };
    let (size_entry, size) = item([0x24, 0x42, 0xa5, 0x2f]);
    let (_, block) = item([0x37, 0x67, 0xa1, 0xca]);
    let (_, sector) = item([0x1d, 0xbf, 0x41, 0x81]);

    refused(
        "headers are damaged",
        &[(64 << 10, b"no"), (128 << 10, b"no")],
    );
    refused(
        "region tables are damaged",
        &[(REGIONS[0], b"no"), (REGIONS[1], b"no")],
    );
    refused(
        "version 2",
        &[((64 << 10) + 66, &[2]), ((128 << 10) + 66, &[2])],
    );
    regions("make no sense", 8, &[0xff; 4]);
    regions("no table of blocks", 8, &[0; 4]);
    regions("out of bounds", 32, &[0xff; 8]);
    regions("out of bounds", 32, &[0, 0, 0, 0, 0, 1, 0, 0]);
    regions("out of bounds", 32, &[1]);
    regions("out of bounds", 40, &[0xff; 4]);
    let mut required = [9; 32];
    required[28] = 1;
    regions("unknown kind", 16, &required);
    refused("metadata table is damaged", &[(metadata, b"no")]);
    refused("metadata table is damaged", &[(metadata + 10, &[0xff; 2])]);
    refused("does not tell all sizes", &[(metadata + 10, &[0; 2])]);
    refused("unknown kind", &[(size_entry, &[9])]);
    refused("out of bounds", &[(size_entry + 16, &[0xff; 4])]);
    refused("wrong length", &[(size_entry + 20, &[0xff; 4])]);
    refused("too small", &[(size, &(1_u64 << 45).to_le_bytes())]);
    refused("makes no sense", &[(size, &[0xff; 8])]);
    refused("makes no sense", &[(size, &[0; 8])]);
    refused("makes no sense", &[(size, &[1])]);
    refused("blocks of", &[(block, &[0; 4])]);
    refused("blocks of", &[(block, &[0, 0, 0, 0x20])]);
    refused("differs from another", &[(block + 4, &[2])]);
    refused("sectors of", &[(sector, &[0; 4])]);
    // One sound header, and one sound region table, are enough.
    for changes in [
        [(64 << 10, b"no"), (REGIONS[0], b"no")],
        [(128 << 10, b"no"), (REGIONS[1], b"no")],
    ] {
        let dir = TempDir::new().unwrap();
        let changes = changes.map(|(at, bytes)| (at, &bytes[..]));
        let disk = try_open(&changed_vhdx(&dir, &changes), None).unwrap();
        assert!(disk.read(0, 9 << 20).unwrap() == vec![0; 9 << 20]);
    }
}

/// A VHDX of 4 KiB sectors, whose guest counts its partitions in those, and an overlay over it.
#[test]
fn large_sectors() {
    const SECTOR_SIZE_ITEM: [u8; 16] = [
        0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab,
        0x5f,
    ];
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    let raw = content(&dir, 5 << 20, &mut random);
    let path = dir.path().join("image.vhdx");
    run(
        "qemu-img",
        &["convert", "-O", "vhdx", str(&raw), str(&path)],
    );
    let mut bytes = std::fs::read(&path).unwrap();
    let find = |wanted: &[u8]| {
        bytes
            .windows(wanted.len())
            .position(|it| it == wanted)
            .unwrap()
    };
    let (region, item) = (find(b"metadata"), find(&SECTOR_SIZE_ITEM));
    let at = u32::from_le_bytes(*bytes[item + 16..].first_chunk().unwrap()) as usize;
    assert_eq!(bytes[region + at..][..4], 512_u32.to_le_bytes());
    assert_eq!(try_open(&path, None).unwrap().0.limits().logical_block, 512);
    bytes[region + at..][..4].copy_from_slice(&4096_u32.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    compare_with(&path, ImageFormat::Vhdx, &raw, &mut random);
    assert_eq!(
        try_open(&path, None).unwrap().0.limits().logical_block,
        4096
    );
    let overlay = dir.path().join("overlay");
    let new = NewFile::create(&overlay, Existing::Keep).unwrap();
    let base = DiskPaths::new(&path);
    overlay::create(new, &base, None).unwrap();
    let top = DiskPaths::new(&overlay).open(true).unwrap();
    let disk = open(overlay::over(top, base.open(false).unwrap())).unwrap();
    let limits = disk.limits();
    assert_eq!((limits.logical_block, limits.physical_block), (4096, 4096));
}
