//! Images written by this crate, read and checked by QEMU's tools.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::{Path, PathBuf};

use common::{
    Random, as_qemu_reads, assert_clean, create, exercise, open_disk, open_free, open_raw, options,
    read, run, str, write,
};
use edgevmm_block::{DiskOptions, VolatileSlice};
use tempfile::TempDir;

const SIZE: u64 = 9 << 20;

/// Exercises an image in two sessions and compares it with QEMU's view after each.
fn compare(image: &Path, format: &str, backing: &[&Path], random: &mut Random) {
    let mut model = as_qemu_reads(image, format);
    for _ in 0..2 {
        let disk = match format {
            "raw" => open_raw(image).unwrap(),
            _ => open_disk(image, backing).unwrap(),
        };
        exercise(&*disk, &mut model, 120, random);
        drop(disk);
        assert!(
            as_qemu_reads(image, format) == model,
            "QEMU reads something else"
        );
        if format == "qcow2" {
            assert_clean(image);
        }
    }
}

/// A base image with some data and some holes.
fn base(dir: &TempDir, name: &str, args: &[&str]) -> PathBuf {
    let image = create(dir, name, args, SIZE - (1 << 20));
    run(
        "qemu-io",
        &[
            "-c",
            "write -P 0x11 0 300k",
            "-c",
            "write -P 0x22 1m 2m",
            "-c",
            "write -z 1200k 64k",
            str(&image),
        ],
    );
    image
}

#[test]
fn raw() {
    let dir = TempDir::new().unwrap();
    compare(
        &create(&dir, "a", &["-f", "raw"], SIZE),
        "raw",
        &[],
        &mut Random::new(),
    );
}

#[test]
fn qcow2_of_every_shape() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    for (index, shape) in [
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=2M",
        "refcount_bits=64",
        "preallocation=metadata",
        "compat=0.10,cluster_size=512",
    ]
    .iter()
    .enumerate()
    {
        println!("{shape}");
        let name = format!("image{index}");
        let image = create(&dir, &name, &["-f", "qcow2", "-o", shape], SIZE);
        compare(&image, "qcow2", &[], &mut random);
    }
}

#[test]
fn qcow2_with_a_partial_last_cluster() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "a", &["-f", "qcow2"], SIZE + 512 * 3);
    compare(&image, "qcow2", &[], &mut Random::new());
}

#[test]
fn overlays() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    let raw = base(&dir, "raw", &["-f", "raw"]);
    let plain = base(&dir, "plain", &["-f", "qcow2"]);
    let packed = dir.path().join("packed");
    run(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", str(&plain), str(&packed)],
    );
    for (index, (below, format, shape)) in [
        (&raw, "raw", "compat=1.1"),
        (&raw, "raw", "compat=0.10"),
        (&plain, "qcow2", "cluster_size=4096"),
        (&packed, "qcow2", "compat=1.1"),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{format} below {shape}");
        let before = std::fs::read(below).unwrap();
        let name = format!("overlay{index}");
        let args = ["-f", "qcow2", "-o", shape, "-F", format, "-b", str(below)];
        let image = create(&dir, &name, &args, SIZE);
        compare(&image, "qcow2", &[below], &mut random);
        assert!(
            std::fs::read(below).unwrap() == before,
            "the backing file has changed"
        );
    }
}

#[test]
fn a_chain_of_three() {
    let dir = TempDir::new().unwrap();
    let bottom = base(&dir, "bottom", &["-f", "raw"]);
    let middle = base(
        &dir,
        "middle",
        &["-f", "qcow2", "-F", "raw", "-b", str(&bottom)],
    );
    let top = create(
        &dir,
        "top",
        &["-f", "qcow2", "-F", "qcow2", "-b", str(&middle)],
        SIZE,
    );
    compare(&top, "qcow2", &[&middle, &bottom], &mut Random::new());
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    let dir = TempDir::new().unwrap();
    let plain = base(&dir, "plain", &["-f", "qcow2"]);
    let packed = dir.path().join("packed");
    run(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", str(&plain), str(&packed)],
    );
    compare(&packed, "qcow2", &[], &mut Random::new());
}

#[test]
fn internal_snapshots_keep_their_data() {
    let dir = TempDir::new().unwrap();
    let image = base(&dir, "image", &["-f", "qcow2"]);
    let kept = as_qemu_reads(&image, "qcow2");
    run("qemu-img", &["snapshot", "-c", "kept", str(&image)]);
    compare(&image, "qcow2", &[], &mut Random::new());
    run("qemu-img", &["snapshot", "-a", "kept", str(&image)]);
    assert!(
        as_qemu_reads(&image, "qcow2") == kept,
        "the snapshot has changed"
    );
    assert_clean(&image);
}

