//! What is told of images, against what QEMU's own tools tell.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{MIB, SIZE, allocated, in_dir, qemu_img, qemu_io, sample, sources, str};
use edgevmm_block::DiskPaths;
use edgevmm_block::qcow2::Repair;
use edgevmm_image::{Job, MapRange, check, info, map, snapshots};
use serde_json::Value;

fn ranges(paths: &DiskPaths) -> Vec<MapRange> {
    let mut ranges = Vec::new();
    map(paths, &Job::unattended(), |range| {
        ranges.push(*range);
        Ok(())
    })
    .unwrap();
    ranges
}

/// For each sector: whether it is data, and where, as far as a map tells.
fn sectors(ranges: &Value) -> Vec<(bool, Option<u64>)> {
    let number = |range: &Value, key: &str| range[key].as_u64();
    let ranges = ranges.as_array().unwrap().iter();
    ranges
        .flat_map(|range| {
            let data = range["data"].as_bool().unwrap();
            let offset = number(range, "offset").filter(|_| data);
            let count = number(range, "length").unwrap() / 512;
            (0..count).map(move |at| (data, offset.map(|offset| offset + at * 512)))
        })
        .collect()
}

/// Every sector is where QEMU has it, but for holes in the files of images, where QEMU does not look.
#[test]
fn maps_are_those_of_qemu() {
    in_dir(|dir| {
        let raw = dir.join("raw");
        sample(&raw);
        let bytes = fs::read(&raw).unwrap();
        for source in sources(&dir, &raw) {
            let ours = ranges(&source.paths);
            let end = ours.iter().fold(0, |at, range| {
                assert_eq!(range.start, at, "{}", source.name);
                at + range.length
            });
            assert_eq!(end, SIZE, "{}", source.name);
            let is_qcow2 = source
                .paths
                .path
                .extension()
                .is_some_and(|it| it == "qcow2");
            if source.paths.internal_snapshot.is_some() || !(is_qcow2 || source.name == "raw") {
                continue;
            }
            let theirs = qemu_img(&["map", "--output=json", str(&source.paths.path)]);
            let theirs = sectors(&serde_json::from_str(&theirs).unwrap());
            let ours = sectors(&serde_json::to_value(ours).unwrap());
            assert_eq!(theirs.len(), ours.len(), "{}", source.name);
            let content = bytes.chunks(512);
            for (at, ((theirs, ours), content)) in theirs.iter().zip(&ours).zip(content).enumerate()
            {
                let hole = !ours.0 && content.iter().all(|byte| *byte == 0);
                assert!(
                    theirs == ours || hole,
                    "{}: sector {at} is {theirs:?} for QEMU and {ours:?} for us",
                    source.name
                );
            }
        }
    });
}

#[test]
fn images_are_described_as_by_qemu() {
    in_dir(|dir| {
        let raw = dir.join("raw");
        sample(&raw);
        for source in sources(&dir, &raw) {
            let told = info(&source.paths).unwrap();
            if source.name == "ova" {
                assert_eq!((told.format.as_str(), told.virtual_size), ("ova", SIZE));
                continue;
            }
            let theirs = qemu_img(&["info", "--output=json", str(&source.paths.path)]);
            let theirs: Value = serde_json::from_str(&theirs).unwrap();
            assert_eq!(theirs["virtual-size"].as_u64(), Some(told.virtual_size));
            assert_eq!(allocated(&source.paths.path), told.host_size);
            let format = theirs["format"].as_str().unwrap().replace("vpc", "vhd");
            assert_eq!(told.format.to_lowercase(), format, "{}", source.name);
            assert_eq!(told.chain.len(), source.paths.backing.len());
            let backing = told.backing.map(|it| it.name);
            assert_eq!(theirs["backing-filename"].as_str(), backing.as_deref());
            let Some(own) = told.qcow2 else { continue };
            assert_eq!(theirs["cluster-size"].as_u64(), Some(own.cluster_size));
            let data = &theirs["format-specific"]["data"];
            let compat = if own.version == 2 { "0.10" } else { "1.1" };
            assert_eq!(data["compat"], compat);
            assert_eq!(data["compression-type"], own.compression);
            assert_eq!(data["refcount-bits"], own.refcount_bits);
            let flag = |key: &str| data[key].as_bool().unwrap_or(false);
            assert_eq!(flag("extended-l2"), own.extended_l2);
            assert_eq!(flag("lazy-refcounts"), own.lazy_refcounts);
            assert_eq!(flag("corrupt"), own.corrupt);
            let file = own.data_file.and_then(|file| file.name);
            assert_eq!(data["data-file"].as_str(), file.as_deref());
        }
    });
}

