//! Making images, telling what they are, and changing their headers, compared with QEMU's tools.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::File;
use std::path::Path;

use common::{as_qemu_reads, assert_clean, create, open_disk, read, run, str, write};
use edgevmm_block::BlockError;
use edgevmm_block::qcow2::{
    self, Backing, Compression, CreateOptions, DataFileName, Extension, HeaderParts,
};
use tempfile::TempDir;

const SIZE: u64 = 5 << 20;

fn new_file(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path).unwrap()
}

fn describe(path: &Path) -> qcow2::Description {
    qcow2::describe(File::open(path).unwrap(), str(path)).unwrap()
}

fn edit(path: &Path, change: impl FnOnce(&mut HeaderParts)) -> Result<(), BlockError> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    qcow2::edit_header(file, str(path), change)
}

#[test]
fn images_of_all_options_are_what_qemu_makes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    let plain = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    for options in [
        plain.clone(),
        CreateOptions {
            version: 2,
            ..plain.clone()
        },
        CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..plain.clone()
        },
        CreateOptions {
            cluster_size: 2 << 20,
            refcount_bits: 1,
            ..plain.clone()
        },
        CreateOptions {
            extended_l2: true,
            lazy_refcounts: true,
            compression: Compression::Zstd,
            ..plain.clone()
        },
        CreateOptions {
            size: 70 << 40,
            ..plain.clone()
        },
        CreateOptions {
            size: 0,
            ..plain.clone()
        },
        CreateOptions {
            size: 128 << 30,
            cluster_size: 512,
            ..plain.clone()
        },
    ] {
        qcow2::create(new_file(&path), str(&path), None, &options).unwrap();
        assert_clean(&path);
        let told = describe(&path);
        assert_eq!(told.version, options.version);
        assert_eq!(told.size, options.size);
        assert_eq!(told.cluster_size, options.cluster_size);
        assert_eq!(told.refcount_bits, options.refcount_bits);
        assert_eq!(told.extended_l2, options.extended_l2);
        assert_eq!(told.lazy_refcounts, options.lazy_refcounts);
        assert_eq!(told.compression, options.compression);
        assert!(told.backing.is_none() && told.data_file.is_none() && !told.dirty);
        let info = run("qemu-img", &["info", "--output=json", str(&path)]);
        for (key, value) in [
            ("virtual-size", options.size),
            ("cluster-size", options.cluster_size),
            ("refcount-bits", options.refcount_bits.into()),
        ] {
            let wanted = format!("\"{key}\": {value}");
            let same = |line: &str| line.trim().trim_end_matches(',') == wanted;
            assert!(info.lines().any(same), "{wanted} in {info}");
        }
        if options.size > SIZE {
            let disk = open_disk(&path, &[]).unwrap();
            write(&*disk, options.size - 512, &[7; 512]).unwrap();
            assert_eq!(read(&*disk, options.size - 512, 512), [7; 512]);
            assert_eq!(read(&*disk, options.size / 2, 512), [0; 512]);
            drop(disk);
            assert_clean(&path);
        }
    }
}

#[test]
fn options_that_the_format_does_not_allow() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image");
    let plain = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    let backing = |name: &str| {
        Some(Backing {
            name: name.into(),
            format: None,
        })
    };
    for (options, says) in [
        (
            CreateOptions {
                cluster_size: 256,
                ..plain.clone()
            },
            "clusters of 256",
        ),
        (
            CreateOptions {
                cluster_size: 5000,
                ..plain.clone()
            },
            "clusters of 5000",
        ),
        (
            CreateOptions {
                cluster_size: 4 << 20,
                ..plain.clone()
            },
            "clusters of",
        ),
        (
            CreateOptions {
                refcount_bits: 3,
                ..plain.clone()
            },
            "refcounts of 3",
        ),
        (
            CreateOptions {
                refcount_bits: 128,
                ..plain.clone()
            },
            "refcounts of 128",
        ),
        (
            CreateOptions {
                size: 1000,
                ..plain.clone()
            },
            "multiple of 512",
        ),
        (
            CreateOptions {
                size: 1 << 62,
                ..plain.clone()
            },
            "larger than qcow2 allows",
        ),
        (
            CreateOptions {
                version: 4,
                ..plain.clone()
            },
            "version 4",
        ),
        (
            CreateOptions {
                version: 2,
                extended_l2: true,
                ..plain.clone()
            },
            "version 2",
        ),
        (
            CreateOptions {
                version: 2,
                refcount_bits: 8,
                ..plain.clone()
            },
            "version 2",
        ),
        (
            CreateOptions {
                extended_l2: true,
                cluster_size: 8192,
                ..plain.clone()
            },
            "too small",
        ),
        (
            CreateOptions {
                backing: backing(&"x".repeat(1024)),
                ..plain.clone()
            },
            "1023",
        ),
        (
            CreateOptions {
                backing: backing(&"x".repeat(600)),
                cluster_size: 512,
                ..plain.clone()
            },
            "fit into a cluster",
        ),
        (
            CreateOptions {
                data_file: Some(DataFileName {
                    name: "d".into(),
                    raw: false,
                }),
                ..plain.clone()
            },
            "data file",
        ),
    ] {
        let error = qcow2::create(new_file(&path), "image", None, &options).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(says), "{text} does not say {says}");
    }
}

