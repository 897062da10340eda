//! Which files a VMDK descriptor may have, and which it may not.

use std::os::unix::fs::symlink;

use edgevmm_block::{DataFile, DiskOptions, open_path};

use super::*;

const SECTORS: u64 = 16;

/// A disk of one flat extent, `file`, with the descriptor in `name`.
fn descriptor(dir: &TempDir, name: &str, file: &str) -> PathBuf {
    let path = dir.path().join(name);
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW \
         {SECTORS} FLAT \"{file}\" 0\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn data(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, [5; SECTORS as usize * 512]).unwrap();
    path
}

#[test]
fn only_files_named_after_the_descriptor() {
    let dir = TempDir::new().unwrap();
    data(&dir, "a-flat.vmdk");
    let secret = data(&dir, "secret");
    try_open(&descriptor(&dir, "a.vmdk", "a-flat.vmdk"), None).unwrap();
    for name in [
        str(&secret),
        "secret",
        "./a-flat.vmdk",
        "../a-flat.vmdk",
        "/dev/sda",
        r"\\\\.\\PhysicalDrive0",
        "b-flat.vmdk",
    ] {
        let told = refusal(&descriptor(&dir, "a.vmdk", name), None);
        assert!(told.contains("never opened by itself"), "{told}");
        assert!(told.contains("data_file=PATH"), "{told}");
    }
    // The name of what may be a raw disk gives it no files.
    let told = refusal(&descriptor(&dir, "a.img", "a-flat.vmdk"), None);
    assert!(told.contains("never opened by itself"), "{told}");
}

#[test]
fn only_regular_files() {
    let dir = TempDir::new().unwrap();
    let image = descriptor(&dir, "a.vmdk", "a-flat.vmdk");
    let told = refusal(&image, None);
    assert!(
        told.contains("a-flat.vmdk") && told.contains("does not exist"),
        "{told}"
    );
    let extent = dir.path().join("a-flat.vmdk");
    symlink(data(&dir, "secret"), &extent).unwrap();
    assert!(refusal(&image, None).contains("a symbolic link"));
    std::fs::remove_file(&extent).unwrap();
    std::fs::create_dir(&extent).unwrap();
    assert!(refusal(&image, None).contains("a directory"));
    std::fs::remove_dir(&extent).unwrap();
    run("mkfifo", &[str(&extent)]);
    assert!(refusal(&image, None).contains("a pipe"));
}

#[test]
fn a_link_to_the_descriptor_leads_to_its_files() {
    let (dir, links) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    data(&dir, "a-flat.vmdk");
    let image = descriptor(&dir, "a.vmdk", "a-flat.vmdk");
    let link = links.path().join("b.vmdk");
    symlink(image, &link).unwrap();
    try_open(&link, None).unwrap();
}

#[test]
fn files_that_do_not_fit() {
    let dir = TempDir::new().unwrap();
    let image = descriptor(&dir, "a.vmdk", "a-flat.vmdk");
    let extent = data(&dir, "a-flat.vmdk");
    let open = |files: &[&Path]| {
        let file = |path: &Path| open_path(path, false).unwrap();
        let data_files = files.iter().map(|path| DataFile {
            file: file(path),
            path_hint: str(path).to_owned(),
        });
        open(DiskOptions {
            read_only: true,
            data_files: data_files.collect(),
            ..DiskOptions::new(file(&image), "a.vmdk")
        })
    };
    assert!(matches!(
        open(&[]),
        Err(BlockError::DataFileNotGiven { wanted, .. }) if wanted == "a-flat.vmdk"
    ));
    assert!(matches!(
        open(&[&extent, &image]),
        Err(BlockError::DataFileNotWanted { .. })
    ));
    assert!(open(&[&extent]).is_ok());
    std::fs::write(&extent, [5; SECTORS as usize * 512 - 1]).unwrap();
    let told = open(&[&extent]).unwrap_err().to_string();
    assert!(
        told.contains("a-flat.vmdk") && told.contains("cut off"),
        "{told}"
    );
    // What is larger than a descriptor can be is a raw disk that begins like one.
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(2 << 20).unwrap();
    assert!(refusal(&image, None).contains("format=raw"));
}
