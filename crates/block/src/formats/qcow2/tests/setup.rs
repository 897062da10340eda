//! Images of every kind, and random numbers.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::ImageFormat;
use crate::formats::Backing;
use crate::formats::qcow2::create::{Compression, CreateOptions, DataFileName, create_in};
use crate::host::HostFile;
use crate::layer::Layer;

/// What an image is like.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    pub name: &'static str,
    pub options: CreateOptions,
    /// Bytes of the disk below; 0 for none.
    pub below: u64,
    /// What is below is a VMDK, else it is raw.
    pub over_vmdk: bool,
    /// It has an internal snapshot of its first half, full of data.
    pub snapshot: bool,
    /// Its data is in another file.
    pub external: bool,
}

/// The kinds of images.
pub fn shapes(size: u64) -> Vec<Shape> {
    let options = |cluster_size| CreateOptions {
        size,
        cluster_size,
        ..CreateOptions::default()
    };
    let plain = |name, cluster_size| Shape {
        name,
        options: options(cluster_size),
        ..Shape::default()
    };
    let extended = |name, cluster_size| Shape {
        name,
        options: CreateOptions {
            extended_l2: true,
            ..options(cluster_size)
        },
        ..Shape::default()
    };
    let refcounts = |name, cluster_size, refcount_bits| Shape {
        name,
        options: CreateOptions {
            refcount_bits,
            ..options(cluster_size)
        },
        ..Shape::default()
    };
    let old = |name, cluster_size| Shape {
        name,
        options: CreateOptions {
            version: 2,
            ..options(cluster_size)
        },
        ..Shape::default()
    };
    let over = |shape: Shape, name| Shape {
        name,
        below: size - size / 5 / 512 * 512,
        ..shape
    };
    let snapshot = |shape: Shape, name| Shape {
        name,
        snapshot: true,
        ..shape
    };
    let zstd = Shape {
        name: "zstd",
        options: CreateOptions {
            compression: Compression::Zstd,
            ..options(4096)
        },
        ..Shape::default()
    };
    let external = |name, raw| Shape {
        name,
        options: CreateOptions {
            data_file: Some(DataFileName {
                name: "data".into(),
                raw,
            }),
            ..options(4096)
        },
        external: true,
        ..Shape::default()
    };
    vec![
        plain("512", 512),
        plain("4k", 4096),
        plain("64k", 65536),
        refcounts("512, refcounts of 64 bits", 512, 64),
        refcounts("4k, refcounts of 1 bit", 4096, 1),
        over(plain("", 4096), "4k over another"),
        over(plain("", 65536), "64k over another"),
        over(refcounts("", 512, 64), "512 over another"),
        old("version 2", 4096),
        over(old("", 4096), "version 2 over another"),
        extended("subclusters", 16384),
        over(extended("", 16384), "subclusters over another"),
        Shape {
            over_vmdk: true,
            ..over(plain("", 4096), "4k over a VMDK")
        },
        extended("64k with subclusters", 65536),
        snapshot(plain("", 4096), "snapshot"),
        snapshot(plain("", 512), "512 with a snapshot"),
        snapshot(over(plain("", 16384), ""), "snapshot over another"),
        snapshot(extended("", 16384), "snapshot with subclusters"),
        snapshot(old("", 1024), "snapshot of version 2"),
        zstd,
        external("external", false),
        external("raw external", true),
    ]
}

/// An image of some shape: its files.
#[derive(Debug)]
pub struct Image {
    pub file: File,
    /// External data.
    pub data: Option<File>,
    /// The image below, every sector of which has its stamp.
    pub below: Option<File>,
    below_format: ImageFormat,
    dir: tempfile::TempDir,
}

