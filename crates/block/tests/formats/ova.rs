//! Disks in OVA archives.

use tar::{EntryType, Header};

use super::*;
use edgevmm_block::{DiskPaths, Existing, NewFile, open, overlay};

/// A streamOptimized disk with something on it, as exporters write them.
fn disk(dir: &TempDir, random: &mut Random) -> (PathBuf, PathBuf) {
    let raw = content(dir, (3 << 20) + 512, random);
    let disk = dir.path().join("vm-disk1.vmdk");
    let options = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    run(
        "qemu-img",
        &[&options[..], &[str(&raw), str(&disk)]].concat(),
    );
    std::fs::write(
        dir.path().join("vm.ovf"),
        "<?xml version=\"1.0\"?><Envelope/>",
    )
    .unwrap();
    std::fs::write(dir.path().join("vm.mf"), "SHA256(vm.ovf)= 00\n").unwrap();
    (disk, raw)
}

fn open_member(path: &Path, member: Option<&str>) -> Result<Disk, String> {
    open_part(path, Some(ImageFormat::Ova), member).map_err(|err| err.to_string())
}

#[test]
fn archives_of_tar() {
    let mut random = Random::new();
    for format in ["ustar", "gnu", "pax"] {
        let dir = TempDir::new().unwrap();
        let (_, raw) = disk(&dir, &mut random);
        let ova = dir.path().join("vm.ova");
        let (format, here) = (format!("--format={format}"), str(dir.path()));
        let files = ["vm.ovf", "vm-disk1.vmdk", "vm.mf"];
        run(
            "tar",
            &[&["-cf", str(&ova), &format, "-C", here], &files[..]].concat(),
        );
        compare_with(&ova, ImageFormat::Ova, &raw, &mut random);
        assert!(try_open(&ova, None).is_ok(), "it is detected");
        open_member(&ova, Some("vm-disk1.vmdk")).unwrap();
        let told = open_member(&ova, Some("vm.mf")).err().unwrap();
        assert!(told.contains("no disk \"vm.mf\""), "{told}");
        // A name too long for the header's field.
        let long = format!("{}.vmdk", "n".repeat(130));
        let transform = format!("s/vm-disk1.vmdk/{long}/");
        let more = ["--transform", &transform, "--owner=0"];
        let all = [
            &["-cf", str(&ova), &format, "-C", here],
            &more[..],
            &files[..],
        ]
        .concat();
        if format == "--format=ustar" {
            continue;
        }
        run("tar", &all);
        open_member(&ova, Some(&long)).unwrap();
        compare_with(&ova, ImageFormat::Ova, &raw, &mut random);
    }
}

/// An overlay over one of two disks is not for the other one.
#[test]
fn an_overlay_knows_its_member() {
    let mut random = Random::new();
    let dir = TempDir::new().unwrap();
    let (first, _) = disk(&dir, &mut random);
    std::fs::copy(&first, dir.path().join("vm-disk2.vmdk")).unwrap();
    let ova = dir.path().join("vm.ova");
    let here = [
        "-cf",
        str(&ova),
        "-C",
        str(dir.path()),
        "vm.ovf",
        "vm-disk1.vmdk",
    ];
    let overlay = dir.path().join("overlay");
    let base = |member: Option<&str>| DiskPaths {
        internal_snapshot: member.map(Into::into),
        ..DiskPaths::new(&ova)
    };
    let opened = |member| {
        let top = DiskPaths::new(&overlay).open(true).unwrap();
        open(overlay::over(top, base(member).open(false).unwrap())).map_err(|it| it.to_string())
    };
    run("tar", &[&here[..], &["vm-disk2.vmdk"]].concat());
    let new = NewFile::create(&overlay, Existing::Keep).unwrap();
    overlay::create(new, &base(Some("vm-disk2.vmdk")), None).unwrap();
    drop(opened(Some("vm-disk2.vmdk")).unwrap());
    let refused = opened(Some("vm-disk1.vmdk")).err().unwrap();
    assert!(refused.contains("another of the disks"), "{refused}");
    drop(opened(Some("vm-disk2.vmdk")).unwrap());
    // The only one needs no name.
    run("tar", &here);
    let new = NewFile::create(&overlay, Existing::Replace).unwrap();
    overlay::create(new, &base(None), None).unwrap();
    drop(opened(Some("vm-disk1.vmdk")).unwrap());
    drop(opened(None).unwrap());
}

#[test]
fn every_format_in_an_archive() {
    let mut random = Random::new();
    for (format, ending) in [
        ("vmdk", "vmdk"),
        ("vpc", "vhd"),
        ("vhdx", "vhdx"),
        ("vdi", "vdi"),
    ] {
        let dir = TempDir::new().unwrap();
        disk(&dir, &mut random);
        let name = format!("disk.{ending}");
        let image = dir.path().join(&name);
        let raw = dir.path().join("content.raw");
        run(
            "qemu-img",
            &["convert", "-O", format, str(&raw), str(&image)],
        );
        let flat = dir.path().join("flat");
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                format,
                "-O",
                "raw",
                str(&image),
                str(&flat),
            ],
        );
        let ova = dir.path().join("vm.ova");
        let here = str(dir.path());
        run(
            "tar",
            &["-cf", str(&ova), "-C", here, "vm.ovf", "vm.mf", &name],
        );
        compare_with(&ova, ImageFormat::Ova, &flat, &mut random);
    }
}

