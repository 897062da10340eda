//! What is left of an image when the process dies between two flushes.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Random, as_qemu_reads, create, open_disk, run, str};
use edgevmm_block::{BlockBackend, VolatileSlice};
use tempfile::TempDir;

const SIZE: u64 = 24 << 20;

/// Writes, frees and flushes at random; returns the bytes at the last flush, and for each sector
/// whether it has changed since.
fn work(disk: &dyn BlockBackend, model: &mut [u8], random: &mut Random) -> Vec<bool> {
    let mut changed = vec![false; model.len() / 512];
    for _ in 0..20 + random.below(60) {
        let (offset, len) = random.range(SIZE);
        let sectors = (offset / 512) as usize..((offset + len) / 512) as usize;
        match random.below(8) {
            0 => {
                disk.flush().unwrap();
                changed.fill(false);
                continue;
            }
            1 => disk.write_zeroes(offset, len, true).unwrap(),
            _ => {
                let mut data = vec![random.below(256) as u8; len as usize];
                disk.write_vectored(&[VolatileSlice::from(&mut data[..])], offset)
                    .unwrap();
            }
        }
        let buf = &mut model[offset as usize..(offset + len) as usize];
        disk.read_vectored(&[VolatileSlice::from(buf)], offset)
            .unwrap();
        changed[sectors].fill(true);
    }
    changed
}

/// Asserts that QEMU finds nothing worse than clusters nobody uses, and gives those back.
fn assert_no_corruption(image: &Path) {
    let output = Command::new("qemu-img")
        .args(["check", "-r", "leaks", "-f", "qcow2", str(image)])
        .output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

#[test]
fn a_killed_process_leaves_no_corruption() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    for (index, shape) in [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=64k",
        "compat=0.10",
    ]
    .into_iter()
    .cycle()
    .take(4)
    .enumerate()
    {
        println!("{shape}");
        let image = create(
            &dir,
            &format!("a{index}"),
            &["-f", "qcow2", "-o", shape],
            SIZE,
        );
        if index < 2 {
            run(
                "qemu-io",
                &["-c", "write -P 1 3m 5m", "-c", "discard 4m 1m", str(&image)],
            );
        }
        let mut model = as_qemu_reads(&image, "qcow2");
        let disk = open_disk(&image, &[]).unwrap();
        let changed = work(&*disk, &mut model, &mut random);
        // What the disk keeps in memory is lost; what it has written is in the file.
        let copy = image.with_extension("copy");
        std::fs::copy(&image, &copy).unwrap();
        drop(disk);
        drop(open_disk(&copy, &[]).expect("the next start must find a usable image"));
        assert_no_corruption(&copy);
        let left = as_qemu_reads(&copy, "qcow2");
        for (sector, _) in changed.iter().enumerate().filter(|(_, changed)| !**changed) {
            let bytes = sector * 512..(sector + 1) * 512;
            assert!(
                left[bytes.clone()] == model[bytes],
                "sector {sector} was flushed and is lost"
            );
        }
        std::fs::remove_file(image).unwrap();
        std::fs::remove_file(copy).unwrap();
    }
}

/// Several threads write to, free and flush the image named in `IMAGE` until somebody kills them.
#[test]
#[ignore = "runs in a process of its own, for the test below"]
fn writer_to_be_killed() {
    let image = std::env::var("IMAGE").unwrap();
    let disk = open_disk(Path::new(&image), &[]).unwrap();
    println!("ready");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let (disk, mut random) = (&*disk, Random::new());
            scope.spawn(move || {
                let mut data = vec![0x77; 4096 * 512];
                loop {
                    let (offset, len) = random.range(SIZE);
                    let bufs = [VolatileSlice::from(&mut data[..len as usize])];
                    match random.below(16) {
                        0 => disk.flush().unwrap(),
                        1 => disk.discard(offset, len).unwrap(),
                        _ => disk.write_vectored(&bufs, offset).unwrap(),
                    }
                }
            });
        }
    });
}

#[test]
fn threads_that_are_killed_leave_no_corruption() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    for shape in [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=64k",
        "compat=0.10",
    ] {
        println!("{shape}");
        let image = create(&dir, "image", &["-f", "qcow2", "-o", shape], SIZE);
        for _ in 0..2 {
            let mut writer = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "writer_to_be_killed", "--ignored", "--nocapture"])
                .env("IMAGE", &image)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut output = BufReader::new(writer.stdout.take().unwrap()).lines();
            assert!(output.any(|line| line.unwrap().contains("ready")));
            std::thread::sleep(Duration::from_millis(random.below(60)));
            writer.kill().unwrap();
            writer.wait().unwrap();
            // The next start, without a repair in between, must go well too.
            drop(open_disk(&image, &[]).unwrap());
        }
        assert_no_corruption(&image);
    }
}