#[test]
fn internal_snapshots_are_listed() {
    in_dir(|dir| {
        let path = dir.join("image");
        qemu_img(&["create", "-q", "-f", "qcow2", str(&path), "5M"]);
        assert!(snapshots(&DiskPaths::new(&path)).unwrap().is_empty());
        for name in ["first", "second one"] {
            qemu_img(&["snapshot", "-c", name, str(&path)]);
        }
        qemu_img(&["resize", "-q", str(&path), "6M"]);
        let listed = snapshots(&DiskPaths::new(&path)).unwrap();
        let names: Vec<_> = listed
            .iter()
            .map(|it| (it.id.as_str(), it.name.as_str()))
            .collect();
        assert_eq!(names, [("1", "first"), ("2", "second one")]);
        assert!(
            listed
                .iter()
                .all(|it| it.virtual_size == 5 * MIB && it.taken > 1_600_000_000)
        );
    });
}

fn checked(path: &Path, repair: Repair) -> edgevmm_image::Checked {
    check(&DiskPaths::new(path), repair, &Job::unattended()).unwrap()
}

#[test]
fn sound_images_of_all_formats_are_found_sound() {
    in_dir(|dir| {
        let raw = dir.join("raw");
        sample(&raw);
        for source in sources(&dir, &raw) {
            let found = check(&source.paths, Repair::No, &Job::unattended()).unwrap();
            assert!(
                !found.is_damaged() && !found.has_leaks(),
                "{}: {found:?}",
                source.name
            );
        }
    });
}

#[test]
fn damage_is_found_and_mended() {
    in_dir(|dir| {
        let [raw, image] = ["raw", "image"].map(|it| dir.join(it));
        sample(&raw);
        qemu_img(&[
            "convert",
            "-q",
            "-f",
            "raw",
            "-O",
            "qcow2",
            str(&raw),
            str(&image),
        ]);
        // The refcount of the header's cluster, by way of the refcount table.
        let bytes = fs::read(&image).unwrap();
        let number = |at: usize| {
            usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
        };
        let block = number(number(48));
        let mut damaged = bytes.clone();
        damaged[block + 2 * 20..][..2].copy_from_slice(&[0, 0]);
        fs::write(&image, &damaged).unwrap();
        let found = checked(&image, Repair::No);
        assert!(
            found.is_damaged() && !found.messages.is_empty(),
            "{found:?}"
        );
        let mended = checked(&image, Repair::All);
        assert!(
            !mended.is_damaged() && mended.corruptions_fixed > 0,
            "{mended:?}"
        );
        qemu_img(&["check", "-q", str(&image)]);
        qemu_img(&["compare", "-q", "-f", "raw", str(&raw), str(&image)]);

        let mut leaky = bytes;
        let end = leaky.len() / 65536;
        leaky[block + 2 * end..][..2].copy_from_slice(&[0, 1]);
        leaky.extend([0; 65536]);
        fs::write(&image, &leaky).unwrap();
        let found = checked(&image, Repair::No);
        assert_eq!((found.is_damaged(), found.leaks), (false, 1), "{found:?}");
        let mended = checked(&image, Repair::Leaks);
        assert_eq!((mended.has_leaks(), mended.leaks_fixed), (false, 1));
        qemu_img(&["check", "-q", str(&image)]);
    });
}

#[test]
fn only_what_is_there_is_mended() {
    in_dir(|dir| {
        let path = dir.join("image");
        qemu_img(&["create", "-q", "-f", "vmdk", str(&path), "5M"]);
        qemu_io(&path, "vmdk", &["write -q 1M 1M"]);
        let refused = check(&DiskPaths::new(&path), Repair::All, &Job::unattended());
        assert!(refused.unwrap_err().to_string().contains("can't be mended"));
        // A grain table's entry that points past the end of the file.
        let mut bytes = fs::read(&path).unwrap();
        let directory =
            usize::try_from(u64::from_le_bytes(bytes[56..64].try_into().unwrap())).unwrap() * 512;
        let table = usize::try_from(u32::from_le_bytes(
            bytes[directory..][..4].try_into().unwrap(),
        ))
        .unwrap()
            * 512;
        let grain = 1024 / 64;
        bytes[table + grain * 4..][..4].copy_from_slice(&0x00ff_ffff_u32.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let found = checked(&path, Repair::No);
        assert!(found.is_damaged(), "{found:?}");
    });
}