#[test]
fn the_disk_has_to_be_clear() {
    let dir = TempDir::new().unwrap();
    let (disk, _) = disk(&dir, &mut Random::new());
    std::fs::copy(&disk, dir.path().join("second.vmdk")).unwrap();
    let ova = dir.path().join("vm.ova");
    let here = str(dir.path());
    let base = ["-cf", str(&ova), "-C", here];
    run(
        "tar",
        &[&base[..], &["vm.ovf", "vm-disk1.vmdk", "second.vmdk"]].concat(),
    );
    let told = try_open(&ova, None).err().unwrap().to_string();
    assert!(
        told.contains("\"vm-disk1.vmdk\", \"second.vmdk\""),
        "{told}"
    );
    assert!(told.contains("member=NAME"), "{told}");
    open_member(&ova, Some("second.vmdk")).unwrap();
    run("tar", &[&base[..], &["vm.ovf", "vm.mf"]].concat());
    let told = try_open(&ova, None).err().unwrap().to_string();
    assert!(told.contains("no disk") && told.contains("vm.mf"), "{told}");
    // An archive that does not begin with a description is none.
    run("tar", &[&base[..], &["vm-disk1.vmdk", "vm.ovf"]].concat());
    assert_eq!(probe(&File::open(&ova).unwrap()).unwrap(), ImageFormat::Raw);
    open_member(&ova, None).unwrap();
}

/// Writes an archive of the description and what `add` appends.
fn write(path: &Path, add: impl FnOnce(&mut tar::Builder<File>)) {
    let mut archive = tar::Builder::new(File::create(path).unwrap());
    let mut header = Header::new_ustar();
    header.set_size(3);
    archive
        .append_data(&mut header, "vm.ovf", &b"ovf"[..])
        .unwrap();
    add(&mut archive);
    archive.into_inner().unwrap();
}

#[test]
fn sizes_beyond_what_ustar_can_say() {
    const SIZE: u64 = 9 << 30;
    let mut random = Random::new();
    let dir = TempDir::new().unwrap();
    let (disk, raw) = disk(&dir, &mut random);
    let sparse = dir.path().join("sparse.vmdk");
    run(
        "qemu-img",
        &["convert", "-O", "vmdk", str(&raw), str(&sparse)],
    );
    let bytes = std::fs::read(&sparse).unwrap();
    let second = std::fs::read(disk).unwrap();
    for pax in [false, true] {
        let ova = dir.path().join("big.ova");
        write(&ova, |archive| {
            let mut header = Header::new_gnu();
            header.set_path("big.vmdk").unwrap();
            header.set_size(SIZE);
            if pax {
                let size = SIZE.to_string();
                let records = [("comment", &b"="[..]), ("size", size.as_bytes())];
                archive.append_pax_extensions(records).unwrap();
                header.set_size(0);
            }
            header.set_cksum();
            let file = archive.get_mut();
            let end = file.metadata().unwrap().len();
            file.write_all_at(header.as_bytes(), end).unwrap();
            file.write_all_at(&bytes, end + 512).unwrap();
            io::Seek::seek(file, io::SeekFrom::Start(end + 512 + SIZE)).unwrap();
            let mut header = Header::new_ustar();
            header.set_size(second.len() as u64);
            archive
                .append_data(&mut header, "second.vmdk", &second[..])
                .unwrap();
        });
        assert!(std::fs::metadata(&ova).unwrap().len() > SIZE);
        for name in ["big.vmdk", "second.vmdk"] {
            let disk = open_member(&ova, Some(name)).unwrap();
            let expected = std::fs::read(&raw).unwrap();
            assert!(
                disk.read(0, disk.size()).unwrap() == expected,
                "{name}, pax: {pax}"
            );
        }
    }
}

#[test]
fn archives_that_are_refused() {
    let dir = TempDir::new().unwrap();
    let ova = dir.path().join("vm.ova");
    let entry = |kind, size, data: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_path("a.vmdk").unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    };
    let mut bad_sum = entry(EntryType::Regular, 0, b"");
    bad_sum[0] ^= 1;
    let mut negative = entry(EntryType::Regular, 0, b"");
    negative[124..136].fill(0xff);
    let mut header = Header::from_byte_slice(&negative).clone();
    header.set_cksum();
    let record = b"25 size=99999999999999999\n";
    for (bytes, word) in [
        (entry(EntryType::Regular, 1 << 40, b"KDMV"), "cut off"),
        (entry(EntryType::XHeader, 1 << 40, b""), "cut off"),
        (
            entry(EntryType::GNULongName, 1 << 17, &[b'a'; 1 << 17]),
            "too large",
        ),
        (entry(EntryType::XHeader, 9, b"junk junk"), "damaged"),
        (
            entry(EntryType::XHeader, 26, b"26 size=-9999999999999999\n"),
            "no sense",
        ),
        (
            entry(EntryType::XHeader, 22, b"22 GNU.sparse.major=1\n"),
            "sparse",
        ),
        (entry(EntryType::GNUSparse, 0, b""), "sparse"),
        (entry(EntryType::Symlink, 0, b""), "no files"),
        (
            entry(EntryType::XGlobalHeader, 26, b"26 size=99999999999999999\n"),
            "one name or size",
        ),
        (bad_sum, "checksum"),
        (header.as_bytes().to_vec(), ""),
        (
            [
                entry(EntryType::XHeader, record.len() as u64, record),
                entry(EntryType::Regular, 0, b""),
            ]
            .concat(),
            "",
        ),
    ] {
        write(&ova, |archive| {
            let file = archive.get_mut();
            io::Write::write_all(file, &bytes).unwrap();
        });
        let told = open_member(&ova, None).err().unwrap();
        assert!(told.contains(word), "{told:?} does not say {word:?}");
    }
    // A million members of nothing.
    write(&ova, |archive| {
        let bytes = entry(EntryType::Regular, 0, b"").repeat(5000);
        io::Write::write_all(archive.get_mut(), &bytes).unwrap();
    });
    assert!(open_member(&ova, None).err().unwrap().contains("4096"));
}
