//! Converting and comparing, against QEMU's own tools.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{
    MIB, SIZE, Source, allocated, convert, expect_same, in_dir, names, qemu_img, sample, sources,
    str, target,
};
use edgevmm_block::qcow2::{Compression, CreateOptions};
use edgevmm_block::{BlockError, DiskPaths, Existing};
use edgevmm_image::{ImageError, Job, Target, TargetFormat, compare};

fn qcow2(compress: bool, options: CreateOptions) -> TargetFormat {
    TargetFormat::Qcow2 {
        options: Box::new(options),
        compress,
    }
}

fn targets() -> Vec<(&'static str, TargetFormat)> {
    let options = CreateOptions::default;
    vec![
        ("raw", TargetFormat::Raw),
        ("qcow2", TargetFormat::qcow2()),
        ("zlib", qcow2(true, options())),
        (
            "zstd",
            qcow2(
                true,
                CreateOptions {
                    compression: Compression::Zstd,
                    ..options()
                },
            ),
        ),
        (
            "v2",
            qcow2(
                true,
                CreateOptions {
                    version: 2,
                    ..options()
                },
            ),
        ),
        (
            "c512",
            qcow2(
                false,
                CreateOptions {
                    cluster_size: 512,
                    refcount_bits: 1,
                    ..options()
                },
            ),
        ),
        (
            "c2m",
            qcow2(
                true,
                CreateOptions {
                    cluster_size: 2 * MIB,
                    refcount_bits: 64,
                    ..options()
                },
            ),
        ),
        (
            "extl2",
            qcow2(
                false,
                CreateOptions {
                    cluster_size: 128 << 10,
                    extended_l2: true,
                    lazy_refcounts: true,
                    ..options()
                },
            ),
        ),
    ]
}

/// Converts `source` and has QEMU look at what comes out.
fn expect_converted(dir: &Path, raw: &Path, source: &Source, name: &str, format: TargetFormat) {
    let what = format!("{} to {name}", source.name);
    let path = dir.join(&what);
    let is_raw = matches!(format, TargetFormat::Raw);
    convert(&source.paths, &target(&path, format)).expect(&what);
    expect_same(raw, &path, if is_raw { "raw" } else { "qcow2" });
    if is_raw {
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE, "{what}");
    }
    assert!(allocated(&path) < 5 * MIB, "{what}: {}", allocated(&path));
    fs::remove_file(path).unwrap();
}

/// Every format that is read, into a raw image and the usual qcow2.
#[test]
fn every_format_is_read() {
    in_dir(|dir| {
        let raw = dir.join("sample.raw");
        sample(&raw);
        for source in sources(&dir, &raw) {
            for (name, format) in targets().into_iter().take(2) {
                expect_converted(&dir, &raw, &source, name, format);
            }
            let same = compare(&source.paths, &DiskPaths::new(&raw), &Job::unattended());
            assert!(same.unwrap().is_same(), "{}", source.name);
        }
    });
}

/// Every kind of image that is written, from some of very different structure.
#[test]
fn every_format_is_written() {
    in_dir(|dir| {
        let raw = dir.join("sample.raw");
        sample(&raw);
        let mut sources = sources(&dir, &raw);
        sources.retain(|it| ["raw", "c512", "zlib", "stream", "chain"].contains(&it.name));
        for source in sources {
            for (name, format) in targets() {
                expect_converted(&dir, &raw, &source, name, format);
            }
        }
    });
}

