//! Helpers of the integration tests: QEMU's tools, a random source, and a disk in memory.

#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use edgevmm_block::qcow2::{CheckReport, Repair, check};
use edgevmm_block::{
    BackingFile, BlockBackend, BlockError, DiskOptions, ImageFormat, VolatileSlice, open, open_path,
};
use tempfile::TempDir;

/// Runs a tool that must succeed and returns its output.
///
/// A tool that finds an image locked is run again for a while; see [`open_free`].
pub fn run(tool: &str, args: &[&str]) -> String {
    for last in [false; 50].into_iter().chain([true]) {
        let output = Command::new(tool)
            .args(args)
            .output()
            .unwrap_or_else(|err| panic!("{tool} is needed by this test (qemu-utils): {err}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return text;
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            !last && errors.contains("lock"),
            "{tool} {args:?}: {text}{errors}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    unreachable!("the last round returns or fails")
}

/// The bytes of `image` as QEMU sees them.
pub fn as_qemu_reads(image: &Path, format: &str) -> Vec<u8> {
    let flat = image.with_extension("flat");
    run(
        "qemu-img",
        &[
            "convert",
            "-U",
            "-f",
            format,
            "-O",
            "raw",
            str(image),
            str(&flat),
        ],
    );
    std::fs::read(flat).unwrap()
}

/// Asserts that QEMU finds neither errors nor leaks.
pub fn assert_clean(image: &Path) {
    run(
        "qemu-img",
        &["check", "-U", "-q", "-f", "qcow2", str(image)],
    );
}

/// A path as QEMU's tools want it.
pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Creates an image with qemu-img.
pub fn create(dir: &TempDir, name: &str, options: &[&str], size: u64) -> PathBuf {
    let path = dir.path().join(name);
    let size = size.to_string();
    let mut args = vec!["create", "-q"];
    args.extend(options);
    args.extend([str(&path), &size]);
    run("qemu-img", &args);
    path
}

/// Options for the image at `path`, writable, on top of `backing`.
pub fn options(path: &Path, backing: &[&Path]) -> DiskOptions {
    let mut options = DiskOptions::new(open_path(path, true).unwrap(), str(path));
    options.backing = backing
        .iter()
        .map(|path| BackingFile {
            file: open_path(path, false).unwrap(),
            format: None,
            path_hint: str(path).to_owned(),
            data_files: Vec::new(),
            internal_snapshot: None,
        })
        .collect();
    options
}

/// Opens the image at `path`, which nobody uses any more, for writing on top of `backing`.
pub fn open_disk(path: &Path, backing: &[&Path]) -> Result<Arc<dyn BlockBackend>, BlockError> {
    open_free(|| options(path, backing))
}

/// Opens a raw image whatever its content.
pub fn open_raw(path: &Path) -> Result<Arc<dyn BlockBackend>, BlockError> {
    open_free(|| DiskOptions {
        format: Some(ImageFormat::Raw),
        ..options(path, &[])
    })
}

/// Opens a disk that nobody uses any more; the error is of no lock unless that stays.
///
/// Another test that starts a tool shares all open files, and so their locks, with its child
/// until that becomes the tool; so a lock may outlive its disk for a moment.
pub fn open_free(options: impl Fn() -> DiskOptions) -> Result<Arc<dyn BlockBackend>, BlockError> {
    for _ in 0..50 {
        match open(options()) {
            Err(BlockError::Locked { .. }) => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    open(options())
}

/// A small random source (xorshift) whose seed is printed, and can be given as `SEED`,
/// also as `random`.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeds from the environment.
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
        Self(seed | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// A range of whole sectors within `size` bytes; sometimes long, sometimes up to the end.
    pub fn range(&mut self, size: u64) -> (u64, u64) {
        let sectors = size / 512;
        let start = self.below(sectors);
        let longest = sectors - start;
        let len = match self.below(8) {
            0 => longest,
            1 => 1 + self.below(longest),
            _ => 1 + self.below(longest.min(64)),
        };
        (start * 512, len.min(4096) * 512)
    }
}

/// Cuts `buf` into pieces of random length, as a guest might.
pub fn pieces<'a>(mut buf: &'a mut [u8], random: &mut Random) -> Vec<VolatileSlice<'a>> {
    let mut slices = Vec::new();
    while !buf.is_empty() {
        let len = buf.len() as u64;
        let len = if random.below(2) == 0 {
            len
        } else {
            1 + random.below(len)
        };
        let (piece, rest) = buf.split_at_mut(len as usize);
        slices.push(VolatileSlice::from(piece));
        buf = rest;
    }
    slices
}

/// Reads `len` bytes at `offset`.
pub fn read(disk: &dyn BlockBackend, offset: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0xee; len as usize];
    disk.read_vectored(&[VolatileSlice::from(&mut buf[..])], offset)
        .unwrap();
    buf
}

/// Writes `data` at `offset`.
pub fn write(disk: &dyn BlockBackend, offset: u64, data: &[u8]) -> Result<(), BlockError> {
    let mut data = data.to_vec();
    disk.write_vectored(&[VolatileSlice::from(&mut data[..])], offset)
}

/// What [`exercise_more`] may do besides reading, writing, discarding, zeroing and flushing.
#[derive(Clone, Copy, Debug, Default)]
pub struct More {
    /// Bytes in a cluster, for compressed ones to be written; 0 for none.
    pub packed: u64,
    /// Largest size in bytes that the disk may get; it stays as it is if that is smaller.
    pub largest: u64,
}

/// Does `count` random requests and keeps `model`, the bytes expected on the disk, in step.
pub fn exercise(disk: &dyn BlockBackend, model: &mut Vec<u8>, count: u32, random: &mut Random) {
    exercise_more(disk, model, count, random, More::default());
}

/// [`exercise`], and more.
pub fn exercise_more(
    disk: &dyn BlockBackend,
    model: &mut Vec<u8>,
    count: u32,
    random: &mut Random,
    more: More,
) {
    for step in 0..count {
        let size = disk.size();
        assert_eq!(size, model.len() as u64);
        let (offset, len) = random.range(size);
        let range = offset as usize..(offset + len) as usize;
        match random.below(14) {
            0 => disk.flush().unwrap(),
            1 => {
                disk.discard(offset, len).unwrap();
                let left = read(disk, offset, len);
                let sectors = left.chunks(512).zip(model[range.clone()].chunks(512));
                for (at, (now, before)) in sectors.enumerate() {
                    assert!(
                        now == before || now.iter().all(|byte| *byte == 0),
                        "step {step}: sector {at} of a discard of {offset}+{len} is something else"
                    );
                }
                model[range].copy_from_slice(&left);
            }
            kind @ 2..=3 => {
                disk.write_zeroes(offset, len, kind == 2).unwrap();
                model[range].fill(0);
            }
            4..=5 => assert!(
                read(disk, offset, len) == model[range],
                "step {step} at {offset}+{len}"
            ),
            6 if more.packed > 0 => {
                let start = offset - offset % more.packed;
                let end = (start + more.packed).min(size);
                let data = noise(end - start, random);
                disk.write_compressed(start, &data).unwrap();
                model[start as usize..end as usize].copy_from_slice(&data);
            }
            7 if size < more.largest && random.below(6) == 0 => {
                let new = size + (1 + random.below((more.largest - size) / 512)) * 512;
                disk.resize(new).unwrap();
                model.resize(new as usize, 0);
            }
            _ => {
                let mut data = noise(len, random);
                model[range].copy_from_slice(&data);
                disk.write_vectored(&pieces(&mut data, random), offset)
                    .unwrap();
            }
        }
    }
    assert!(
        read(disk, 0, disk.size()) == *model,
        "the disk differs from the model at the end"
    );
}

/// Data of that many bytes, more or less compressible.
pub fn noise(len: u64, random: &mut Random) -> Vec<u8> {
    let mut data = vec![0; len as usize];
    let repeat = 1 + random.below(64);
    let mut value = 0;
    for (at, chunk) in data.chunks_mut(8).enumerate() {
        if (at as u64).is_multiple_of(repeat) {
            value = random.below(u64::MAX);
        }
        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
    }
    data
}

/// Checks an image, and repairs it as told.
pub fn check_file(image: &Path, repair: Repair) -> Result<CheckReport, BlockError> {
    for _ in 0..50 {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(image)
            .unwrap();
        match check(file, str(image), repair, &mut |done, all| {
            assert!(done <= all);
        }) {
            // See `open_free`.
            Err(BlockError::Locked { .. }) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
    panic!("the image is in use");
}
