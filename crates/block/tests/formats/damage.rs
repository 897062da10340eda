//! Damaged and hostile images: an error or some bytes, never a panic, a hang or a lot of memory.

use std::time::{Duration, Instant};

use edgevmm_block::MapKind;
use proptest::prelude::*;

use super::*;

/// A small image of each kind, with data.
const KINDS: [(ImageFormat, &str); 7] = [
    (ImageFormat::Vmdk, "subformat=monolithicSparse"),
    (ImageFormat::Vmdk, "subformat=streamOptimized"),
    (ImageFormat::Vmdk, "subformat=twoGbMaxExtentSparse"),
    (ImageFormat::Vhd, "subformat=dynamic"),
    (ImageFormat::Vhd, "subformat=fixed"),
    (ImageFormat::Vhdx, "subformat=dynamic,block_size=1M"),
    (ImageFormat::Vdi, "static=off"),
];

fn image(dir: &TempDir, format: ImageFormat, options: &str, random: &mut Random) -> PathBuf {
    let raw = content(dir, 5 << 20, random);
    let image = dir.path().join("image.vmdk");
    let qemu = format.qemu_name();
    run(
        "qemu-img",
        &["convert", "-O", qemu, "-o", options, str(&raw), str(&image)],
    );
    let extent = dir.path().join("image-s001.vmdk");
    if extent.exists() { extent } else { image }
}

/// Reads here and there, and all of it if that is little; errors are as good as bytes.
fn explore(dir: &TempDir, format: ImageFormat, random: &mut Random) -> bool {
    let started = Instant::now();
    let disk = match try_open(&dir.path().join("image.vmdk"), Some(format)) {
        Ok(disk) => disk,
        Err(err) => {
            let text = err.to_string();
            assert!(text.len() < 600 && !text.contains('\n'), "{text}");
            return false;
        }
    };
    let (mut at, size) = (0, disk.size());
    while at < size.min(4 << 20) {
        let Ok(entry) = disk.0.map(at, size - at) else {
            break;
        };
        let len = entry.len;
        assert!(len > 0 && len <= size - at);
        let _ = disk.read(at, len.min(1 << 18));
        at += len;
    }
    for _ in 0..20 {
        let at = random.below(size);
        let _ = disk.read(at, (1 + random.below(50_000)).min(size - at));
    }
    let _ = disk.read(size - 1, 1);
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "it takes too long"
    );
    true
}

#[test]
fn flipped_bytes() {
    let mut random = Random::new();
    for (format, options) in KINDS {
        let dir = TempDir::new().unwrap();
        let path = image(&dir, format, options, &mut random);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let len = file.metadata().unwrap().len();
        // Where headers, tables, descriptors and footers are.
        let places: [(u64, u64); 9] = [
            (0, 128),
            (340, 100),
            (512, 1500),
            (10_752, 600),
            (64 << 10, 80),
            (192 << 10, 100),
            (1 << 20, 3 << 20),
            (3 << 20, 64),
            (len.saturating_sub(1536), 1536),
        ];
        let mut opened = 0;
        for round in 0..150 {
            let (start, among) = places[random.below(9) as usize];
            let at = (start + random.below(among)).min(len - 4);
            let mut before = [0; 4];
            file.read_exact_at(&mut before, at).unwrap();
            let damage: &[u8] = match random.below(4) {
                0 => &[0xff; 4],
                1 => &[0; 2],
                2 => &[0xff, 0xff, 0xff, 0x7f],
                _ => &[before[0] ^ (1 << random.below(8))],
            };
            file.write_all_at(damage, at).unwrap();
            opened += u32::from(explore(&dir, format, &mut random));
            // Some damage stays, to meet with other damage.
            if round % 10 != 0 || round % 100 > 50 {
                file.write_all_at(&before, at).unwrap();
            }
        }
        println!("{format} {options}: {opened} of 150 still open");
    }
}

#[test]
fn cut_off_images() {
    let mut random = Random::new();
    for (format, options) in KINDS {
        let dir = TempDir::new().unwrap();
        let path = image(&dir, format, options, &mut random);
        let open = || try_open(&dir.path().join("image.vmdk"), Some(format));
        let disk = open().unwrap();
        let (size, used) = (disk.size(), used(&disk));
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let mut len = file.metadata().unwrap().len();
        while len > 0 {
            len -= 1 + random.below(len.min(500_000));
            file.set_len(len).unwrap();
            explore(&dir, format, &mut random);
            if let Ok(disk) = open()
                && len < used
            {
                assert_eq!(disk.size(), size);
                let read = disk.read(0, size);
                assert!(read.is_err(), "data that is gone must not read as zeroes");
            }
        }
    }
}

/// Where in its last file the data of a disk ends, as far as it can be told.
fn used(disk: &Disk) -> u64 {
    let (mut at, mut used) = (0, 0);
    while at < disk.size() {
        let entry = disk.0.map(at, disk.size() - at).unwrap();
        if entry.kind == MapKind::Data {
            used = used.max(entry.host_offset.unwrap() + entry.len);
        }
        at += entry.len;
    }
    used
}

fn rewritten(dir: &TempDir, format: ImageFormat, options: &str, changes: &[(u64, &[u8])]) {
    let path = image(dir, format, options, &mut Random::new());
    let file = OpenOptions::new().write(true).open(path).unwrap();
    for (at, bytes) in changes {
        file.write_all_at(bytes, *at).unwrap();
    }
}