#[test]
fn external_data() {
    let dir = TempDir::new().unwrap();
    let (path, data) = (dir.path().join("image"), dir.path().join("data"));
    for raw in [false, true] {
        std::fs::write(&data, [9; 70000]).unwrap();
        let options = CreateOptions {
            size: SIZE,
            data_file: Some(DataFileName {
                name: str(&data).into(),
                raw,
            }),
            ..CreateOptions::default()
        };
        let file = File::options().read(true).write(true).open(&data).unwrap();
        qcow2::create(new_file(&path), str(&path), Some(file), &options).unwrap();
        assert_eq!(std::fs::metadata(&data).unwrap().len(), SIZE);
        let told = describe(&path).data_file.unwrap();
        assert_eq!((told.name.as_deref(), told.raw), (Some(str(&data)), raw));
        assert_clean(&path);
        assert!(as_qemu_reads(&path, "qcow2") == vec![0; SIZE as usize]);
        // Whatever is put there is what the disk is, if it is raw.
        let mut bytes = vec![0; SIZE as usize];
        if raw {
            bytes[300_000..400_000].fill(5);
            std::fs::write(&data, &bytes).unwrap();
        }
        assert!(as_qemu_reads(&path, "qcow2") == bytes);
    }
}

#[test]
fn snapshots_are_told_of() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "image", &["-f", "qcow2"], SIZE);
    run("qemu-img", &["snapshot", "-c", "before", str(&image)]);
    run("qemu-img", &["resize", "-q", str(&image), "8M"]);
    run("qemu-img", &["snapshot", "-c", "an other", str(&image)]);
    let told = describe(&image);
    let seen: Vec<_> = told
        .snapshots
        .iter()
        .map(|it| (it.id.as_str(), it.name.as_str(), it.size, it.vm_state))
        .collect();
    assert_eq!(
        seen,
        [("1", "before", SIZE, 0), ("2", "an other", 8 << 20, 0)]
    );
    let age = std::time::UNIX_EPOCH.elapsed().unwrap() - told.snapshots[0].taken;
    assert!(age.as_secs() < 600);
    assert_eq!(told.size, 8 << 20);
}

#[test]
fn headers_are_changed_and_the_rest_is_kept() {
    let dir = TempDir::new().unwrap();
    let below = create(&dir, "below", &["-f", "raw"], SIZE);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 3 0 1m", str(&below)],
    );
    let other = create(&dir, "other", &["-f", "qcow2"], SIZE);
    for shape in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "extended_l2=on",
    ] {
        let args = ["-f", "qcow2", "-o", shape, "-F", "raw", "-b", str(&below)];
        let image = create(&dir, "image", &args, SIZE);
        run("qemu-io", &["-c", "write -P 4 1m 1m", str(&image)]);
        let before = as_qemu_reads(&image, "qcow2");
        let extension = Extension {
            magic: 0x1234_5678,
            data: b"thirteen byte".to_vec(),
        };
        edit(&image, |parts| {
            assert_eq!(parts.backing.as_ref().unwrap().name, str(&below));
            assert!(parts.extensions.is_empty());
            parts.extensions.push(extension.clone());
        })
        .unwrap();
        let told = describe(&image);
        assert_eq!(told.extensions, std::slice::from_ref(&extension));
        assert_eq!(told.backing.unwrap().format.as_deref(), Some("raw"));
        assert_clean(&image);
        assert!(as_qemu_reads(&image, "qcow2") == before);
        edit(&image, |parts| {
            parts.backing = Some(Backing {
                name: str(&other).into(),
                format: Some("qcow2".into()),
            });
        })
        .unwrap();
        assert_clean(&image);
        let mut expected = before.clone();
        expected[..1 << 20].fill(0);
        assert!(as_qemu_reads(&image, "qcow2") == expected);
        assert_eq!(describe(&image).extensions, [extension]);
        edit(&image, |parts| *parts = HeaderParts::default()).unwrap();
        let told = describe(&image);
        assert!(told.backing.is_none() && told.extensions.is_empty());
        assert!(as_qemu_reads(&image, "qcow2") == expected);
        let too_long = edit(&image, |parts| {
            parts.backing = Some(Backing {
                name: "x".repeat(1024),
                format: None,
            });
        });
        assert!(too_long.unwrap_err().to_string().contains("1023"));
        assert!(as_qemu_reads(&image, "qcow2") == expected);
        // QEMU changes it as well as we do.
        run(
            "qemu-img",
            &["rebase", "-u", "-F", "raw", "-b", str(&below), str(&image)],
        );
        assert!(as_qemu_reads(&image, "qcow2") == before);
    }
}

#[test]
fn tables_that_all_fit_in_memory_are_left_to_flushes() {
    const MIB: u64 = 1 << 20;
    let dir = TempDir::new().unwrap();
    let path = create(&dir, "image", &["-f", "qcow2"], 1024 * MIB);
    let l1 = || {
        let bytes = std::fs::read(&path).unwrap();
        let at = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
        bytes[at..at + 16].to_vec()
    };
    let disk = open_disk(&path, &[]).unwrap();
    for at in (0..1024 * MIB).step_by(4 << 20) {
        write(&*disk, at, &[7; 512]).unwrap();
    }
    assert_eq!(l1(), [0; 16], "the image refers to none of it yet");
    disk.flush().unwrap();
    assert_ne!(l1(), [0; 16]);
    drop(disk);
    assert_clean(&path);
}
