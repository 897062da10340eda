//! Overlays, and what happens to them and their bases, against QEMU's own tools.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::{self, FileTimes, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::{
    MIB, SIZE, allocated, convert, expect_same, in_dir, names, qemu_img, qemu_io, sample, sources,
    str, target,
};
use edgevmm_block::{BlockError, DiskOptions, DiskPaths, Existing};
use edgevmm_image::{
    Afterwards, ImageError, Job, NewSize, TargetFormat, commit, compact, compare, create_overlay,
    info, rebase, record_base, resize,
};

/// Writes that an overlay gets: over data, over zeroes, in parts of clusters, zeroes and at the end.
const WRITES: [&str; 6] = [
    "write -q -P 0x11 100k 3k",
    "write -q -P 0x22 3M 200k",
    "write -q -P 0x33 7M 64k",
    "write -q -z 0 64k",
    "write -q -z 5M 1k",
    "discard -q 2M 128k",
];

fn over(overlay: &Path, base: &Path) -> DiskPaths {
    DiskPaths {
        backing: vec![base.to_owned()],
        ..DiskPaths::new(overlay)
    }
}

fn overlay(base: &DiskPaths, path: &Path) {
    create_overlay(base, path, None, Existing::Keep).unwrap();
}

/// What a disk reads as, as a raw image.
fn flat(disk: &DiskPaths, path: &Path) -> PathBuf {
    convert(disk, &target(path, TargetFormat::Raw)).unwrap();
    path.to_owned()
}

fn expect_same_content(one: &DiskPaths, other: &Path) {
    let same = compare(one, &DiskPaths::new(other), &Job::unattended()).unwrap();
    assert_eq!(same.first_difference, None);
}

/// A sample, an overlay over it with writes, and what the two read as, in `dir`.
fn written_overlay(dir: &Path, format: &str) -> [PathBuf; 3] {
    let [raw, base, top, flat_file] = ["raw", "base", "top.qcow2", "flat"].map(|it| dir.join(it));
    sample(&raw);
    qemu_img(&[
        "convert",
        "-q",
        "-f",
        "raw",
        "-O",
        format,
        str(&raw),
        str(&base),
    ]);
    overlay(&DiskPaths::new(&base), &top);
    qemu_io(&top, "qcow2", &WRITES);
    let flat_file = flat(&over(&top, &base), &flat_file);
    qemu_img(&["compare", "-q", "-F", "raw", str(&top), str(&flat_file)]);
    [base, top, flat_file]
}

#[test]
fn an_overlay_reads_as_its_base_of_any_format() {
    in_dir(|dir| {
        let (raw, path) = (dir.join("raw"), dir.join("overlay"));
        sample(&raw);
        for source in sources(&dir, &raw) {
            if source.paths.internal_snapshot.is_some() {
                continue;
            }
            overlay(&source.paths, &path);
            // Of other formats QEMU reads the files that the overlay names by itself.
            if source.paths.data_files.is_empty() && source.name != "ova" {
                qemu_img(&["compare", "-q", "-F", "raw", str(&path), str(&raw)]);
                qemu_img(&["check", "-q", str(&path)]);
            }
            let mut pair = over(&path, &source.paths.path);
            pair.backing.extend(source.paths.backing.iter().cloned());
            if source.name != "data file" {
                expect_same_content(&pair, &raw);
            }
            let told = info(&DiskPaths::new(&path)).unwrap();
            assert!(told.backing.unwrap().checked, "{}", source.name);
            assert_eq!(told.virtual_size, SIZE);
            fs::remove_file(&path).unwrap();
        }
    });
}

#[test]
fn an_overlay_names_its_base_so_that_both_can_be_moved() {
    in_dir(|dir| {
        let deep = dir.join("deep");
        fs::create_dir(&deep).unwrap();
        let base = deep.join("base.raw");
        sample(&base);
        for (path, name) in [
            (dir.join("above"), "deep/base.raw"),
            (deep.join("beside"), "base.raw"),
        ] {
            overlay(&DiskPaths::new(&base), &path);
            let told = info(&DiskPaths::new(&path)).unwrap().backing.unwrap();
            assert_eq!(told.name, name);
        }
        let elsewhere = tempfile::tempdir().unwrap();
        let path = elsewhere.path().join("overlay");
        overlay(&DiskPaths::new(&base), &path);
        let told = info(&DiskPaths::new(&path)).unwrap().backing.unwrap().name;
        assert_eq!(Path::new(&told), base.canonicalize().unwrap());
    });
}