impl Image {
    /// Makes an image of this shape. `qemu-img` makes the snapshot, if there is to be one.
    pub fn new(shape: &Shape) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let open = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            options.open(dir.path().join(name)).unwrap()
        };
        let mut options = shape.options.clone();
        let below_format = if shape.over_vmdk {
            ImageFormat::Vmdk
        } else {
            ImageFormat::Raw
        };
        let below = (shape.below > 0).then(|| {
            let file = open("below");
            let mut bytes = Vec::new();
            for sector in 0..shape.below / 512 {
                bytes.extend(stamped(below_stamp(sector)));
            }
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
            let raw = dir.path().join("below");
            let path = dir.path().join(format!("below.{below_format}"));
            let args = ["convert", "-f", "raw", "-O", below_format.qemu_name()];
            qemu(
                "qemu-img",
                &[&args[..], &[raw.to_str().unwrap()]].concat(),
                &path,
            );
            options.backing = Some(Backing {
                name: path.to_str().unwrap().into(),
                format: Some(below_format.qemu_name().into()),
            });
            File::open(path).unwrap()
        });
        let data = shape.external.then(|| {
            let file = open("data");
            file.set_len(shape.options.size).unwrap();
            file
        });
        let host = HostFile::new(open("image"), "image", false).unwrap();
        create_in(&host, &options).unwrap();
        drop(host);
        if shape.snapshot {
            let half = shape.options.size / 2;
            let write = format!("write -P {SNAPSHOT_BYTE} 0 {half}");
            qemu("qemu-io", &["-f", "qcow2", "-c", &write], &path);
            qemu("qemu-img", &["snapshot", "-c", "kept"], &path);
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self {
            file,
            data,
            below,
            below_format,
            dir,
        }
    }

    /// A path in the image's folder.
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// The image below, to be read.
    pub fn below(&self) -> Option<Arc<dyn Layer>> {
        let file = self.below.as_ref()?.try_clone().unwrap();
        let file = Arc::new(HostFile::new(file, "below", false).unwrap());
        let opened = crate::formats::open_layer(self.below_format, file, vec![], None);
        Some(opened.unwrap().layer)
    }
}

/// What the snapshot's data is.
pub const SNAPSHOT_BYTE: u8 = 0x5a;

/// The stamp of a sector of the image below.
pub fn below_stamp(sector: u64) -> u64 {
    1 << 40 | sector
}

/// The content of a sector with this stamp: 0 is zeroes.
pub fn stamped(stamp: u64) -> [u8; 512] {
    let mut sector = [0; 512];
    if stamp == SNAPSHOT_STAMP {
        return [SNAPSHOT_BYTE; 512];
    }
    // Compressible, but no word of it like that of another stamp.
    for (at, word) in sector.chunks_exact_mut(8).enumerate() {
        let value = stamp.wrapping_mul(if at % 4 == 0 { 1 } else { 0x1_0001 });
        word.copy_from_slice(&value.to_le_bytes());
    }
    sector
}

/// The stamp of what the snapshot has.
pub const SNAPSHOT_STAMP: u64 = u64::from_le_bytes([SNAPSHOT_BYTE; 8]);

/// The stamp that a sector has; none if it is torn or something else.
pub fn stamp_of(sector: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(*sector.first_chunk()?);
    (sector == stamped(stamp)).then_some(stamp)
}

/// Runs a tool of QEMU's on an image.
pub fn qemu(tool: &str, args: &[&str], image: &Path) -> String {
    for _ in 0..100 {
        let mut command = Command::new(tool);
        // Images name their data files without a path.
        let dir = image.parent().unwrap();
        let output = command
            .args(args)
            .arg(image)
            .current_dir(dir)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return text;
        }
        // Another test that starts a tool shares all open files with it for a moment.
        assert!(errors.contains("lock"), "{tool} {args:?}: {text}{errors}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the image is in use");
}

/// A small random source (xorshift) whose seed is printed, and can be given as `SEED`,
/// also as `random`.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let seed = match std::env::var("SEED") {
            Ok(seed) if seed == "random" => {
                std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64
            }
            Ok(seed) => seed.parse().unwrap(),
            // What went well for one change has to for the next.
            Err(_) => 0x5eed,
        };
        println!("SEED={seed}");
        Self::from(seed)
    }

    /// One of a seed of its own.
    pub fn from(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}
