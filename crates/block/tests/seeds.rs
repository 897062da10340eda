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

/// Target, name of the seed, QEMU's name of the format, options.
const IMAGES: [(&str, &str, &str, &str); 12] = [
    ("vmdk", "sparse", "vmdk", "zeroed_grain=on"),
    ("vmdk", "flat", "vmdk", "subformat=monolithicFlat"),
    ("vmdk", "split", "vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vhd", "dynamic", "vpc", "subformat=dynamic"),
    ("vhd", "fixed", "vpc", "subformat=fixed,force_size=on"),
    ("vhdx", "dynamic", "vhdx", "block_size=1M"),
    ("vdi", "dynamic", "vdi", "static=off"),
    ("qcow2", "version-2", "qcow2", "compat=0.10"),
    (
        "qcow2",
        "lazy",
        "qcow2",
        "lazy_refcounts=on,cluster_size=4k",
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
];

/// Makes images and packs them.
struct Maker {
    dir: TempDir,
    requests: Vec<u8>,
}

impl Maker {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn save(&self, target: &str, name: &str, files: &[Vec<u8>]) {
        let seed = images::packed::pack(files, true, &self.requests);
        assert!(seed.len() <= images::packed::INPUT_MAX, "{target}/{name}");
        std::fs::create_dir_all(seeds(target)).unwrap();
        std::fs::write(seeds(target).join(name), &seed).unwrap();
        let derived: &[&str] = match target {
            "qcow2" => &["qcow2_write", "qcow2_check"],
            "qcow2_write" | "qcow2_check" | "probe" => &[],
            _ => {
                // No more than what a format is known by.
                let head: Vec<_> = files[0].iter().copied().take(3000).collect();
                return self.save("probe", &format!("{target}-{name}"), &[head]);
            }
        };
        for target in derived {
            self.save(target, name, files);
        }
    }

    /// An image with some data, and its extents if it has some.
    fn image(&self, name: &str, format: &str, options: &str) -> Vec<Vec<u8>> {
        let image = self.path(&format!("{name}.vmdk"));
        let create = [
            "create",
            "-q",
            "-f",
            format,
            "-o",
            options,
            str(&image),
            "5m",
        ];
        run("qemu-img", &create);
        let (first, second) = ("write -P 1 0 1k", "write -P 2 1m 1k");
        let (zeroes, last) = ("write -z 64k 128k", "write -P 3 3000k 512");
        let commands = ["-c", first, "-c", second, "-c", zeroes, "-c", last];
        run(
            "qemu-io",
            &[&["-f", format], &commands[..], &[str(&image)]].concat(),
        );
        let mut files = vec![std::fs::read(&image).unwrap()];
        for ending in ["-flat.vmdk", "-s001.vmdk"] {
            files.extend(std::fs::read(self.path(&format!("{name}{ending}"))));
        }
        files
    }

    /// What `qemu-img convert` makes of a raw image with some data.
    fn converted(&self, name: &str, args: &[&str]) -> PathBuf {
        let (raw, image) = (self.path("raw"), self.path(name));
        std::fs::write(&raw, &self.image("a", "raw", "preallocation=off")[0]).unwrap();
        run(
            "qemu-img",
            &[&["convert"], args, &[str(&raw), str(&image)]].concat(),
        );
        image
    }
}

/// Makes the seeds of images anew.
#[test]
#[ignore = "writes into the source tree"]
fn make_seeds() {
    let maker = Maker {
        dir: TempDir::new().unwrap(),
        requests: (0..256_u32).map(|it| (it * 167 + it / 7) as u8).collect(),
    };
    for (target, name, format, options) in IMAGES {
        let mut files = maker.image(name, format, options);
        maker.save(target, name, &files);
        if target == "vhdx" {
            // As if it had not been closed: the mark of the log's entry is that of the log.
            let entry = (1 << 20) + 32..(1 << 20) + 48;
            files[0].copy_within(entry.clone(), (64 << 10) + 48);
            files[0].copy_within(entry, (128 << 10) + 48);
            maker.save(target, "log", &files);
        }
    }
    for kind in ["zlib", "zstd"] {
        let option = format!("compression_type={kind}");
        let image = maker.converted(kind, &["-c", "-O", "qcow2", "-o", &option]);
        run("qemu-img", &["snapshot", "-c", "a snapshot", str(&image)]);
        maker.save("qcow2", kind, &[std::fs::read(image).unwrap()]);
    }
    // The name of the data file is a part of the image, so it must not be a path.
    let make = "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external 5m && \
                qemu-io -c 'write -P 1 0 1k' -c 'write -P 2 3m 512' external";
    run(
        "sh",
        &["-c", &format!("cd {} && {make}", str(maker.dir.path()))],
    );
    let files = ["external", "data"].map(|name| std::fs::read(maker.path(name)).unwrap());
    maker.save("qcow2", "external", &files);
    let parts = "# Disk DescriptorFile\nparentCID=ffffffff\nRW 10 FLAT \"a\" 7\nRW 9000 ZERO\n\
                 RDONLY 20 VMFS \"b\"\nRW 33 FLAT \"a\" 0\n";
    maker.save(
        "vmdk",
        "parts",
        &[parts.into(), vec![1; 20_000], vec![2; 20_000]],
    );
    let options = ["-O", "vmdk", "-o", "subformat=streamOptimized"];
    let stream = maker.converted("disk.vmdk", &options);
    maker.save("vmdk", "stream", &[std::fs::read(stream).unwrap()]);

    std::fs::write(maker.path("vm.ovf"), "<Envelope/>").unwrap();
    let (ova, here) = (maker.path("vm.ova"), str(maker.dir.path()));
    let long = format!("--transform=s/disk/{}/", "n".repeat(120));
    for (format, rename) in [("ustar", "--verbose"), ("gnu", &long), ("pax", &long)] {
        let format_option = format!("--format={format}");
        let args = [
            "-cf",
            str(&ova),
            &format_option,
            rename,
            "-C",
            here,
            "vm.ovf",
            "disk.vmdk",
        ];
        run("tar", &args);
        maker.save("ova", format, &[std::fs::read(&ova).unwrap()]);
    }
}
