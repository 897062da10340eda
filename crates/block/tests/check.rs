//! Checks and repairs, compared with those of `qemu-img check`.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Random, as_qemu_reads, assert_clean, check_file, create, open_disk, run, str};
use edgevmm_block::qcow2::{CheckReport, Repair};
use tempfile::TempDir;

const SIZE: u64 = 4 << 20;
const COPIED: u64 = 1 << 63;

/// What `qemu-img check` finds: corruptions and leaks. None if it gives up.
fn as_qemu_finds(image: &Path) -> Option<(u64, u64)> {
    let args = ["check", "-U", "-f", "qcow2", "--output=json", str(image)];
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |key: &str| {
        let rest = text.split_once(&format!("\"{key}\": "))?.1;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse::<u64>().ok()
    };
    // Errors of the check itself.
    if number("check-errors")? > 0 {
        return None;
    }
    Some((
        number("corruptions").unwrap_or(0),
        number("leaks").unwrap_or(0),
    ))
}

/// An image with some of everything, as large as it gets in a moment.
fn image(dir: &TempDir, name: &str, options: &str, random: &mut Random) -> PathBuf {
    let args = ["-f", "qcow2", "-o", options];
    let image = create(dir, name, &args, SIZE);
    let old = options.contains("0.10");
    // Narrow refcounts allow no snapshots.
    let snapshots = !options.contains("refcount_bits=1");
    for round in 0..3 {
        let mut commands: Vec<String> = Vec::new();
        if round == 0 {
            commands.push("write -c -P 3 2m 1m".into());
        }
        commands.extend((0..6).map(|_| {
            let (offset, len) = random.range(SIZE);
            let what = match random.below(4) {
                0 if !old => "write -z",
                1 => "discard",
                _ => "write -P 7",
            };
            format!("{what} {offset} {len}")
        }));
        let mut args: Vec<&str> = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(str(&image));
        run("qemu-io", &args);
        if snapshots && round < 2 {
            run(
                "qemu-img",
                &["snapshot", "-c", &format!("s{round}"), str(&image)],
            );
        }
    }
    image
}

const SHAPES: [&str; 8] = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "compat=0.10,cluster_size=1k",
    "cluster_size=4k,refcount_bits=32,compression_type=zstd",
];

#[test]
fn good_images_are_clean() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    for shape in SHAPES {
        let image = image(&dir, "image", shape, &mut random);
        let before = std::fs::read(&image).unwrap();
        for repair in [Repair::No, Repair::Leaks, Repair::All] {
            let report = check_file(&image, repair).unwrap();
            assert!(
                report.is_clean() && report.corruptions == 0,
                "{shape}: {report:?}"
            );
            assert!(std::fs::read(&image).unwrap() == before, "{shape}");
        }
        let report = check_file(&image, Repair::No).unwrap();
        let text = run("qemu-img", &["check", "--output=json", str(&image)]);
        for (key, value) in [
            ("image-end-offset", report.image_end),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
        ] {
            let wanted = format!("\"{key}\": {value}");
            let absent = value == 0 && !text.contains(key);
            let same = |line: &str| line.trim().trim_end_matches(',') == wanted;
            assert!(
                absent || text.lines().any(same),
                "{shape}: no {wanted} in {text}"
            );
        }
    }
}

/// Where the tables of an image are.
struct Map {
    header: u64,
    places: Vec<(u64, u64)>,
}

