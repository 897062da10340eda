//! What is refused, and in which words.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::error::Error;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use common::{check_file, create, open_disk, open_free, open_raw, options, read, run, str, write};
use edgevmm_block::qcow2::Repair;
use edgevmm_block::{
    BlockError, DiskOptions, DiskPaths, Existing, ImageFormat, NewFile, info, open, open_path,
    overlay, probe,
};
use tempfile::TempDir;

const SIZE: u64 = 9 << 20;

/// The error of opening `path`, with its causes, as a program prints it.
fn refusal(path: &Path, backing: &[&Path]) -> String {
    let err = open_disk(path, backing).expect_err("the image must be refused");
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text = format!("{text}: {err}");
        cause = err.source();
    }
    text
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert!(!text.contains('\n'), "{text:?} is more than one line");
}

fn filled(dir: &TempDir, name: &str, args: &[&str]) -> std::path::PathBuf {
    let image = create(dir, name, args, SIZE);
    run("qemu-io", &["-c", "write -P 0x11 0 9m", str(&image)]);
    image
}

#[test]
fn paths_that_are_no_disks() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let says = |path: &Path, writable, words: &[&str]| {
        assert_says(&open_path(path, writable).unwrap_err().to_string(), words);
    };
    says(&path("none"), false, &["none", "does not exist"]);
    says(dir.path(), false, &["is a directory"]);
    says(dir.path(), true, &["is a directory"]);
    says(Path::new("/dev/null"), false, &["is a character device"]);
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    says(&path("socket"), false, &["is a socket"]);
    run("mkfifo", &[str(&path("pipe"))]);
    says(&path("pipe"), false, &["is a pipe"]);
    File::create(path("empty")).unwrap();
    says(&path("empty"), false, &["is empty"]);
}

#[test]
fn denied_permission() {
    let dir = TempDir::new().unwrap();
    let image = create(&dir, "a", &["-f", "raw"], SIZE);
    std::fs::set_permissions(&image, Permissions::from_mode(0o0)).unwrap();
    // Root may open anything; then there is nothing to refuse.
    match open_path(&image, true) {
        Err(err) => assert_says(&err.to_string(), &["No permission to read and write"]),
        Ok(_) => assert!(nix::unistd::Uid::effective().is_root()),
    }
}

#[test]
fn formats_that_are_not_supported() {
    let dir = TempDir::new().unwrap();
    for (format, args, name) in [
        ("qed", &[][..], "QED"),
        ("qcow", &[], "qcow version 1"),
        (
            "luks",
            &[
                "--object",
                "secret,id=s,data=x",
                "-o",
                "key-secret=s,iter-time=10",
            ],
            "LUKS",
        ),
    ] {
        let mut all = vec!["-f", format];
        all.extend(args);
        let image = create(&dir, format, &all, SIZE);
        assert_says(
            &refusal(&image, &[]),
            &[name, "not supported yet", "qemu-img convert"],
        );
        // The user may insist.
        open_raw(&image).unwrap();
    }
    let packed = dir.path().join("packed");
    std::fs::write(&packed, b"\x1f\x8b\x08\0some data").unwrap();
    assert_says(&refusal(&packed, &[]), &["compressed with gzip", "unpack"]);
}

#[test]
fn probing_goes_by_content() {
    let dir = TempDir::new().unwrap();
    let qcow2 = create(&dir, "disk.raw", &["-f", "qcow2"], SIZE);
    let raw = create(&dir, "disk.qcow2", &["-f", "raw"], SIZE);
    assert_eq!(
        probe(&File::open(qcow2).unwrap()).unwrap(),
        ImageFormat::Qcow2
    );
    assert_eq!(probe(&File::open(raw).unwrap()).unwrap(), ImageFormat::Raw);
}

#[test]
fn features_that_are_not_supported() {
    let dir = TempDir::new().unwrap();
    let secret = ["--object", "secret,id=s,data=x", "-o"];
    let how = "encrypt.format=luks,encrypt.key-secret=s";
    let image = create(
        &dir,
        "luks",
        &["-f", "qcow2", secret[0], secret[1], secret[2], how],
        SIZE,
    );
    let says = ["encrypted (LUKS)", "not supported", "qemu-img convert"];
    assert_says(&refusal(&image, &[]), &says);

    let image = create(&dir, "image", &["-f", "qcow2"], SIZE);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[2], 35).unwrap();
    assert_says(&refusal(&image, &[]), &says);
    file.write_all_at(&[1], 35).unwrap();
    assert_says(&refusal(&image, &[]), &["encrypted (AES)"]);
    file.write_all_at(&[0], 35).unwrap();
    // Bits that nobody has given a meaning yet, and one whose name the image tells.
    file.write_all_at(&[0x80], 72).unwrap();
    assert_says(&refusal(&image, &[]), &["unknown incompatible features"]);
    let head = [0x68, 3, 0xf8, 0x57, 0, 0, 0, 48, 0, 63];
    let mut name = [&head[..], b"time travel"].concat();
    name.resize(64, 0);
    file.write_all_at(&name, 112).unwrap();
    assert_says(&refusal(&image, &[]), &["\"time travel\""]);
}

