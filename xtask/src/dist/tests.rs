#![allow(clippy::unwrap_used)]
use super::*;

/// A release of programs that are on every system.
fn release(folder: &Path) -> Release {
    for name in PROGRAMS {
        fs::copy("/bin/true", folder.join(name)).unwrap();
    }
    Release {
        workspace: Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
        programs: folder.to_owned(),
        version: "0.1.0~20260131.abcdef012".to_owned(),
        epoch: 1_769_817_600,
    }
}

fn listed(program: &str, arguments: &[&str], file: &Path) -> String {
    process::output(Command::new(program).args(arguments).arg(file)).unwrap()
}

/// Modes and names of what `text` lists, as tar does it.
fn modes(text: &str) -> Vec<(String, String)> {
    let entry = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let owner = words.get(1).copied().unwrap_or_default();
        assert!(["0/0", "root/root"].contains(&owner), "{line}");
        let name = words.last()?.trim_start_matches("./");
        Some(((*words.first()?).to_owned(), name.to_owned()))
    };
    text.lines().filter_map(entry).collect()
}

fn expect(modes: &[(String, String)], mode: &str, name: &str) {
    let wanted = (mode.to_owned(), name.to_owned());
    assert!(modes.contains(&wanted), "{wanted:?} is not in {modes:?}");
}

#[test]
fn each_package_has_all_files_and_is_the_same_each_time() {
    let programs = tempfile::tempdir().unwrap();
    let release = release(programs.path());
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for kind in Kind::ALL {
        if kind == Kind::Deb && Command::new("dpkg-deb").arg("--version").output().is_err() {
            eprintln!("Skipped: there is no dpkg-deb here");
            continue;
        }
        let file = release.pack(kind, one.path()).unwrap();
        let again = release.pack(kind, two.path()).unwrap();
        assert!(
            fs::read(&file).unwrap() == fs::read(&again).unwrap(),
            "{kind:?}"
        );
        match kind {
            Kind::Deb => {
                let modes = modes(&listed("dpkg-deb", &["--contents"], &file));
                expect(&modes, "-rwxr-xr-x", "usr/bin/edgevmm");
                expect(&modes, "-rwxr-xr-x", "usr/bin/containerd-shim-edgevmm-v1");
                expect(&modes, "-rw-r--r--", "usr/lib/edgevmm/edgevmm-fast");
                expect(&modes, "-rw-r--r--", "usr/share/doc/edgevmm/copyright");
                let fields = listed("dpkg-deb", &["--field"], &file);
                assert!(fields.contains("libc6 (>= 2."), "{fields}");
            }
            Kind::Archive => {
                let modes = modes(&listed("tar", &["-tvf"], &file));
                let inside = |name: &str| format!("edgevmm-{}/{name}", release.version);
                for name in PROGRAMS.into_iter().chain(["install.sh"]) {
                    expect(&modes, "-rwxr-xr-x", &inside(name));
                }
                for name in ["SHA256SUMS", "runtimeclass.yaml", "docs/pods.md"] {
                    expect(&modes, "-rw-r--r--", &inside(name));
                }
            }
            Kind::Image => {
                let modes = modes(&listed("tar", &["-tvf"], &file));
                expect(&modes, "-rw-r--r--", "index.json");
                let layout = tempfile::tempdir().unwrap();
                let mut tar = Command::new("tar");
                tar.arg("-C").arg(layout.path()).arg("-xf").arg(&file);
                process::output(&mut tar).unwrap();
                image_is_whole(layout.path());
            }
        }
    }
}

/// Follows an image from its index to its files: each blob has the hash it is called by.
fn image_is_whole(layout: &Path) {
    let blob = |entry: &serde_json::Value| {
        let hash = entry["digest"].as_str().unwrap().replace("sha256:", "");
        let file = layout.join("blobs/sha256").join(&hash);
        let sum = listed("sha256sum", &[], &file);
        assert!(sum.starts_with(&hash), "{sum}");
        assert_eq!(entry["size"], fs::metadata(&file).unwrap().len());
        file
    };
    let read = |file: &Path| -> serde_json::Value {
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    };
    let index = read(&layout.join("index.json"));
    let name = &index["manifests"][0]["annotations"]["io.containerd.image.name"];
    assert_eq!(name, "localhost/edgevmm:0.1.0-20260131.abcdef012");
    let manifest = read(&blob(&index["manifests"][0]));
    let config = read(&blob(&manifest["config"]));
    let layer = blob(&manifest["layers"][0]);
    let files = modes(&listed("tar", &["-tvzf"], &layer));
    expect(&files, "-rwxr-xr-x", "opt/edgevmm/edgevmm");
    assert!(files.iter().any(|(_, name)| name.contains("ld-linux")));
    let plain = layout.join("layer.tar");
    let unpacked = Command::new("gzip")
        .arg("-dc")
        .arg(&layer)
        .output()
        .unwrap();
    fs::write(&plain, unpacked.stdout).unwrap();
    let diff = config["rootfs"]["diff_ids"][0].as_str().unwrap();
    let sum = listed("sha256sum", &[], &plain);
    assert!(sum.starts_with(diff.trim_start_matches("sha256:")));
}

#[test]
fn checksums_hold() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.deb");
    fs::write(&file, "x").unwrap();
    checksums(folder.path(), &[file]).unwrap();
    let mut check = Command::new("sha256sum");
    check.current_dir(folder.path()).args(["-c", "SHA256SUMS"]);
    assert_eq!(process::output(&mut check).unwrap(), "a.deb: OK\n");
}