#[test]
fn an_overlay_may_be_larger_but_not_smaller_than_its_base() {
    in_dir(|dir| {
        let (base, path) = (dir.join("base"), dir.join("overlay"));
        sample(&base);
        let disk = DiskPaths::new(&base);
        create_overlay(&disk, &path, Some(20 * MIB), Existing::Keep).unwrap();
        qemu_io(
            &path,
            "qcow2",
            &["read -q -P 0 9M 11M", "write -q -P 5 19M 1M"],
        );
        expect_same_content(
            &over(&path, &base),
            &flat(&over(&path, &base), &dir.join("flat")),
        );
        let refused = create_overlay(&disk, &path, Some(MIB), Existing::Replace).unwrap_err();
        assert!(
            refused.to_string().contains("can't be over a base of"),
            "{refused}"
        );
        assert_eq!(info(&DiskPaths::new(&path)).unwrap().virtual_size, 20 * MIB);
    });
}

/// Expects the pair to be refused, whoever wants it.
fn expect_refused(top: &Path, base: &Path, part: &str) {
    let pair = over(top, base);
    for writable in [false, true] {
        let refused = edgevmm_block::open(pair.open(writable).unwrap()).unwrap_err();
        assert!(
            matches!(refused, BlockError::BaseChanged { .. }),
            "{refused}"
        );
        assert!(refused.to_string().contains(part), "{refused}");
    }
    let told = info(&pair).unwrap().backing.unwrap().problem.unwrap();
    assert!(told.contains(part), "{told}");
    let base = DiskPaths::new(base);
    commit(top, &base, Afterwards::Empty, &Job::unattended()).unwrap_err();
    rebase(top, &base, None, &Job::unattended()).unwrap_err();
}

fn expect_accepted(top: &Path, base: &Path) {
    edgevmm_block::open(over(top, base).open(true).unwrap()).unwrap();
    assert_eq!(
        info(&over(top, base)).unwrap().backing.unwrap().problem,
        None
    );
}

#[test]
fn a_base_that_changed_is_refused() {
    in_dir(|dir| {
        let [base, top, _] = written_overlay(&dir, "qcow2");
        expect_accepted(&top, &base);

        // Touched, copied, moved: the same content.
        let file = OpenOptions::new().write(true).open(&base).unwrap();
        let ago = SystemTime::now() - Duration::from_secs(1000);
        file.set_times(FileTimes::new().set_modified(ago)).unwrap();
        expect_accepted(&top, &base);
        let copy = dir.join("copy");
        fs::copy(&base, &copy).unwrap();
        let direct = DiskOptions {
            direct: true,
            ..over(&top, &copy).open(false).unwrap()
        };
        edgevmm_block::open(direct).unwrap();
        let before = fs::read(&top).unwrap();
        expect_accepted(&top, &copy);
        // Which is noted, so that the next time nothing has to be read.
        let noted = fs::read(&top).unwrap();
        assert!(noted != before);
        expect_accepted(&top, &copy);
        assert!(fs::read(&top).unwrap() == noted);
        expect_accepted(&top, &base);

        // A small write into data that is there already.
        qemu_io(&copy, "qcow2", &["write -q -P 0x66 700k 512"]);
        expect_refused(&top, &copy, "another content");
        expect_accepted(&top, &base);

        // Known to be all the same.
        record_base(&top, Some(&DiskPaths::new(&copy))).unwrap();
        expect_accepted(&top, &copy);
        expect_refused(&top, &base, "another content");
        qemu_img(&["check", "-q", str(&top)]);
    });
}

#[test]
fn what_lies_below_the_base_counts_too() {
    in_dir(|dir| {
        let [base, middle, _] = written_overlay(&dir, "raw");
        let top = dir.join("second");
        overlay(&over(&middle, &base), &top);
        let chain = DiskPaths {
            backing: vec![middle.clone(), base.clone()],
            ..DiskPaths::new(&top)
        };
        edgevmm_block::open(chain.open(false).unwrap()).unwrap();
        // The middle one takes its base for unchanged.
        qemu_io(&base, "raw", &["write -q -P 0x66 700k 512"]);
        record_base(&middle, Some(&DiskPaths::new(&base))).unwrap();
        let refused = edgevmm_block::open(chain.open(false).unwrap()).unwrap_err();
        assert!(
            matches!(refused, BlockError::BaseChanged { .. }),
            "{refused}"
        );
    });
}

