//! Images made and looked at by QEMU's tools.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use edgevmm_block::{DiskPaths, Existing};
use edgevmm_image::{ImageError, Job, Target, TargetFormat};

pub const MIB: u64 = 1 << 20;
/// Size of the disk of [`sample`]: not a multiple of any cluster size.
pub const SIZE: u64 = 8 * MIB + 3 * 512;

/// Runs a program that must succeed and gives what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
    assert!(
        output.status.success(),
        "{program} {args:?}: {stdout}{stderr}"
    );
    stdout.into_owned()
}

pub fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// Writes to an image by a command of qemu-io.
pub fn qemu_io(path: &Path, format: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(str(path));
    let said = run("qemu-io", &args);
    assert!(!said.contains("failed"), "{said}");
}

pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that do not compress and are never all zeroes, the same for a seed.
pub fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len as usize).collect()
}

/// A raw image of [`SIZE`] bytes with noise, text, zeroes that are written and holes, down to
/// parts of a cluster and of a block.
pub fn sample(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&noise(1, MIB + 700), 0).unwrap();
    file.write_all_at(&vec![0; MIB as usize / 2], MIB / 2)
        .unwrap();
    file.write_all_at(&b"lots of text ".repeat(50_000), 2 * MIB + 4096)
        .unwrap();
    file.write_all_at(&noise(2, 1), 4 * MIB + 12_345).unwrap();
    file.write_all_at(&noise(3, 70_000), 5 * MIB + 512).unwrap();
    file.write_all_at(&vec![0; MIB as usize], 6 * MIB).unwrap();
    file.write_all_at(&noise(4, 512), SIZE - 512).unwrap();
}

/// An image with the content of a sample.
pub struct Source {
    pub name: &'static str,
    pub paths: DiskPaths,
}

