//! Images of other hypervisors: made by QEMU and tar, compared with what QEMU reads, damaged, and
//! refused.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod extents;
mod hyperv;
mod ova;
mod vhdx_log;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Random, run, str};
use edgevmm_block::{BlockBackend, BlockError, DiskPaths, ImageFormat, VolatileSlice, open, probe};
use tempfile::TempDir;

/// A disk that is read.
struct Disk(Arc<dyn BlockBackend>);

impl Disk {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, BlockError> {
        let mut buf = vec![0xee; len as usize];
        self.0
            .read_vectored(&[VolatileSlice::from(&mut buf[..])], offset)?;
        Ok(buf)
    }
}

/// Opens an image and its extents; `part` is of an archive.
fn open_part(
    path: &Path,
    format: Option<ImageFormat>,
    part: Option<&str>,
) -> Result<Disk, BlockError> {
    let paths = DiskPaths {
        format,
        internal_snapshot: part.map(str::to_owned),
        ..DiskPaths::new(path)
    };
    open(paths.open(false)?).map(Disk)
}

fn try_open(path: &Path, format: Option<ImageFormat>) -> Result<Disk, BlockError> {
    open_part(path, format, None)
}

/// The error of opening an image, with its causes, as a program prints it.
fn refusal(path: &Path, format: Option<ImageFormat>) -> String {
    let error = try_open(path, format).err();
    let error = error.expect("the image must be refused");
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A raw disk of `size` bytes with data here and there, some of it easy to compress.
fn content(dir: &TempDir, size: u64, random: &mut Random) -> PathBuf {
    let path = dir.path().join("content.raw");
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for _ in 0..24 {
        let len = 1 + random.below(300_000);
        let at = random.below(size);
        let mask = if random.below(2) == 0 { 0xff } else { 3 };
        let data: Vec<u8> = (0..len.min(size - at))
            .map(|_| (random.below(256) & mask) as u8)
            .collect();
        file.write_all_at(&data, at).unwrap();
    }
    file.write_all_at(b"the end", size - 7).unwrap();
    path
}

/// Makes an image of the raw disk `raw`.
fn convert(raw: &Path, format: ImageFormat, options: &str, image: &Path) {
    let args = ["convert", "-O", format.qemu_name(), "-o", options];
    run("qemu-img", &[&args[..], &[str(raw), str(image)]].concat());
}

/// Compares the image at `path` with the raw disk that QEMU makes of it.
fn compare(path: &Path, format: ImageFormat, random: &mut Random) {
    let flat = path.with_extension("flat");
    let qemu = format.qemu_name();
    run(
        "qemu-img",
        &["convert", "-f", qemu, "-O", "raw", str(path), str(&flat)],
    );
    compare_with(path, format, &flat, random);
}

fn compare_with(path: &Path, format: ImageFormat, flat: &Path, random: &mut Random) {
    let disk = try_open(path, Some(format)).unwrap();
    let expected = File::open(flat).unwrap();
    let size = expected.metadata().unwrap().len();
    assert_eq!(disk.size(), size);
    let check = |at: u64, len: u64| {
        let mut wanted = vec![0; len as usize];
        expected.read_exact_at(&mut wanted, at).unwrap();
        let seen = disk.read(at, len).unwrap();
        assert!(seen == wanted, "{path:?} differs within {at}+{len}");
    };
    if size <= 64 << 20 {
        check(0, size);
    }
    for _ in 0..300 {
        let at = random.below(size);
        let len = 1 + random.below((size - at).min(400_000));
        check(at, len);
    }
    check(size - 1, 1);
}

#[test]
fn every_subformat_reads_as_in_qemu() {
    let mut random = Random::new();
    for (format, extension, options) in [
        (ImageFormat::Vmdk, "vmdk", "subformat=monolithicSparse"),
        (
            ImageFormat::Vmdk,
            "vmdk",
            "subformat=monolithicSparse,zeroed_grain=on",
        ),
        (
            ImageFormat::Vmdk,
            "vmdk",
            "subformat=monolithicSparse,compat6=on,adapter_type=lsilogic",
        ),
        (ImageFormat::Vmdk, "vmdk", "subformat=streamOptimized"),
        (ImageFormat::Vmdk, "vmdk", "subformat=monolithicFlat"),
        (ImageFormat::Vmdk, "vmdk", "subformat=twoGbMaxExtentFlat"),
        (ImageFormat::Vmdk, "vmdk", "subformat=twoGbMaxExtentSparse"),
        (ImageFormat::Vhd, "vhd", "subformat=dynamic"),
        (ImageFormat::Vhd, "vhd", "subformat=dynamic,force_size=on"),
        (ImageFormat::Vhd, "vhd", "subformat=fixed"),
        (ImageFormat::Vhd, "vhd", "subformat=fixed,force_size=on"),
        (ImageFormat::Vhdx, "vhdx", "subformat=dynamic"),
        (ImageFormat::Vhdx, "vhdx", "subformat=dynamic,block_size=2M"),
        (
            ImageFormat::Vhdx,
            "vhdx",
            "subformat=dynamic,block_size=256M,log_size=3M",
        ),
        (ImageFormat::Vhdx, "vhdx", "subformat=fixed"),
        (ImageFormat::Vdi, "vdi", "static=off"),
        (ImageFormat::Vdi, "vdi", "static=on"),
    ] {
        let dir = TempDir::new().unwrap();
        let size = (4 << 20) + random.below(40_000) * 512;
        let raw = content(&dir, size, &mut random);
        let image = dir.path().join("image").with_extension(extension);
        convert(&raw, format, options, &image);
        println!("{format} {options} {size}");
        compare(&image, format, &mut random);
        // A fixed VHD can be told from a raw disk by its end only, where a guest might write.
        let seen = probe(&File::open(&image).unwrap());
        let fixed = options.contains("fixed") && format == ImageFormat::Vhd;
        assert_eq!(seen.unwrap(), if fixed { ImageFormat::Raw } else { format });
    }
}

#[test]
fn disks_of_several_extents() {
    let mut random = Random::new();
    for options in [
        "subformat=twoGbMaxExtentFlat",
        "subformat=twoGbMaxExtentSparse",
    ] {
        let dir = TempDir::new().unwrap();
        let size = (5 << 30) + 512;
        let raw = content(&dir, size, &mut random);
        let across = (2 << 30) - 1000;
        let file = OpenOptions::new().write(true).open(&raw).unwrap();
        file.write_all_at(&[7; 3000], across).unwrap();
        let image = dir.path().join("a disk.vmdk");
        convert(&raw, ImageFormat::Vmdk, options, &image);
        compare_with(&image, ImageFormat::Vmdk, &raw, &mut random);
        let disk = try_open(&image, None).unwrap();
        assert!(disk.read(across, 3000).unwrap() == [7; 3000]);
        assert_eq!(disk.read(size - 7, 7).unwrap(), b"the end");
    }
}

#[test]
fn images_written_to_in_place() {
    let mut random = Random::new();
    for (format, options) in [
        (
            ImageFormat::Vmdk,
            "subformat=monolithicSparse,zeroed_grain=on",
        ),
        (ImageFormat::Vhd, "subformat=dynamic"),
        (ImageFormat::Vhdx, "subformat=dynamic"),
        (ImageFormat::Vdi, "static=off"),
    ] {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        let qemu = format.qemu_name();
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                qemu,
                "-o",
                options,
                str(&image),
                "33M",
            ],
        );
        let mut commands = Vec::new();
        for number in 0..40 {
            let at = random.below(32 << 11) * 512;
            let len = 512 * (1 + random.below(400));
            commands.push("-c".to_owned());
            commands.push(match random.below(4) {
                0 if format != ImageFormat::Vhd => format!("write -z {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + number),
            });
        }
        let mut args = vec!["-f", qemu];
        args.extend(commands.iter().map(String::as_str));
        args.push(str(&image));
        run("qemu-io", &args);
        compare(&image, format, &mut random);
    }
}

#[test]
fn without_the_page_cache() {
    let mut random = Random::new();
    for (format, options) in [
        (ImageFormat::Vmdk, "subformat=monolithicSparse"),
        (ImageFormat::Vmdk, "subformat=streamOptimized"),
        (ImageFormat::Vhd, "subformat=dynamic,force_size=on"),
        (ImageFormat::Vdi, "static=off"),
    ] {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let raw = content(&dir, (5 << 20) + 512, &mut random);
        let image = dir.path().join("image");
        convert(&raw, format, options, &image);
        let mut paths = DiskPaths::new(&image).open(false).unwrap();
        paths.direct = true;
        let disk = Disk(open(paths).unwrap());
        let expected = std::fs::read(&raw).unwrap();
        assert!(disk.read(0, disk.size()).unwrap() == expected, "{format}");
        assert!(
            disk.read(7, 100_001).unwrap() == expected[7..100_008],
            "{format}"
        );
    }
}