#[test]
fn a_data_file_is_never_opened() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    let option = format!("data_file={}", str(&data));
    let image = create(&dir, "image", &["-f", "qcow2", "-o", &option], SIZE);
    assert_says(
        &refusal(&image, &[]),
        &[str(&data), "data_file=PATH", "never opened"],
    );
}

#[test]
fn a_backing_file_is_never_opened_unasked() {
    let dir = TempDir::new().unwrap();
    let below = create(&dir, "below", &["-f", "raw"], SIZE);
    let image = create(
        &dir,
        "image",
        &["-f", "qcow2", "-F", "raw", "-b", str(&below)],
        SIZE,
    );
    assert_says(
        &refusal(&image, &[]),
        &[str(&below), "backing=PATH", "never opened"],
    );
    // Not even as a snapshot, or below another image.
    let top = create(
        &dir,
        "top",
        &["-f", "qcow2", "-F", "qcow2", "-b", str(&image)],
        SIZE,
    );
    assert_says(
        &refusal(&top, &[&image]),
        &[str(&image), str(&below), "backing=PATH"],
    );
    let mut snapshot = options(&image, &[]);
    snapshot.snapshot = true;
    assert!(matches!(
        open(snapshot),
        Err(BlockError::BackingNotGiven { .. })
    ));
    let told = info(File::open(&image).unwrap(), "image").unwrap();
    assert_eq!((told.format, told.size), (ImageFormat::Qcow2, SIZE));
    assert_eq!(told.backing.as_deref(), Some(str(&below)));
    assert_eq!(told.backing_format.as_deref(), Some("raw"));
}

#[test]
fn a_backing_file_that_does_not_fit() {
    let dir = TempDir::new().unwrap();
    let raw = create(&dir, "raw", &["-f", "raw"], SIZE);
    let qcow2 = create(&dir, "qcow2", &["-f", "qcow2"], SIZE);
    assert_says(
        &refusal(&qcow2, &[&raw]),
        &["has no backing file", str(&raw)],
    );

    let over_qcow2 = create(
        &dir,
        "a",
        &["-f", "qcow2", "-F", "qcow2", "-b", str(&qcow2)],
        SIZE,
    );
    assert_says(
        &refusal(&over_qcow2, &[&raw]),
        &["is raw", "the image above it", "qcow2"],
    );

    // The guest of the raw disk has made it look like qcow2: it stays raw.
    let over_raw = create(
        &dir,
        "b",
        &["-f", "qcow2", "-F", "raw", "-b", str(&raw)],
        SIZE,
    );
    std::fs::copy(&qcow2, &raw).unwrap();
    let disk = open_disk(&over_raw, &[&raw]).unwrap();
    assert_eq!(&read(&*disk, 0, 512)[..4], b"QFI\xfb");
    drop(disk);

    let mut as_qcow2 = options(&over_raw, &[&raw]);
    as_qcow2.backing[0].format = Some(ImageFormat::Qcow2);
    assert!(matches!(
        open(as_qcow2),
        Err(BlockError::BackingFormat { .. })
    ));
}

#[test]
fn truncated_images() {
    let dir = TempDir::new().unwrap();
    let image = filled(&dir, "image", &["-f", "qcow2"]);
    let len = std::fs::metadata(&image).unwrap().len();
    drop(open_disk(&image, &[]).unwrap());
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    // The end of a cluster need not be there.
    file.set_len(len - 5000).unwrap();
    let disk = open_disk(&image, &[]).unwrap();
    write(&*disk, 0, &[0x11; 512]).unwrap();
    drop(disk);
    // If more is missing, what is left is for reading.
    file.set_len(len - (2 << 20)).unwrap();
    let says = [
        "truncated",
        &format!("{} bytes of its data", 2 << 20),
        &format!("once had {len} bytes"),
        "copy the image again",
        "read-only",
        "edgevmm image check",
    ];
    let before = std::fs::read(&image).unwrap();
    assert_says(&refusal(&image, &[]), &says);
    assert!(std::fs::read(&image).unwrap() == before);
    let disk = open_free(|| DiskOptions {
        read_only: true,
        ..options(&image, &[])
    });
    let disk = disk.unwrap();
    assert_eq!(read(&*disk, 6 << 20, 4096), [0x11; 4096]);
    let mut buf = [0; 512];
    let bufs = [edgevmm_block::VolatileSlice::from(&mut buf[..])];
    let err = disk.read_vectored(&bufs, 8 << 20).unwrap_err();
    assert_says(&err.source().unwrap().to_string(), &["truncated", "data"]);
    drop(disk);
    // Nor does a repair make up for it, or make it look whole.
    assert!(!check_file(&image, Repair::All).unwrap().is_clean());
    assert_says(&refusal(&image, &[]), &says);
    // Not closed cleanly either: what is missing could be found free.
    file.write_all_at(&[1], 79).unwrap();
    assert_says(&refusal(&image, &[]), &says);
    file.write_all_at(&[0], 79).unwrap();
    for cut in [4 << 16, 3 << 16, 2 << 16, 1 << 16, 300, 40, 5] {
        file.set_len(cut).unwrap();
        assert_says(&refusal(&image, &[]), &["truncated"]);
    }
}