/// What is made has the options that were asked for, as QEMU sees it.
#[test]
fn options_are_kept() {
    in_dir(|dir| {
        let (raw, path) = (dir.join("raw"), dir.join("image"));
        sample(&raw);
        let options = CreateOptions {
            cluster_size: 32 << 10,
            extended_l2: true,
            lazy_refcounts: true,
            refcount_bits: 32,
            compression: Compression::Zstd,
            ..CreateOptions::default()
        };
        convert(&DiskPaths::new(&raw), &target(&path, qcow2(true, options))).unwrap();
        let info = qemu_img(&["info", "--output=json", str(&path)]);
        for part in [
            r#""cluster-size": 32768"#,
            r#""extended-l2": true"#,
            r#""lazy-refcounts": true"#,
            r#""refcount-bits": 32"#,
            r#""compression-type": "zstd""#,
        ] {
            assert!(info.contains(part), "{part}: {info}");
        }
        let map = qemu_img(&["map", "--output=json", str(&path)]);
        assert!(map.contains(r#""compressed": true"#), "{map}");
    });
}

#[test]
fn a_large_empty_disk_takes_no_time_and_no_space() {
    in_dir(|dir| {
        let (raw, path) = (dir.join("raw"), dir.join("image"));
        let file = fs::File::create(&raw).unwrap();
        file.set_len(4 << 40).unwrap();
        file.write_all_at(b"end", (4 << 40) - 3).unwrap();
        let start = std::time::Instant::now();
        convert(&DiskPaths::new(&raw), &target(&path, TargetFormat::qcow2())).unwrap();
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
        assert!(allocated(&path) < 8 * MIB);
        let back = dir.join("back");
        convert(&DiskPaths::new(&path), &target(&back, TargetFormat::Raw)).unwrap();
        assert!(allocated(&back) <= 8 << 10);
        expect_same(&raw, &back, "raw");
    });
}

#[test]
fn a_cancelled_job_leaves_nothing() {
    in_dir(|dir| {
        let (raw, path) = (dir.join("raw"), dir.join("image"));
        sample(&raw);
        for format in [TargetFormat::Raw, TargetFormat::qcow2()] {
            let cancelled = AtomicBool::new(false);
            let progress = |done: u64, _: u64| cancelled.store(done > 2 * MIB, Ordering::Relaxed);
            let job = Job::new(&progress, &cancelled);
            let source = DiskPaths::new(&raw);
            let ended = edgevmm_image::convert(&source, &target(&path, format), &job);
            assert!(matches!(ended, Err(ImageError::Cancelled { .. })));
            assert_eq!(names(&dir), ["raw"]);
        }
    });
}

#[test]
fn what_is_there_stays_until_the_new_image_is_complete() {
    in_dir(|dir| {
        let (raw, path) = (dir.join("raw"), dir.join("image"));
        sample(&raw);
        fs::write(&path, "something else").unwrap();
        let source = DiskPaths::new(&raw);
        let refused = convert(&source, &target(&path, TargetFormat::Raw)).unwrap_err();
        let exists = matches!(refused, ImageError::Block(BlockError::Exists { .. }));
        assert!(exists, "{refused}");

        let force = Target {
            existing: Existing::Replace,
            ..target(&path, TargetFormat::Raw)
        };
        let progress = |done: u64, total: u64| {
            if done < total {
                assert_eq!(fs::read(&path).unwrap(), b"something else");
            }
        };
        let never = AtomicBool::new(false);
        edgevmm_image::convert(&source, &force, &Job::new(&progress, &never)).unwrap();
        expect_same(&raw, &path, "raw");
        assert_eq!(names(&dir), ["image", "raw"]);

        let itself = Target {
            path: raw.clone(),
            ..force
        };
        let refused = convert(&source, &itself).unwrap_err();
        assert!(
            refused.to_string().contains("would be made of"),
            "{refused}"
        );
        assert_eq!(fs::metadata(&raw).unwrap().len(), SIZE);
    });
}

#[test]
fn a_difference_is_found_where_it_begins() {
    in_dir(|dir| {
        let (raw, other) = (dir.join("raw"), dir.join("other"));
        sample(&raw);
        let [one, two] = [&raw, &other].map(DiskPaths::new);
        for at in [0, 700, MIB - 1, 4 * MIB, 5 * MIB + 513, SIZE - 1] {
            fs::copy(&raw, &other).unwrap();
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&other)
                .unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x80], at).unwrap();
            // Another one further on must not be taken for the first.
            file.write_all_at(&[0x99], SIZE - 1).unwrap();
            let found = compare(&one, &two, &Job::unattended()).unwrap();
            assert_eq!(found.first_difference, Some(at));
            assert!(!found.is_same());
        }
        fs::copy(&raw, &other).unwrap();
        let file = OpenOptions::new().write(true).open(&other).unwrap();
        file.set_len(SIZE + 512).unwrap();
        let found = compare(&one, &two, &Job::unattended()).unwrap();
        assert_eq!((found.first_difference, found.is_same()), (None, false));
    });
}