/// The sample in every format that is read, in files of `dir`.
pub fn sources(dir: &Path, raw: &Path) -> Vec<Source> {
    let options = [
        ("qcow2", "qcow2", ""),
        ("v2", "qcow2", "compat=0.10"),
        ("c512", "qcow2", "cluster_size=512"),
        ("c2m", "qcow2", "cluster_size=2M"),
        ("extl2", "qcow2", "extended_l2=on,cluster_size=128k"),
        (
            "metadata",
            "qcow2",
            "preallocation=metadata,lazy_refcounts=on",
        ),
        ("refcount64", "qcow2", "refcount_bits=64"),
        ("zlib", "qcow2", "compression_type=zlib"),
        ("zstd", "qcow2", "compression_type=zstd"),
        ("sparse", "vmdk", "subformat=monolithicSparse"),
        ("stream", "vmdk", "subformat=streamOptimized"),
        ("flat", "vmdk", "subformat=monolithicFlat"),
        ("split", "vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("vhdx", "vhdx", "subformat=dynamic"),
        ("vhdx-fixed", "vhdx", "subformat=fixed"),
        ("vdi", "vdi", ""),
        ("vdi-static", "vdi", "static=on"),
    ];
    let mut sources = vec![Source {
        name: "raw",
        paths: DiskPaths::new(raw),
    }];
    for (name, format, options) in options {
        let path = dir.join(format!("{name}.{format}"));
        let mut args = vec!["convert", "-q", "-f", "raw", "-O", format];
        if name == "zlib" || name == "zstd" {
            args.push("-c");
        }
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([str(raw), str(&path)]);
        qemu_img(&args);
        sources.push(Source {
            name,
            paths: DiskPaths::new(path),
        });
    }
    sources.push(archive(dir));
    sources.push(chain(dir, raw));
    sources.push(data_file(dir, raw));
    sources.push(internal_snapshot(dir, raw));
    sources
}

/// An archive with a disk that is there already.
fn archive(dir: &Path) -> Source {
    let path = dir.join("machine.ova");
    fs::write(dir.join("machine.ovf"), "<Envelope/>").unwrap();
    let files = ["machine.ovf", "stream.vmdk"];
    run(
        "tar",
        &[&["-C", str(dir), "-cf", str(&path)], &files[..]].concat(),
    );
    Source {
        name: "ova",
        paths: DiskPaths::new(path),
    }
}

/// Two overlays on a raw base that is shorter, with the rest of the sample in them.
fn chain(dir: &Path, raw: &Path) -> Source {
    let [base, middle, top] = ["base.raw", "middle.qcow2", "top.qcow2"].map(|it| dir.join(it));
    let bytes = fs::read(raw).unwrap();
    // Something else below what the overlays have.
    let mut below = bytes[..3 * MIB as usize].to_vec();
    below[100_000..300_000].fill(0xaa);
    below[MIB as usize / 2..][..8192].fill(0xbb);
    fs::write(&base, below).unwrap();
    let size = SIZE.to_string();
    for (image, over, format) in [(&middle, &base, "raw"), (&top, &middle, "qcow2")] {
        let args = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
        qemu_img(&[&args[..], &[str(over), str(image), &size]].concat());
    }
    let part = dir.join("part");
    for (image, from, to) in [
        (&middle, 100_000 / 512 * 512, 200_192),
        (&top, 200_192, 300_032),
        (&middle, 3 * MIB as usize, 5 * MIB as usize),
        (&top, 5 * MIB as usize, SIZE as usize),
    ] {
        fs::write(&part, &bytes[from..to]).unwrap();
        let command = format!("write -q -s {} {from} {}", str(&part), to - from);
        qemu_io(image, "qcow2", &[&command]);
    }
    qemu_io(&top, "qcow2", &["write -q -z 512k 8k"]);
    Source {
        name: "chain",
        paths: DiskPaths {
            backing: vec![middle, base],
            ..DiskPaths::new(top)
        },
    }
}

fn data_file(dir: &Path, raw: &Path) -> Source {
    let (path, data) = (dir.join("external.qcow2"), dir.join("external.data"));
    let option = format!("data_file={}", str(&data));
    let args = ["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", &option];
    qemu_img(&[&args[..], &[str(raw), str(&path)]].concat());
    Source {
        name: "data file",
        paths: DiskPaths {
            data_files: vec![data],
            ..DiskPaths::new(path)
        },
    }
}

/// A qcow2 whose present state is another one than its snapshot.
fn internal_snapshot(dir: &Path, raw: &Path) -> Source {
    let path = dir.join("snapshot.qcow2");
    qemu_img(&[
        "convert",
        "-q",
        "-f",
        "raw",
        "-O",
        "qcow2",
        str(raw),
        str(&path),
    ]);
    qemu_img(&["snapshot", "-c", "before", str(&path)]);
    qemu_io(
        &path,
        "qcow2",
        &["write -q -P 0x77 0 2M", "discard -q 5M 1M"],
    );
    Source {
        name: "snapshot",
        paths: DiskPaths {
            internal_snapshot: Some("before".into()),
            ..DiskPaths::new(path)
        },
    }
}

/// Has QEMU compare a raw image with another one, and check that one.
pub fn expect_same(raw: &Path, other: &Path, format: &str) {
    qemu_img(&["compare", "-f", "raw", "-F", format, str(raw), str(other)]);
    if format == "qcow2" {
        qemu_img(&["check", "-q", "-f", "qcow2", str(other)]);
    }
}

pub fn target(path: &Path, format: TargetFormat) -> Target {
    Target {
        path: path.to_owned(),
        existing: Existing::Keep,
        format,
    }
}

pub fn convert(source: &DiskPaths, target: &Target) -> Result<(), ImageError> {
    edgevmm_image::convert(source, target, &Job::unattended())
}

/// Names in a directory, in order.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
    names.sort();
    names
}

/// Bytes that a file takes up.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

pub fn in_dir(test: impl FnOnce(PathBuf)) {
    let dir = tempfile::tempdir().unwrap();
    test(dir.path().to_owned());
}
