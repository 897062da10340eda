//! Images whose metadata is damaged, or made to do harm.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::error::Error;
use std::path::{Path, PathBuf};

use common::{
    Random, assert_clean, check_file, create, exercise, open_disk, open_free, options, read, run,
    str, write,
};
use edgevmm_block::qcow2::Repair;
use edgevmm_block::{BlockBackend, DiskOptions, ImageFormat, open};
use tempfile::TempDir;

const CLUSTER: u64 = 512;
const SIZE: u64 = 1 << 20;
/// A quarter of what the thread of a disk has.
const STACK: usize = 128 << 10;
/// Where a qcow2 header says where the L1 table is, and the refcount table.
const L1_AT: u64 = 40;
const REFCOUNTS_AT: u64 = 48;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An image with the smallest clusters, to be changed byte by byte.
#[derive(Clone, Debug)]
struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Image {
    fn new(dir: &TempDir) -> Self {
        let args = ["-f", "qcow2", "-o", "cluster_size=512"];
        let path = create(dir, "image", &args, SIZE);
        run("qemu-io", &["-c", "write -P 1 0 20k", str(&path)]);
        let bytes = std::fs::read(&path).unwrap();
        Self { path, bytes }
    }

    fn number(&self, at: u64) -> u64 {
        number(&self.bytes, at)
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn put_number(&mut self, at: u64, number: u64) {
        self.put(at, &number.to_be_bytes());
    }

    fn l1(&self) -> u64 {
        self.number(L1_AT)
    }

    /// Offset of the first L2 table.
    fn l2(&self) -> u64 {
        self.number(self.l1()) & !COPIED
    }

    fn refcounts(&self) -> u64 {
        self.number(REFCOUNTS_AT)
    }

    /// Offset of the first refcount block.
    fn block(&self) -> u64 {
        self.number(self.refcounts())
    }

    /// Offset of the refcount, of 16 bits, of the cluster at `offset`.
    fn refcount_of(&self, offset: u64) -> u64 {
        self.block() + offset / CLUSTER * 2
    }

    fn store(&self) {
        std::fs::write(&self.path, &self.bytes).unwrap();
    }

    /// Asserts that a check says `what` shares its place; that a repaired image reads as before,
    /// takes writes everywhere, and is clean then.
    fn assert_mended(&self, what: &str) {
        let before = open_free(|| DiskOptions {
            read_only: true,
            ..options(&self.path, &[])
        });
        let size = before.as_ref().unwrap().size();
        let sectors = |disk: &dyn BlockBackend| -> Vec<Option<Vec<u8>>> {
            let sector = |at| {
                let mut buf = vec![0; 512];
                let bufs = [edgevmm_block::VolatileSlice::from(&mut buf[..])];
                disk.read_vectored(&bufs, at).ok()?;
                Some(buf)
            };
            (0..size / 512).map(|at| sector(at * 512)).collect()
        };
        let before = sectors(&*before.unwrap());
        let report = check_file(&self.path, Repair::No).unwrap();
        let says = |text: &String| text.contains(what) && text.contains("shares its place");
        assert!(report.messages.iter().any(says), "{what}: {report:?}");
        let repaired = check_file(&self.path, Repair::All).unwrap();
        assert!(repaired.is_clean(), "{what}: {repaired:?}");
        assert_clean(&self.path);
        let disk = open_disk(&self.path, &[]).unwrap();
        assert!(sectors(&*disk) == before, "{what}: it reads otherwise");
        // Tables taken for compressed data make no sense, which is so still.
        for (at, _) in before.iter().enumerate().filter(|(_, it)| it.is_none()) {
            write(&*disk, at as u64 * 512, &[9; 512]).unwrap();
        }
        let mut model = read(&*disk, 0, size);
        exercise(&*disk, &mut model, 100, &mut Random::new());
        drop(disk);
        // Of data that two parts of the disk had in common, the last one does not know that it is.
        let report = check_file(&self.path, Repair::No).unwrap();
        let flags = |text: &String| text.ends_with("that nothing else uses, but does not say so");
        assert!(report.messages.iter().all(flags), "{what}: {report:?}");
    }

    /// Asserts that writing to the image ends, in words that contain `says`, before it does harm;
    /// that it is marked; and that it can be read.
    fn assert_writing_ends(&self, says: &[&str]) {
        self.store();
        let disk = open_disk(&self.path, &[]).unwrap();
        let err = (0..SIZE / CLUSTER)
            .find_map(|at| write(&*disk, at * CLUSTER, &[7; CLUSTER as usize]).err())
            .expect("the damage must be found");
        let cause = err.source().unwrap().to_string();
        for word in says {
            assert!(cause.contains(word), "{cause:?} does not say {word:?}");
        }
        let again = write(&*disk, 0, &[7; CLUSTER as usize]).unwrap_err();
        assert!(again.source().unwrap().to_string().contains(says[0]));
        disk.flush().unwrap();
        assert_eq!(read(&*disk, 0, CLUSTER), [7; CLUSTER as usize]);
        drop(disk);
        let bytes = std::fs::read(&self.path).unwrap();
        assert_eq!(bytes[79] & 2, 2, "it must be marked as corrupt");
        let table = number(&bytes, REFCOUNTS_AT) as usize;
        assert_eq!(bytes[..72], self.bytes[..72]);
        assert_ne!(bytes[table..][..8], [7; 8]);
        let text = open_disk(&self.path, &[]).unwrap_err().to_string();
        assert!(text.contains("marked as corrupt"), "{text}");
        self.store();
        let read_only = open_free(|| DiskOptions {
            read_only: true,
            ..options(&self.path, &[])
        });
        assert_eq!(read(&*read_only.unwrap(), 0, 4096), [1; 4096]);
        let snapshot = open_free(|| DiskOptions {
            snapshot: true,
            ..options(&self.path, &[])
        });
        write(&*snapshot.unwrap(), 0, &[2; 4096]).unwrap();
    }
}

fn number(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(*bytes[at as usize..].first_chunk().unwrap())
}

#[test]
fn metadata_that_is_called_free() {
    let dir = TempDir::new().unwrap();
    let good = Image::new(&dir);
    for (what, offset) in [
        ("header at offset 0", 0),
        ("L1 table", good.l1()),
        ("L2 table", good.l2()),
        ("refcount table", good.refcounts()),
        ("refcount block", good.block()),
    ] {
        let mut image = good.clone();
        image.put(good.refcount_of(offset), &[0; 2]);
        image.assert_writing_ends(&[what, "counts as free space"]);
    }
}

#[test]
fn no_refcounts_of_the_first_clusters() {
    let dir = TempDir::new().unwrap();
    let mut image = Image::new(&dir);
    let table = image.refcounts();
    image.put_number(table, 0);
    // Nothing in there is ever looked for, as there are no refcounts to look at.
    image.store();
    let disk = open_disk(&image.path, &[]).unwrap();
    let mut model = read(&*disk, 0, SIZE);
    exercise(&*disk, &mut model, 200, &mut Random::new());
    drop(disk);
    run("qemu-img", &["check", "-q", "-r", "all", str(&image.path)]);
    assert!(common::as_qemu_reads(&image.path, "qcow2") == model);
}

#[test]
fn narrow_refcounts() {
    let dir = TempDir::new().unwrap();
    for bits in ["1", "2", "4", "8", "64"] {
        let option = format!("cluster_size=512,refcount_bits={bits}");
        let path = create(&dir, bits, &["-f", "qcow2", "-o", &option], SIZE);
        run("qemu-io", &["-c", "write -P 1 0 900k", str(&path)]);
        let disk = open_disk(&path, &[]).unwrap();
        write(&*disk, 0, &[2; 4096]).unwrap();
        drop(disk);
        let mut bytes = std::fs::read(&path).unwrap();
        let block = number(&bytes, number(&bytes, REFCOUNTS_AT)) as usize;
        // The last bit, or byte, of the header's refcount; one is all it has.
        bytes[block + bits.parse::<usize>().unwrap() / 9] &= 0xfe;
        bytes[block + 7] &= if bits == "64" { 0 } else { 0xff };
        std::fs::write(&path, &bytes).unwrap();
        let disk = open_disk(&path, &[]).unwrap();
        let err = (0..9).find_map(|at| write(&*disk, SIZE - (at + 1) * CLUSTER, &[3; 512]).err());
        let cause = err.unwrap().source().unwrap().to_string();
        assert!(
            cause.contains("header at offset 0 counts as free"),
            "{cause}"
        );
    }
}

#[test]
fn tables_in_the_same_place() {
    let dir = TempDir::new().unwrap();
    let good = Image::new(&dir);
    let (l1, l2, block) = (good.l1(), good.l2(), good.block());
    for (at, to, what) in [
        (good.refcounts() + 8, block, "refcount block"),
        (good.refcounts() + 8, l1, "refcount block"),
        (good.refcounts() + 8, l2, "refcount block"),
        (l1 + 8, l2 | COPIED, "L2 table"),
        (l1 + 8, good.refcounts() | COPIED, "refcount table"),
    ] {
        let mut image = good.clone();
        image.put_number(at, to);
        image.store();
        let text = open_disk(&image.path, &[]).unwrap_err().to_string();
        assert!(text.contains(what), "{text:?} does not say {what:?}");
        image.assert_mended("");
    }
}

/// The disk's L1 table is that of its snapshot, too.
#[test]
fn a_snapshot_gets_its_table_back() {
    let dir = TempDir::new().unwrap();
    let mut image = Image::new(&dir);
    run("qemu-img", &["snapshot", "-c", "s", str(&image.path)]);
    image.bytes = std::fs::read(&image.path).unwrap();
    let snapshots = image.number(64);
    image.put_number(L1_AT, image.number(snapshots));
    image.store();
    let text = open_disk(&image.path, &[]).unwrap_err().to_string();
    assert!(text.contains("its L1 table"), "{text}");
    image.assert_mended("L1 table");
    run("qemu-img", &["snapshot", "-a", "s", str(&image.path)]);
    let disk = open_disk(&image.path, &[]).unwrap();
    assert_eq!(read(&*disk, 0, 20 << 10), [1; 20 << 10]);
}

/// Whatever shares a place with metadata gets one of its own by a repair, and reads as before.
#[test]
fn what_shares_a_place_is_separated() {
    let dir = TempDir::new().unwrap();
    let mut good = Image::new(&dir);
    let (l1, l2) = (good.l1(), good.l2());
    let first = good.number(l2) & !COPIED;
    // Makes sense as a table.
    good.put(first, &[0; CLUSTER as usize]);
    for (at, to, what) in [
        // Data in tables, and compressed data.
        (l2, l1, "L1 table"),
        (l2, l2, "L2 table"),
        (l2 + 16, good.refcounts(), "refcount table"),
        (l2 + 16, good.block(), "refcount block"),
        (l2 + 8, COMPRESSED | l1, "L1 table"),
        // Tables in data, and in each other.
        (l1 + 8, first, "L2 table"),
        (l1 + 16, l1, "L1 table"),
        (l1 + 16, 0, "L2 table"),
        (REFCOUNTS_AT, l2, "L2 table"),
        (REFCOUNTS_AT, l1, "L1 table"),
    ] {
        for flags in [0, COPIED] {
            let mut image = good.clone();
            let flags = if at < 512 { 0 } else { flags };
            if to == 0 {
                // Twice the same table of the disk.
                image.put_number(at, l2 | flags);
            } else {
                image.put_number(at, to | flags);
            }
            image.store();
            image.assert_mended(what);
        }
    }
}

/// Data that is said to be where the metadata is, in one way or another.
#[test]
fn the_metadata_is_no_place_for_data() {
    let dir = TempDir::new().unwrap();
    let good = Image::new(&dir);
    for (place, what) in [
        (good.l1(), "L1 table"),
        (good.l2(), "L2 table"),
        (good.refcounts(), "refcount table"),
        (good.block(), "refcount block"),
    ] {
        for flags in [COPIED, COMPRESSED, 0] {
            let mut image = good.clone();
            image.put_number(good.l2(), flags | place);
            image.store();
            let disk = open_disk(&image.path, &[]).unwrap();
            let done = if flags == COPIED {
                write(&*disk, 0, &[7; CLUSTER as usize])
            } else {
                disk.discard(0, CLUSTER)
            };
            let cause = done.unwrap_err().source().unwrap().to_string();
            assert!(cause.contains(what), "{cause}");
            drop(disk);
            let bytes = std::fs::read(&image.path).unwrap();
            let at = place as usize;
            assert_eq!(bytes[at..at + 512], image.bytes[at..at + 512]);
        }
    }
}

/// Whatever an image's metadata says, this process neither panics nor runs away.
#[test]
fn damaged_metadata_does_no_harm() {
    let dir = TempDir::new().unwrap();
    let below = create(&dir, "below", &["-f", "raw"], SIZE);
    let mut random = Random::new();
    let rounds = std::env::var("ROUNDS").map_or(150, |rounds| rounds.parse().unwrap());
    for refcount_bits in [1, 16, 64] {
        let image = snapshotted(&dir, &below, refcount_bits);
        let good = std::fs::read(&image).unwrap();
        let mut opened = 0;
        for _ in 0..rounds / 3 {
            std::fs::write(&image, damaged(&good, &mut random)).unwrap();
            let Ok(disk) = open(DiskOptions {
                format: Some(ImageFormat::Qcow2),
                ..options(&image, &[&below])
            }) else {
                continue;
            };
            opened += 1;
            attack(&*disk, &mut random);
        }
        assert!(
            opened > rounds / 30,
            "too few images got past the checks ({opened})"
        );
    }
}

/// An image with an internal snapshot, or with as much data if its refcounts are too narrow.
fn snapshotted(dir: &TempDir, below: &Path, refcount_bits: u32) -> PathBuf {
    let layout = format!("cluster_size=512,refcount_bits={refcount_bits}");
    let name = format!("image{refcount_bits}");
    let args = ["-f", "qcow2", "-o", &layout, "-F", "raw", "-b", str(below)];
    let image = create(dir, &name, &args, SIZE);
    let writes = ["-c", "write -P 1 0 100k", "-c", "write -P 2 512k 9k"];
    run("qemu-io", &[&writes[..], &[str(&image)]].concat());
    if refcount_bits > 1 {
        run("qemu-img", &["snapshot", "-c", "s", str(&image)]);
    }
    run("qemu-io", &["-c", "write -P 3 50k 10k", str(&image)]);
    image
}

/// A copy of the image `good` with some bytes, or entries of its tables, changed.
fn damaged(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..1 + random.below(6) {
        // Headers and tables are mostly near the beginning.
        let bound = [112, 4096, 16384, good.len() as u64][random.below(4) as usize];
        let at = random.below(bound) as usize;
        if random.below(2) == 0 {
            let flags = [0, COPIED, COMPRESSED, COPIED | 1][random.below(4) as usize];
            let cluster = random.below(good.len() as u64 / CLUSTER) * CLUSTER;
            let entry = (flags | cluster).to_be_bytes();
            bytes[at & !7..][..8].copy_from_slice(&entry);
            continue;
        }
        bytes[at] = match random.below(3) {
            0 => random.below(256) as u8,
            1 => bytes[at] ^ (1 << random.below(8)),
            _ => [0, 0xff, 0x80, 1][random.below(4) as usize],
        };
    }
    bytes
}

/// Requests of every kind, whose failure is no matter.
fn attack(disk: &dyn BlockBackend, random: &mut Random) {
    let size = disk.size().min(1 << 20);
    if size < 512 {
        return;
    }
    let mut buf = vec![0; 4096 * 512];
    for _ in 0..40 {
        let (offset, len) = random.range(size);
        let bufs = [edgevmm_block::VolatileSlice::from(&mut buf[..len as usize])];
        let _ = match random.below(6) {
            0 => disk.discard(offset, len),
            1 => disk.write_zeroes(offset, len, random.below(2) == 0),
            2 => disk.flush(),
            3 => disk.read_vectored(&bufs, offset),
            _ => disk.write_vectored(&bufs, offset),
        };
    }
}

/// The deepest calls: tables and refcounts grow, clusters are decompressed and copied.
#[test]
fn a_small_stack_is_enough() {
    let dir = TempDir::new().unwrap();
    let layout = "cluster_size=512,refcount_bits=64";
    let plain = create(&dir, "plain", &["-f", "qcow2", "-o", layout], 8 * SIZE);
    run("qemu-io", &["-c", "write -P 1 0 4m", str(&plain)]);
    let below = dir.path().join("below");
    let convert = ["convert", "-c", "-O", "qcow2", str(&plain), str(&below)];
    run("qemu-img", &convert);
    let args = [
        "-f",
        "qcow2",
        "-o",
        layout,
        "-F",
        "qcow2",
        "-b",
        str(&below),
    ];
    let image = create(&dir, "image", &args, 8 * SIZE);
    let before = std::fs::read(&image).unwrap();
    let disk = open_disk(&image, &[&below]).unwrap();
    let mut model = read(&*disk, 0, 8 * SIZE);
    std::thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || {
            let mut random = Random::new();
            exercise(&*disk, &mut model, 500, &mut random);
        })
        .unwrap()
        .join()
        .unwrap();
    assert_clean(&image);
    let bytes = std::fs::read(&image).unwrap();
    assert_ne!(bytes[48..60], before[48..60], "no new refcount table");
}