fn number(bytes: &[u8], at: u64) -> u64 {
    bytes[at as usize..]
        .first_chunk()
        .map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

fn map(bytes: &[u8]) -> Map {
    let cluster = 1 << number(bytes, 16).to_be_bytes()[7];
    let (l1, table) = (number(bytes, 40), number(bytes, 48));
    let l1_len = (number(bytes, 32) & 0xffff_ffff) * 8;
    let mut places = vec![(l1, l1_len), (table, 64)];
    let targets = |start: u64, len: u64| {
        (0..len / 8)
            .map(move |index| number(bytes, start + index * 8) & !COPIED)
            .filter(|offset| *offset != 0)
    };
    places.extend(targets(l1, l1_len).map(|offset| (offset, cluster)));
    places.extend(targets(table, 64).map(|offset| (offset, cluster)));
    Map {
        header: cluster,
        places,
    }
}

/// Changes an entry of some table.
fn damage(bytes: &mut [u8], random: &mut Random) {
    let map = map(bytes);
    let (start, len) = map.places[random.below(map.places.len() as u64) as usize];
    let at = (start + random.below(len / 8) * 8) as usize;
    let Some(entry) = bytes.get(at..at + 8) else {
        return;
    };
    let old = number(entry, 0);
    let clusters = bytes.len() as u64 / map.header;
    let new = match random.below(7) {
        0 => 0,
        1 => old ^ COPIED,
        2 => old ^ (1 << random.below(64)),
        3 => COPIED | (random.below(clusters) * map.header),
        4 => random.below(clusters) * map.header,
        5 => (clusters + random.below(5)) * map.header,
        _ => old ^ (0x1_0001 << random.below(16)),
    };
    bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
}

/// Whether all tables could be looked at. QEMU looks at those too that begin where no cluster does,
/// and not at refcount blocks whose entries have reserved bits set, nor at compressed data with
/// subclusters.
fn tables_are_found(report: &CheckReport) -> bool {
    let lost = |text: &String| {
        text.contains("where no cluster begins")
            || text.starts_with("The L2 table at")
            || text.contains("of the refcount table has reserved bits")
            || text.ends_with("tells of subclusters of compressed data")
    };
    report.messages.len() < 90 && !report.messages.iter().any(lost)
}

/// How many leaks are behind the end of the file, where QEMU does not look.
fn behind_the_end(report: &CheckReport, bytes: &[u8]) -> u64 {
    let clusters = (bytes.len() as u64).div_ceil(map(bytes).header);
    let behind = |text: &&String| {
        let number = text
            .strip_prefix("Cluster ")
            .and_then(|rest| rest.split(' ').next());
        text.contains("space is lost")
            && number.is_some_and(|it| it.parse::<u64>().unwrap() >= clusters)
    };
    report.messages.iter().filter(behind).count() as u64
}

/// Both find the same, and what is mended is so for both.
#[test]
fn damage_is_found_and_mended_as_by_qemu() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    let rounds = std::env::var("ROUNDS").map_or(32, |rounds| rounds.parse().unwrap());
    let (mut found, mut mended) = (0, 0);
    for shape in SHAPES {
        let image = image(&dir, "image", shape, &mut random);
        let good = std::fs::read(&image).unwrap();
        for round in 0..rounds / SHAPES.len() {
            let mut bytes = good.clone();
            for _ in 0..=random.below(3) {
                damage(&mut bytes, &mut random);
            }
            std::fs::write(&image, &bytes).unwrap();
            let report = check_file(&image, Repair::No).unwrap();
            assert!(
                std::fs::read(&image).unwrap() == bytes,
                "a check has changed the image"
            );
            let Some((corruptions, leaks)) = as_qemu_finds(&image) else {
                continue;
            };
            let says =
                format!("{shape}, round {round}: {report:?}, QEMU finds {corruptions}, {leaks}");
            assert_eq!(report.corruptions > 0, corruptions > 0, "{says}");
            if tables_are_found(&report) {
                let behind = behind_the_end(&report, &bytes);
                assert_eq!(report.leaks - behind, leaks, "{says}");
            }
            found += u64::from(corruptions > 0);

            let report = check_file(&image, Repair::All).unwrap();
            if report.is_clean() {
                assert_clean(&image);
                mended += u64::from(corruptions > 0);
                // It can be used.
                drop(open_disk(&image, &[]).unwrap());
            }
            let again = check_file(&image, Repair::No).unwrap();
            let left = report.corruptions - report.corruptions_fixed;
            // Where a refcount can't be as high as it should be, nothing is right.
            if !shape.contains("refcount_bits=1") {
                let says = format!("{says}, then {report:?}, {again:?}");
                assert_eq!(again.corruptions, left, "{says}");
            }
            let no_room = |text: &String| text.starts_with("There is no room for new refcounts");
            if tables_are_found(&again) && !report.messages.iter().any(no_room) {
                assert_eq!(again.leaks, 0, "{says}, then {report:?}, {again:?}");
            }
        }
    }
    println!("{found} images were damaged, {mended} of them could be mended");
    assert!(found > rounds as u64 / 3 && mended > 0);
}

#[test]
fn leaks_alone() {
    let dir = TempDir::new().unwrap();
    let image = image(&dir, "image", "cluster_size=64k", &mut Random::new());
    let mut bytes = std::fs::read(&image).unwrap();
    let block = number(&bytes, number(&bytes, 48));
    // Clusters that are free, and one that is in use.
    let len = bytes.len() / 65536 * 2 + 20;
    for at in [len, len + 2, 0] {
        bytes[block as usize + at + 1] += 1;
    }
    std::fs::write(&image, &bytes).unwrap();
    let model = as_qemu_reads(&image, "qcow2");
    let report = check_file(&image, Repair::No).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 3));
    let report = check_file(&image, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (3, 3));
    assert_clean(&image);
    assert!(as_qemu_reads(&image, "qcow2") == model);
}

/// Refcounts that are wrong all over: those of an image that was not closed.
#[test]
fn refcounts_are_built_anew() {
    let dir = TempDir::new().unwrap();
    let mut random = Random::new();
    for shape in SHAPES {
        let image = image(&dir, "image", shape, &mut random);
        let mut bytes = std::fs::read(&image).unwrap();
        let model = as_qemu_reads(&image, "qcow2");
        let table = number(&bytes, 48);
        let entry = number(&bytes, table);
        for damage in 0..4 {
            match damage {
                // The block is free itself, or not there, or somewhere else, or outside.
                0 => bytes[entry as usize..][..512].fill(0),
                1 => bytes[table as usize..][..8].fill(0),
                2 => bytes[table as usize..][..8]
                    .copy_from_slice(&number(&[0, 0, 0, 0, 0, 0, 0, 0], 0).to_be_bytes()),
                _ => bytes[48..56].copy_from_slice(&(1u64 << 40).to_be_bytes()),
            }
            std::fs::write(&image, &bytes).unwrap();
            assert!(check_file(&image, Repair::No).unwrap().corruptions > 0);
            let report = check_file(&image, Repair::All).unwrap();
            assert!(report.is_clean(), "{shape}, {damage}: {report:?}");
            assert_clean(&image);
            assert!(as_qemu_reads(&image, "qcow2") == model, "{shape}");
        }
    }
}

#[test]
fn images_that_were_not_closed_are_mended_when_opened() {
    let dir = TempDir::new().unwrap();
    let image = image(
        &dir,
        "image",
        "cluster_size=4k,lazy_refcounts=on",
        &mut Random::new(),
    );
    let model = as_qemu_reads(&image, "qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let block = number(&bytes, number(&bytes, 48)) as usize;
    bytes[79] |= 1;
    // Too low, and too high.
    bytes[block + 41] = 0;
    bytes[block + 43] = 9;
    std::fs::write(&image, &bytes).unwrap();
    drop(open_disk(&image, &[]).unwrap());
    assert_eq!(std::fs::read(&image).unwrap()[79] & 1, 0);
    assert_clean(&image);
    assert!(as_qemu_reads(&image, "qcow2") == model);
}