#[test]
fn a_commit_moves_everything_into_the_base() {
    for format in ["raw", "qcow2"] {
        for afterwards in [Afterwards::Empty, Afterwards::Delete] {
            in_dir(|dir| {
                let [base, top, flat_file] = written_overlay(&dir, format);
                let below = DiskPaths::new(&base);
                commit(&top, &below, afterwards, &Job::unattended()).unwrap();
                expect_same(&flat_file, &base, format);
                if afterwards == Afterwards::Delete {
                    assert!(!top.exists());
                    return;
                }
                expect_accepted(&top, &base);
                expect_same_content(&over(&top, &base), &flat_file);
                assert!(allocated(&top) < MIB / 2, "{}", allocated(&top));
                // And once more.
                qemu_io(&top, "qcow2", &["write -q -P 0x44 6M 1M"]);
                commit(&top, &below, afterwards, &Job::unattended()).unwrap();
                qemu_io(&base, format, &["read -q -P 0x44 6M 1M"]);
            });
        }
    }
}

#[test]
fn a_commit_makes_a_smaller_base_larger() {
    for format in ["raw", "qcow2"] {
        in_dir(|dir| {
            let [raw, base, top] = ["raw", "base", "top"].map(|it| dir.join(it));
            sample(&raw);
            qemu_img(&[
                "convert",
                "-q",
                "-f",
                "raw",
                "-O",
                format,
                str(&raw),
                str(&base),
            ]);
            let below = DiskPaths::new(&base);
            create_overlay(&below, &top, Some(30 * MIB), Existing::Keep).unwrap();
            qemu_io(&top, "qcow2", &["write -q -P 9 29M 1M"]);
            let flat_file = flat(&over(&top, &base), &dir.join("flat"));
            commit(&top, &below, Afterwards::Empty, &Job::unattended()).unwrap();
            expect_same(&flat_file, &base, format);
            expect_accepted(&top, &base);
        });
    }
}

#[test]
fn a_commit_into_what_is_only_read_is_refused() {
    in_dir(|dir| {
        let [base, top, flat_file] = written_overlay(&dir, "vmdk");
        let refused = commit(
            &top,
            &DiskPaths::new(&base),
            Afterwards::Empty,
            &Job::unattended(),
        );
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("which is only read"), "{refused}");
        expect_same_content(&over(&top, &base), &flat_file);
    });
}

#[test]
fn a_rebase_keeps_the_content() {
    for (from, onto) in [("raw", "qcow2"), ("qcow2", "raw"), ("vmdk", "qcow2")] {
        in_dir(|dir| {
            let [base, top, flat_file] = written_overlay(&dir, from);
            // Another base: shorter, with other data and zeroes where there was data.
            let (raw, new) = (dir.join("other.raw"), dir.join("new"));
            fs::copy(dir.join("raw"), &raw).unwrap();
            let file = OpenOptions::new().write(true).open(&raw).unwrap();
            file.set_len(5 * MIB).unwrap();
            qemu_io(
                &raw,
                "raw",
                &[
                    "write -q -P 0x88 90k 200k",
                    "write -q -z 700k 5k",
                    "write -q -P 0x99 4500k 3k",
                ],
            );
            qemu_img(&[
                "convert",
                "-q",
                "-f",
                "raw",
                "-O",
                onto,
                str(&raw),
                str(&new),
            ]);
            let (old, onto) = (DiskPaths::new(&base), DiskPaths::new(&new));
            rebase(&top, &old, Some(&onto), &Job::unattended()).unwrap();
            expect_accepted(&top, &new);
            expect_same_content(&over(&top, &new), &flat_file);
            qemu_img(&["compare", "-q", "-F", "raw", str(&top), str(&flat_file)]);
            qemu_img(&["check", "-q", str(&top)]);
            // What both bases have alike is in neither.
            assert!(allocated(&top) < 5 * MIB / 2, "{}", allocated(&top));
        });
    }
}

#[test]
fn without_a_base_an_overlay_has_everything_itself() {
    in_dir(|dir| {
        let [base, top, flat_file] = written_overlay(&dir, "qcow2");
        rebase(&top, &DiskPaths::new(&base), None, &Job::unattended()).unwrap();
        fs::remove_file(&base).unwrap();
        assert_eq!(info(&DiskPaths::new(&top)).unwrap().backing, None);
        expect_same(&flat_file, &top, "qcow2");
    });
}