#[test]
fn hostile_sizes() {
    let open = |format, options: &str, changes: &[(u64, &[u8])]| {
        let dir = TempDir::new().unwrap();
        rewritten(&dir, format, options, changes);
        try_open(&dir.path().join("image.vmdk"), Some(format))
            .map(|disk| {
                // Tables that are not there are told when they are needed.
                disk.read(disk.size() - 512, 512).unwrap_err();
            })
            .map_err(|err| err.to_string())
    };
    let vmdk =
        |changes: &[(u64, &[u8])]| open(ImageFormat::Vmdk, "subformat=monolithicSparse", changes);
    let says = |result: Result<(), String>, word: &str| {
        let told = result.unwrap_err();
        assert!(told.contains(word), "{told:?} does not say {word:?}");
    };
    let max = u64::MAX.to_le_bytes();
    // The largest disk that is taken, with a directory where there is none.
    let largest = (1_u64 << 37).to_le_bytes();
    vmdk(&[(12, &largest), (56, &(1_u64 << 53).to_le_bytes())]).unwrap();
    says(vmdk(&[(12, &max)]), "capacity");
    says(vmdk(&[(12, &(1_u64 << 38).to_le_bytes())]), "capacity");
    says(vmdk(&[(12, &[0; 8])]), "capacity");
    says(vmdk(&[(20, &max)]), "grain size");
    says(vmdk(&[(20, &(1_u64 << 55).to_le_bytes())]), "grain size");
    says(vmdk(&[(20, &[0; 8])]), "grain size");
    says(vmdk(&[(28, &max)]), "descriptor is out of bounds");
    says(vmdk(&[(36, &max)]), "descriptor is out of bounds");
    says(
        vmdk(&[(36, &[0, 0x10, 0, 0])]),
        "descriptor is out of bounds",
    );
    says(vmdk(&[(28, &(1_u64 << 50).to_le_bytes())]), "cut off");
    says(vmdk(&[(44, &[0; 4])]), "grain tables");
    says(vmdk(&[(44, &[0xff; 4])]), "grain tables");
    says(vmdk(&[(56, &[0; 8])]), "grain directory");
    says(
        vmdk(&[(56, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f])]),
        "grain directory",
    );
    says(vmdk(&[(56, &max)]), "footer");
    says(vmdk(&[(73, b"\n\n\r\n")]), "FTP");
    says(vmdk(&[(77, &[2])]), "compression");
    says(vmdk(&[(4, &[4])]), "version 4");
    says(vmdk(&[(512, &[0])]), "one of several extents");
    let vdi = |changes: &[(u64, &[u8])]| open(ImageFormat::Vdi, "static=off", changes);
    says(vdi(&[(368, &max)]), "size");
    says(vdi(&[(368, &(1_u64 << 40).to_le_bytes())]), "too small");
    says(
        vdi(&[(368, &(1_u64 << 40).to_le_bytes()), (384, &[0, 0, 0, 0x40])]),
        "cut off",
    );
    says(vdi(&[(376, &[0; 4])]), "blocks of 0");
    says(vdi(&[(376, &[0, 0, 0, 0x80])]), "blocks of 2147483648");
    says(vdi(&[(340, &[0xff; 4])]), "cut off");
    says(vdi(&[(424, &[1])]), "differs from another");
    says(vdi(&[(76, &[4])]), "differs from another");
    says(vdi(&[(68, &[0])]), "version 1.0");
    says(vdi(&[(361, &[16])]), "512");
    vdi(&[(344, &[0xff; 4])]).unwrap();
}

proptest! {
    #[test]
    fn descriptors_of_any_text(
        lines in proptest::collection::vec(
            proptest::sample::select(vec![
                "RW", "RDONLY", "NOACCESS", " ", "\t", "63", "18446744073709551615", "-1", "FLAT",
                "SPARSE", "ZERO", "\"", "\"a-flat.vmdk\"", "\n", "=", "parentCID", "ffffffff",
                "#", "\0", "é", "\r\n", "VMFS",
            ]),
            0..60,
        )
    ) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("a.vmdk");
        std::fs::write(&path, format!("# Disk DescriptorFile\n{}", lines.concat())).unwrap();
        if let Ok(disk) = try_open(&path, Some(ImageFormat::Vmdk)) {
            prop_assert!(disk.size() > 0);
            let _ = disk.read(0, disk.size().min(512));
        }
    }

    #[test]
    fn any_bytes_behind_a_magic(
        (format, at, magic) in proptest::sample::select(vec![
            (ImageFormat::Vmdk, 0, &b"KDMV"[..]),
            (ImageFormat::Vhd, 0, b"conectix"),
            (ImageFormat::Vhdx, 0, b"vhdxfile"),
            (ImageFormat::Vdi, 64, b"\x7f\x10\xda\xbe\x01\x00\x01\x00"),
            (ImageFormat::Ova, 257, b"ustar\x0000"),
        ]),
        mut bytes in proptest::collection::vec(any::<u8>(), 512..3000),
    ) {
        bytes[at..at + magic.len()].copy_from_slice(magic);
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("a.vmdk");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(disk) = try_open(&path, Some(format)) {
            let _ = disk.read(0, disk.size().min(512));
        }
    }
}
