//! Throw-away overlays.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::Path;

use common::{Random, as_qemu_reads, create, exercise, open_disk, open_free, options, run, str};
use edgevmm_block::{BlockError, DiskOptions, open};
use tempfile::TempDir;

const SIZE: u64 = 9 << 20;

fn snapshot(image: &Path, backing: &[&Path]) -> DiskOptions {
    DiskOptions {
        snapshot: true,
        ..options(image, backing)
    }
}

#[test]
fn leaves_the_image_as_it_was() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    let below = create(&dir, "below", &["-f", "raw"], SIZE);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 7 3m 1m", str(&below)],
    );
    let args = ["-f", "qcow2", "-F", "raw", "-b", str(&below)];
    let over = create(&dir, "over", &args, SIZE);
    let plain = create(&dir, "plain", &["-f", "qcow2", "-o", "compat=0.10"], SIZE);
    for (image, format, backing) in [
        (&below, "raw", &[][..]),
        (&over, "qcow2", &[below.as_path()]),
        (&plain, "qcow2", &[]),
    ] {
        let before = std::fs::read(image).unwrap();
        let mut model = as_qemu_reads(image, format);
        let disk = open_free(|| snapshot(image, backing)).unwrap();
        assert!(!disk.read_only());
        exercise(&*disk, &mut model, 150, &mut random);
        drop(disk);
        assert!(
            std::fs::read(image).unwrap() == before,
            "{format} image has changed"
        );
    }
}

#[test]
fn several_share_an_image_with_readers_only() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "image", &["-f", "qcow2"], SIZE);
    let first = open(snapshot(&image, &[])).unwrap();
    let second = open(snapshot(&image, &[])).unwrap();
    common::write(&*first, 0, &[1; 512]).unwrap();
    assert_eq!(common::read(&*second, 0, 512), [0; 512]);
    assert!(matches!(
        open_disk(&image, &[]),
        Err(BlockError::Locked { .. })
    ));
}

#[test]
fn needs_no_permission_to_write() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "image", &["-f", "raw"], SIZE);
    let mut options = snapshot(&image, &[]);
    options.file = std::fs::File::open(&image).unwrap();
    let disk = open(options).unwrap();
    common::write(&*disk, 512, &[9; 1024]).unwrap();
    assert_eq!(common::read(&*disk, 512, 1024), [9; 1024]);
}