/// An overlay over the disk of a snapshot is not for the image's present one.
#[test]
fn an_overlay_over_a_snapshot() {
    let dir = TempDir::new().unwrap();
    let image = filled(&dir, "image", &["-f", "qcow2"]);
    run("qemu-img", &["snapshot", "-c", "s", str(&image)]);
    let base = |snapshot: Option<&str>| DiskPaths {
        internal_snapshot: snapshot.map(Into::into),
        ..DiskPaths::new(&image)
    };
    let overlay = dir.path().join("overlay");
    let new = NewFile::create(&overlay, Existing::Keep).unwrap();
    overlay::create(new, &base(Some("s")), None).unwrap();
    let opened = |snapshot| {
        let top = DiskPaths::new(&overlay).open(true).unwrap();
        let top = overlay::over(top, base(snapshot).open(false).unwrap());
        open(top).map_err(|err| err.to_string())
    };
    drop(opened(Some("s")).unwrap());
    assert_says(&opened(None).err().unwrap(), &["another of the disks"]);
}

/// What a compaction, or a restored backup, leaves behind must not be taken for the image.
#[test]
fn an_image_that_was_replaced_while_it_was_opened() {
    let dir = TempDir::new().unwrap();
    for format in ["raw", "qcow2"] {
        let image = filled(&dir, format, &["-f", format]);
        let paths = DiskPaths {
            format: ImageFormat::from_qemu_name(format),
            ..DiskPaths::new(&image)
        };
        for writable in [false, true] {
            let options = paths.open(writable).unwrap();
            let other = dir.path().join("other");
            std::fs::copy(&image, &other).unwrap();
            std::fs::rename(&other, &image).unwrap();
            let err = open(options).expect_err("that is another file");
            assert_says(&err.to_string(), &[format, "was replaced", "try again"]);
            drop(open_free(|| paths.open(writable).unwrap()).unwrap());
        }
    }
}

/// Nobody is told zeroes in place of what was there.
#[test]
fn images_that_become_shorter_while_they_are_used() {
    let dir = TempDir::new().unwrap();
    for format in ["raw", "qcow2"] {
        let image = filled(&dir, format, &["-f", format]);
        let len = std::fs::metadata(&image).unwrap().len();
        let backup = std::fs::read(&image).unwrap();
        let disk = open_free(|| match format {
            "raw" => DiskOptions {
                format: Some(ImageFormat::Raw),
                ..options(&image, &[])
            },
            _ => options(&image, &[]),
        });
        let disk = disk.unwrap();
        assert_eq!(read(&*disk, SIZE - 4096, 4096), [0x11; 4096]);
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        // In the middle of a sector, and of a cluster.
        file.set_len(len - (2 << 20) + 5000).unwrap();
        assert_eq!(read(&*disk, 0, 4096), [0x11; 4096]);
        let mut buf = [0; 512];
        let bufs = [edgevmm_block::VolatileSlice::from(&mut buf[..])];
        let err = disk.read_vectored(&bufs, SIZE - (1 << 20)).unwrap_err();
        let says = ["was cut to", "while it is in use", "put back"];
        assert_says(&err.source().unwrap().to_string(), &says);
        std::fs::write(&image, &backup).unwrap();
        assert_eq!(read(&*disk, SIZE - (1 << 20), 4096), [0x11; 4096]);
    }
}

