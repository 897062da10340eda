//! The fuzz targets of this crate on their seeds, and how those were made.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "the targets are a part of another package"
)]

mod common;
#[path = "../../../fuzz/src/images/mod.rs"]
mod images;

use std::path::{Path, PathBuf};

use common::{run, str};
use tempfile::TempDir;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 9] = [
    ("vmdk", images::vmdk),
    ("ova", images::ova),
    ("vhd", images::vhd),
    ("vhdx", images::vhdx),
    ("vdi", images::vdi),
    ("probe", images::probe),
    ("qcow2", images::qcow2),
    ("qcow2_write", images::qcow2_write),
    ("qcow2_check", images::qcow2_check),
];

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/seeds")
        .join(target)
}

#[test]
fn targets_take_their_seeds() {
    for (name, target) in TARGETS {
        let mut count = 0;
        for seed in std::fs::read_dir(seeds(name)).unwrap() {
            let path = seed.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}

/// Packs the image, with its extents if it has some.
fn pack(image: &Path, requests: &[u8]) -> Vec<u8> {
    let mut files = vec![std::fs::read(image).unwrap()];
    for ending in ["-flat.vmdk", "-f001.vmdk", "-s001.vmdk"] {
        let stem = image.file_stem().unwrap().to_str().unwrap();
        files.extend(std::fs::read(
            image.with_file_name(format!("{stem}{ending}")),
        ));
    }
    images::packed::pack(&files, true, requests)
}

/// Makes the seeds anew, of small images by qemu-img.
#[test]
#[ignore = "writes into the source tree"]
fn make_seeds() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let requests: Vec<u8> = (0..256_u32).map(|it| (it * 167 + it / 7) as u8).collect();
    let write = |target: &str, name: &str, seed: &[u8]| {
        assert!(
            seed.len() <= images::packed::INPUT_MAX,
            "{name} has {} bytes",
            seed.len()
        );
        std::fs::create_dir_all(seeds(target)).unwrap();
        std::fs::write(seeds(target).join(name), seed).unwrap();
    };
    let fill = |format: &str, image: &Path| {
        run(
            "qemu-io",
            &[
                "-f",
                format,
                "-c",
                "write -P 1 0 700",
                "-c",
                "write -P 2 1m 1k",
                "-c",
                "write -z 64k 128k",
                "-c",
                "write -P 3 3000k 512",
                str(image),
            ],
        );
    };
    let create = |format: &str, options: &str, name: &str, size: &str| {
        let image = path(name);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                format,
                "-o",
                options,
                str(&image),
                size,
            ],
        );
        fill(format, &image);
        image
    };
    run(
        "qemu-img",
        &["create", "-q", "-f", "raw", str(&path("raw")), "5m"],
    );
    fill("raw", &path("raw"));

    for (target, name, format, options) in [
        (
            "vmdk",
            "sparse",
            "vmdk",
            "subformat=monolithicSparse,zeroed_grain=on",
        ),
        ("vmdk", "flat", "vmdk", "subformat=monolithicFlat"),
        ("vmdk", "split", "vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vhd", "dynamic", "vpc", "subformat=dynamic"),
        ("vhd", "fixed", "vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "dynamic", "vhdx", "subformat=dynamic,block_size=1M"),
        ("vdi", "dynamic", "vdi", "static=off"),
        ("qcow2", "version-2", "qcow2", "compat=0.10"),
        (
            "qcow2",
            "lazy",
            "qcow2",
            "compat=1.1,lazy_refcounts=on,cluster_size=4k",
        ),
        (
            "qcow2",
            "extended-l2",
            "qcow2",
            "extended_l2=on,cluster_size=16k",
        ),
        (
            "qcow2",
            "narrow",
            "qcow2",
            "refcount_bits=1,cluster_size=512",
        ),
        ("qcow2", "wide", "qcow2", "refcount_bits=64,cluster_size=2M"),
    ] {
        let image = create(format, options, &format!("{name}.vmdk"), "5m");
        let seed = pack(&image, &requests);
        write(target, name, &seed);
        if target == "vhdx" {
            // As if it had not been closed: the mark of the log's entry is that of the log.
            let mut bytes = std::fs::read(&image).unwrap();
            bytes.copy_within((1 << 20) + 32..(1 << 20) + 48, (64 << 10) + 48);
            bytes.copy_within((1 << 20) + 32..(1 << 20) + 48, (128 << 10) + 48);
            write(
                "vhdx",
                "log",
                &images::packed::pack(&[bytes], true, &requests),
            );
        }
        if target == "qcow2" {
            write("qcow2_write", name, &seed);
            write("qcow2_check", name, &seed);
        }
        write("probe", target, &seed[..seed.len().min(600)]);
    }
    for kind in ["zlib", "zstd"] {
        let image = path(kind);
        let option = format!("compression_type={kind}");
        let options = ["convert", "-c", "-O", "qcow2", "-o", &option];
        run(
            "qemu-img",
            &[&options[..], &[str(&path("raw")), str(&image)]].concat(),
        );
        run("qemu-img", &["snapshot", "-c", "a snapshot", str(&image)]);
        write("qcow2", kind, &pack(&image, &requests));
        write("qcow2_write", kind, &pack(&image, &requests));
        write("qcow2_check", kind, &pack(&image, &requests));
    }
    // The name of the data file is a part of the image, so it must not be a path.
    let (image, data) = (path("external"), path("data"));
    let make = "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external 5m && \
                qemu-io -c 'write -P 1 0 1k' -c 'write -P 2 3m 512' external";
    run("sh", &["-c", &format!("cd {} && {make}", str(dir.path()))]);
    let files = [image, data].map(|path| std::fs::read(path).unwrap());
    for target in ["qcow2", "qcow2_write"] {
        let seed = images::packed::pack(&files, false, &requests);
        write(target, "external", &seed);
    }
    let stream = path("disk.vmdk");
    let options = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    run(
        "qemu-img",
        &[&options[..], &[str(&path("raw")), str(&stream)]].concat(),
    );
    write("vmdk", "stream", &pack(&stream, &requests));

    let text = "# Disk DescriptorFile\nparentCID=ffffffff\nRW 10 FLAT \"a\" 7\nRW 9000 ZERO\n\
                RDONLY 20 VMFS \"b\"\nRW 33 FLAT \"a\" 0\n";
    let files = [text.into(), vec![1; 20_000], vec![2; 20_000]];
    write(
        "vmdk",
        "parts",
        &images::packed::pack(&files, false, &requests),
    );

    std::fs::write(path("vm.ovf"), "<Envelope/>").unwrap();
    let long = "n".repeat(120);
    for format in ["ustar", "gnu", "pax"] {
        let ova = path("vm.ova");
        let format_option = format!("--format={format}");
        let mut args = vec!["-cf", str(&ova), &format_option, "-C", str(dir.path())];
        let transform = format!("s/disk/{long}/");
        if format != "ustar" {
            args.extend(["--transform", &transform]);
        }
        args.extend(["vm.ovf", "disk.vmdk"]);
        run("tar", &args);
        write("ova", format, &pack(&ova, &requests));
        write("probe", &format!("ova-{format}"), &pack(&ova, &[]));
    }
}