#[test]
fn compacting_keeps_the_content() {
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "compat=0.10"),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "extended_l2=on,cluster_size=32k"),
        ("qcow2", "compression_type=zstd"),
    ] {
        in_dir(|dir| {
            let [raw, image] = ["raw", "image"].map(|it| dir.join(it));
            sample(&raw);
            let compressed = options.contains("compression");
            let mut args = vec!["convert", "-q", "-f", "raw", "-O", format];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            if compressed {
                args.push("-c");
            }
            args.extend([str(&raw), str(&image)]);
            qemu_img(&args);
            // Written, and then zeroes or nothing.
            qemu_io(
                &image,
                format,
                &[
                    "write -q -P 7 6M 2M",
                    "write -q -P 0 6M 1M",
                    "discard -q 7M 1M",
                ],
            );
            qemu_img(&[
                "convert",
                "-q",
                "-f",
                format,
                "-O",
                "raw",
                str(&image),
                str(&raw),
            ]);
            let done = compact(&image, false, &Job::unattended()).unwrap();
            assert!(done.after < done.before, "{format} {options}: {done:?}");
            assert_eq!(done.after, allocated(&image));
            expect_same(&raw, &image, format);
            let map = qemu_img(&["map", "--output=json", "-f", format, str(&image)]);
            assert_eq!(map.contains(r#""compressed": true"#), compressed, "{map}");
            assert_eq!(names(&dir), ["image", "raw"]);
            if format == "qcow2" {
                compact(&image, true, &Job::unattended()).unwrap();
                expect_same(&raw, &image, format);
            }
        });
    }
}

#[test]
fn a_compacted_overlay_is_one_still() {
    in_dir(|dir| {
        let [base, top, flat_file] = written_overlay(&dir, "qcow2");
        qemu_io(&top, "qcow2", &["write -q -P 0 3M 128k"]);
        let flat_file = {
            fs::remove_file(&flat_file).unwrap();
            flat(&over(&top, &base), &flat_file)
        };
        compact(&top, true, &Job::unattended()).unwrap();
        expect_accepted(&top, &base);
        expect_same_content(&over(&top, &base), &flat_file);
        qemu_img(&["check", "-q", str(&top)]);
        assert!(allocated(&top) < MIB, "{}", allocated(&top));
    });
}

#[test]
fn compacting_does_not_lose_snapshots() {
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
        qemu_img(&["snapshot", "-c", "one", str(&image)]);
        let refused = compact(&image, false, &Job::unattended()).unwrap_err();
        assert!(
            refused.to_string().contains("internal snapshots"),
            "{refused}"
        );
        let listed = edgevmm_image::snapshots(&DiskPaths::new(&image)).unwrap();
        assert_eq!((listed.len(), listed[0].name.as_str()), (1, "one"));
    });
}

#[test]
fn disks_grow_and_raw_ones_shrink_if_told_so() {
    for format in ["raw", "qcow2"] {
        in_dir(|dir| {
            let [raw, image] = ["raw", "image"].map(|it| dir.join(it));
            sample(&raw);
            qemu_img(&[
                "convert",
                "-q",
                "-f",
                "raw",
                "-O",
                format,
                str(&raw),
                str(&image),
            ]);
            let disk = DiskPaths::new(&image);
            let grown = resize(&disk, NewSize::By(MIB), false).unwrap();
            assert_eq!(grown, SIZE + MIB);
            assert_eq!(
                resize(&disk, NewSize::To(20 * MIB), false).unwrap(),
                20 * MIB
            );
            qemu_img(&["resize", "-q", "-f", "raw", str(&raw), "20M"]);
            expect_same(&raw, &image, format);
            let refused = resize(&disk, NewSize::To(SIZE), false).unwrap_err();
            assert!(matches!(refused, ImageError::Unfit { .. }), "{refused}");
            let shrunk = resize(&disk, NewSize::To(SIZE), true);
            assert_eq!(shrunk.is_ok(), format == "raw", "{shrunk:?}");
            if format == "raw" {
                qemu_img(&[
                    "resize",
                    "-q",
                    "-f",
                    "raw",
                    "--shrink",
                    str(&raw),
                    &SIZE.to_string(),
                ]);
                expect_same(&raw, &image, format);
            }
            resize(&disk, NewSize::To(1000), false).unwrap_err();
        });
    }
}

/// What is new reads as zeroes, also where the base has something there.
#[test]
fn an_overlay_grows_over_what_its_base_has() {
    in_dir(|dir| {
        let [base, top] = ["base", "top"].map(|it| dir.join(it));
        sample(&base);
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(&base)];
        qemu_img(&[&args[..], &[str(&top), "1M"]].concat());
        let disk = over(&top, &base);
        resize(&disk, NewSize::To(4 * MIB), false).unwrap();
        qemu_io(&top, "qcow2", &["read -q -P 0 1M 3M"]);
        expect_same_content(&disk, &flat(&disk, &dir.join("flat")));
        qemu_img(&["check", "-q", str(&top)]);
    });
}