/// Clusters past the end of the file that were taken, but never came to be used; and files that end
/// where nothing was written.
#[test]
fn images_that_are_shorter_than_they_could_be() {
    let dir = TempDir::new().unwrap();
    let image = filled(&dir, "image", &["-f", "qcow2"]);
    let len = std::fs::metadata(&image).unwrap().len();
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    let bytes = std::fs::read(&image).unwrap();
    let number = |at: u64| u64::from_be_bytes(*bytes[at as usize..].first_chunk().unwrap());
    let block = number(number(48));
    let lost = block + (len / 65536 + 3) * 2;
    file.write_all_at(&[0, 1], lost).unwrap();
    let disk = open_disk(&image, &[]).unwrap();
    write(&*disk, 0, &[2; 512]).unwrap();
    drop(disk);
    let args = ["-f", "qcow2", "-o", "preallocation=metadata"];
    let image = create(&dir, "metadata", &args, SIZE);
    let disk = open_disk(&image, &[]).unwrap();
    write(&*disk, SIZE - 512, &[2; 512]).unwrap();
}

#[test]
fn images_that_must_not_be_written() {
    let dir = TempDir::new().unwrap();
    let image = filled(&dir, "image", &["-f", "qcow2"]);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[2], 79).unwrap();
    let says = [
        "marked as corrupt",
        "edgevmm image check --repair",
        "read-only",
    ];
    assert_says(&refusal(&image, &[]), &says);
    let disk = open_free(|| DiskOptions {
        read_only: true,
        ..options(&image, &[])
    });
    assert_eq!(read(&*disk.unwrap(), 0, 512), [0x11; 512]);
}

#[test]
fn a_second_writer() {
    let dir = TempDir::new().unwrap();
    for format in ["raw", "qcow2"] {
        let image = filled(&dir, format, &["-f", format]);
        let read_only = || {
            open_free(|| DiskOptions {
                read_only: true,
                ..options(&image, &[])
            })
        };
        let disk = open_disk(&image, &[]).unwrap();
        assert_says(&refusal(&image, &[]), &["in use", "stop that one"]);
        assert!(matches!(read_only(), Err(BlockError::Locked { .. })));
        drop(disk);
        let first = read_only().unwrap();
        let _second = read_only().unwrap();
        assert!(matches!(
            open_disk(&image, &[]),
            Err(BlockError::Locked { .. })
        ));
        assert!(first.read_only());
    }
}

#[test]
fn qemu_and_this_crate_respect_each_other() {
    let dir = TempDir::new().unwrap();
    let image = filled(&dir, "image", &["-f", "qcow2"]);
    let disk = open_disk(&image, &[]).unwrap();
    let qemu = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write 0 512", str(&image)])
        .output()
        .unwrap();
    assert!(!qemu.status.success(), "QEMU writes to an image in use");
    drop(disk);

    let mut qemu = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", str(&image)])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let holder = format!("process {}", qemu.id());
    let text = (0..100)
        .find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            open_disk(&image, &[]).err()
        })
        .expect("an image in use by QEMU must be refused")
        .to_string();
    assert_says(&text, &["in use by", &holder]);
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
}

#[test]
fn requests_outside_of_the_disk() {
    let dir = TempDir::new().unwrap();
    for format in ["raw", "qcow2"] {
        let image = create(&dir, format, &["-f", format], SIZE);
        let disk = open_disk(&image, &[]).unwrap();
        for (offset, len) in [
            (SIZE, 512),
            (SIZE - 512, 1024),
            (u64::MAX - 511, 512),
            (0, SIZE + 1),
        ] {
            let outside = |done| matches!(done, Err(BlockError::OutOfRange { .. }));
            let mut buf = vec![0; len as usize];
            let bufs = [edgevmm_block::VolatileSlice::from(&mut buf[..])];
            assert!(outside(disk.read_vectored(&bufs, offset)));
            assert!(outside(disk.write_vectored(&bufs, offset)));
            assert!(outside(disk.discard(offset, len)));
            assert!(outside(disk.write_zeroes(offset, len, true)));
        }
        assert!(disk.discard(1, u64::MAX).is_err());
    }
}

#[test]
fn changes_of_a_read_only_disk() {
    let dir = TempDir::new().unwrap();
    for format in ["raw", "qcow2"] {
        let image = filled(&dir, format, &["-f", format]);
        let before = std::fs::read(&image).unwrap();
        let disk = open_free(|| DiskOptions {
            read_only: true,
            ..options(&image, &[])
        })
        .unwrap();
        let refused = |done| matches!(done, Err(BlockError::ReadOnly));
        assert!(refused(write(&*disk, 0, &[1; 512])));
        assert!(refused(disk.discard(0, 512)));
        assert!(refused(disk.write_zeroes(0, 512, true)));
        assert_eq!(disk.limits().discard_granularity, 0);
        disk.flush().unwrap();
        drop(disk);
        assert!(std::fs::read(&image).unwrap() == before);
    }
}