#[test]
fn images_marked_dirty_can_be_read() {
    let dir = TempDir::new().unwrap();
    let image = base(&dir, "image", &["-f", "qcow2", "-o", "lazy_refcounts=on"]);
    let model = as_qemu_reads(&image, "qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[79] |= 3;
    std::fs::write(&image, &bytes).unwrap();

    let disk = open_free(|| DiskOptions {
        read_only: true,
        ..options(&image, &[])
    })
    .unwrap();
    assert!(read(&*disk, 0, disk.size()) == model);
    assert!(
        std::fs::read(&image).unwrap() == bytes,
        "reading has changed the image"
    );
}

#[test]
fn several_threads_at_once() {
    const THREADS: u64 = 4;
    const STRIPE: u64 = 3 * 512;
    let dir = TempDir::new().unwrap();
    let below = base(&dir, "below", &["-f", "raw"]);
    let args = [
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        "-F",
        "raw",
        "-b",
        str(&below),
    ];
    let image = create(&dir, "image", &args, SIZE);
    let seed = Random::new().below(1 << 40);
    let disk = open_disk(&image, &[&below]).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = &*disk;
            scope.spawn(move || {
                let fill = [thread as u8 + 1; STRIPE as usize];
                // Stripes of different threads share clusters; each is written, some zeroed.
                for stripe in (thread..SIZE / STRIPE).step_by(THREADS as usize) {
                    write(disk, stripe * STRIPE, &fill).unwrap();
                    if (stripe ^ seed).is_multiple_of(5) {
                        disk.write_zeroes(stripe * STRIPE, STRIPE, stripe % 2 == 0)
                            .unwrap();
                    }
                    if (stripe ^ seed).is_multiple_of(97) {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    drop(disk);
    assert_clean(&image);
    let bytes = as_qemu_reads(&image, "qcow2");
    for stripe in 0..SIZE / STRIPE {
        let zeroed = (stripe ^ seed).is_multiple_of(5);
        let expected = if zeroed {
            0
        } else {
            (stripe % THREADS) as u8 + 1
        };
        let at = (stripe * STRIPE) as usize;
        assert!(
            bytes[at..at + STRIPE as usize]
                .iter()
                .all(|&byte| byte == expected)
        );
    }
}

#[test]
fn direct_io_realigns_what_the_host_would_refuse() {
    // The temporary directory may be a tmpfs, which has no direct I/O before Linux 6.6.
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut random = Random::new();
    for format in ["raw", "qcow2"] {
        let image = create(&dir, format, &["-f", format], SIZE);
        let disk = open_free(|| DiskOptions {
            direct: true,
            ..options(&image, &[])
        })
        .unwrap();
        let mut model = vec![0; SIZE as usize];
        exercise(&*disk, &mut model, 60, &mut random);
        drop(disk);
        assert!(as_qemu_reads(&image, format) == model);
    }
}

#[test]
fn odd_lengths() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("odd");
    std::fs::write(&image, [0x55; 1000]).unwrap();
    let disk = open_raw(&image).unwrap();
    assert_eq!(disk.size(), 1024);
    let mut expected = vec![0x55; 1000];
    expected.resize(1024, 0);
    assert_eq!(read(&*disk, 0, 1024), expected);
    write(&*disk, 512, &[0x66; 512]).unwrap();
    drop(disk);
    expected[512..].fill(0x66);
    assert_eq!(std::fs::read(&image).unwrap(), expected);
}

#[test]
fn more_buffers_than_the_kernel_takes_at_once() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "a", &["-f", "raw"], SIZE);
    let disk = open_raw(&image).unwrap();
    let mut data: Vec<u8> = (0..3000u32 * 512).map(|at| (at % 251) as u8).collect();
    let expected = data.clone();
    let bufs: Vec<_> = data.chunks_mut(512).map(VolatileSlice::from).collect();
    disk.write_vectored(&bufs, 512).unwrap();
    let mut back = vec![0; expected.len()];
    let bufs: Vec<_> = back.chunks_mut(512).map(VolatileSlice::from).collect();
    disk.read_vectored(&bufs, 512).unwrap();
    assert!(back == expected);
}
