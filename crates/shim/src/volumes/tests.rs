#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;

use edgevmm_config::{ByteSize, DiskBus, DiskFormat};
use proptest::prelude::*;

use super::*;
use crate::spec::{Device, DeviceRule};

struct Pod {
    root: tempfile::TempDir,
    spec: Spec,
    annotations: Annotations,
}

impl Pod {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            spec: Spec::default(),
            annotations: Annotations::default(),
        }
    }

    /// Mounts a volume of a kind that the kubelet has, or any other folder, and tells its path.
    fn mount(&mut self, kind: &str, name: &str, place: &str) -> PathBuf {
        let path = match kind {
            "" => name.to_owned(),
            kind => format!("pods/u1/volumes/kubernetes.io~{kind}/{name}"),
        };
        let source = self.root.path().join(path);
        fs::create_dir_all(&source).unwrap();
        self.spec.mounts.push(Mount {
            destination: place.to_owned(),
            source: source.clone(),
            kind: "bind".to_owned(),
            options: vec!["rbind".to_owned(), "rw".to_owned()],
        });
        source
    }

    fn attach(&self) -> Result<Volumes, String> {
        let bundle = self.root.path().join("bundle");
        attach(&self.spec, &self.annotations, &bundle).map_err(|error| crate::chain(&error))
    }

    fn refused(&self) -> String {
        self.attach().unwrap_err()
    }
}

#[test]
fn what_nobody_asked_for_is_left_out() {
    let mut pod = Pod::new();
    for place in UNASKED {
        pod.mount("", "some", place);
    }
    pod.mount("", "pods/u1/containers/vm/0a1b2c3d", "/var/log/last-words");
    pod.spec.mounts.push(Mount {
        destination: "/proc".to_owned(),
        kind: "proc".to_owned(),
        ..Mount::default()
    });
    let volumes = pod.attach().unwrap();
    assert!(volumes.disks.is_empty() && volumes.given.is_empty());
}

#[test]
fn files_of_the_api_are_a_disk_that_only_these_are_on() {
    let mut pod = Pod::new();
    let source = pod.mount("configmap", "settings", "/etc/app");
    // As the kubelet writes them.
    fs::create_dir_all(source.join("..2026/deep")).unwrap();
    fs::write(source.join("..2026/app.conf"), "a = VALUE-OF-KEY").unwrap();
    fs::write(source.join("..2026/deep/more"), "MORE-OF-IT").unwrap();
    symlink("..2026", source.join("..data")).unwrap();
    for name in ["app.conf", "deep"] {
        symlink(format!("..data/{name}"), source.join(name)).unwrap();
    }
    let volumes = pod.attach().unwrap();
    let [Disk { config: disk, .. }] = volumes.disks.as_slice() else {
        panic!("{volumes:?}");
    };
    assert_eq!(disk.serial.as_deref(), Some("settings"));
    assert!(disk.ro && disk.format == Some(DiskFormat::Raw));
    let image = fs::read(&disk.path).unwrap();
    let has = |text: &str| {
        image
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    assert!(has("VALUE-OF-KEY") && has("MORE-OF-IT") && has("cfgdata"));
    assert!(!has("..data"));
    pod.annotations.disk_bus = Some(DiskBus::Sata);
    assert!(pod.attach().unwrap().disks[0].config.is_cdrom());

    symlink("/etc/passwd", source.join("host")).unwrap();
    let error = pod.refused();
    assert!(
        error.contains("settings") && error.contains("host"),
        "{error}"
    );
    fs::remove_file(source.join("host")).unwrap();
    symlink("..", source.join("..2026/deep/loop")).unwrap();
    pod.refused();
    fs::remove_file(source.join("..2026/deep/loop")).unwrap();
    let large = fs::File::create(source.join("large")).unwrap();
    large.set_len(1 << 40).unwrap();
    let error = pod.refused();
    assert!(error.contains("larger than"), "{error}");
}

#[test]
fn the_image_in_a_claim_is_its_disk() {
    let mut pod = Pod::new();
    let source = pod.mount("csi", "pvc-1/mount", "/srv/data");
    fs::create_dir(source.join("lost+found")).unwrap();
    let error = pod.refused();
    assert!(
        error.contains("`srv-data` mounted at /srv/data has no disk image"),
        "{error}"
    );
    fs::write(source.join("till.qcow2"), "x").unwrap();
    let volumes = pod.attach().unwrap();
    let disk = &volumes.disks[0].config;
    assert_eq!(disk.format, Some(DiskFormat::Qcow2));
    assert_eq!((disk.serial.as_deref(), disk.ro), (Some("srv-data"), false));
    assert_eq!(
        (&volumes.given[0].folder, &volumes.given[0].link),
        (&source, &disk.path)
    );
    fs::write(source.join("other.raw"), "x").unwrap();
    let error = pod.refused();
    assert!(error.contains("(other.raw, till.qcow2)"), "{error}");
    fs::write(source.join("disk.img"), "x").unwrap();
    assert_eq!(pod.attach().unwrap().given[0].file, "disk.img");
    for option in ["ro", "rro"] {
        pod.spec.mounts[0].options = vec!["rbind".to_owned(), option.to_owned()];
        assert!(pod.attach().unwrap().disks[0].config.ro, "{option}");
    }
    fs::remove_file(source.join("disk.img")).unwrap();
    symlink("/etc/passwd", source.join("disk.img")).unwrap();
    let error = pod.refused();
    assert!(error.contains("links are not followed"), "{error}");
}

#[test]
fn a_format_that_is_only_read_keeps_writes_beside_it() {
    let mut pod = Pod::new();
    let source = pod.mount("empty-dir", "data", "/d");
    fs::write(source.join("old.vmdk"), "x").unwrap();
    fs::write(source.join("old.vmdk.overlay.qcow2"), "x").unwrap();
    let volumes = pod.attach().unwrap();
    let [image, overlay] = volumes.given.as_slice() else {
        panic!("{volumes:?}");
    };
    assert_eq!(overlay.file, "old.vmdk.overlay.qcow2");
    assert_eq!(overlay.over.as_ref().unwrap().path, image.link);
    assert_eq!(
        volumes.disks[0].config.overlay.as_ref(),
        Some(&overlay.link)
    );
}

#[test]
fn how_a_disk_is_wished_for_decides_what_is_made_of_a_volume() {
    let mut pod = Pod::new();
    let source = pod.mount("empty-dir", "data", "/d");
    fs::write(source.join("old.vmdk"), "x").unwrap();
    let files = pod.mount("configmap", "settings", "/etc/app");
    fs::write(files.join("key"), "x").unwrap();
    let mut attach = |text: &str| {
        pod.annotations.disks = crate::disks::Wishes::parse(text).unwrap();
        pod.attach().unwrap()
    };
    let volumes = attach("data,ro\n/etc/app,kind=cdrom");
    let [data, files] = volumes.disks.as_slice() else {
        panic!("{volumes:?}");
    };
    assert!(data.config.ro && data.config.overlay.is_none());
    assert_eq!((volumes.given.len(), data.place.as_str()), (1, "/d"));
    assert!(files.config.is_cdrom());
    for (text, cdrom) in [("settings,bus=sata", true), ("settings,bus=virtio", false)] {
        assert_eq!(attach(text).disks[1].config.is_cdrom(), cdrom, "{text}");
    }
    fs::rename(source.join("old.vmdk"), source.join("setup.iso")).unwrap();
    let disk = attach("data,kind=cdrom").disks.swap_remove(0);
    assert_eq!(disk.config.format, Some(DiskFormat::Raw));
}

#[test]
fn an_empty_disk_is_made_once_when_asked_for() {
    let mut pod = Pod::new();
    let source = pod.mount("empty-dir", "scratch", "/s");
    let disk = source.join("disk.img");
    pod.annotations.create_disk = vec![("scratch".to_owned(), ByteSize(u64::MAX))];
    pod.refused();
    assert!(!disk.exists());
    pod.annotations.create_disk = vec![("scratch".to_owned(), ByteSize::mib(64))];
    pod.attach().unwrap();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 64 << 20);
    // As it is left by one that was killed.
    fs::write(&disk, "").unwrap();
    pod.attach().unwrap();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 64 << 20);
    fs::write(&disk, "kept").unwrap();
    pod.attach().unwrap();
    assert_eq!(fs::read(&disk).unwrap(), b"kept");
    pod.annotations.create_disk = vec![("scrach".to_owned(), ByteSize::mib(64))];
    let error = pod.refused();
    assert!(
        error.contains("`scrach`") && error.contains("mounts scratch"),
        "{error}"
    );
}

#[test]
fn what_no_machine_can_take_is_refused_by_name() {
    let mut pod = Pod::new();
    pod.mount("", "etc", "/host/etc");
    let error = pod.refused();
    assert!(error.contains("/host/etc"), "{error}");
    let file = pod.root.path().join("file");
    fs::write(&file, "x").unwrap();
    pod.spec.mounts[0].source = file;
    let error = pod.refused();
    assert!(
        error.contains("single file is mounted at /host/etc"),
        "{error}"
    );
    let mut pod = Pod::new();
    pod.spec.linux.devices = vec![Device {
        path: "/dev/ttyS0".to_owned(),
        kind: "c".to_owned(),
        major: 4,
        minor: 64,
    }];
    assert!(pod.refused().contains("/dev/ttyS0"));
    pod.spec.linux.devices[0].kind = "b".to_owned();
    pod.spec.linux.devices[0].major = 4000;
    assert!(pod.refused().contains("4000:64 for /dev/ttyS0"));
    pod.spec.linux.devices[0].major = -1;
    pod.refused();
}

#[test]
fn volumes_that_annotations_name_are_not_disks() {
    let mut pod = Pod::new();
    pod.mount("empty-dir", "state", "/state");
    let seed = pod.mount("secret", "seed", "/seed");
    fs::write(seed.join("user-data"), "#cloud-config").unwrap();
    pod.annotations.overlay = Some("/state".to_owned());
    pod.annotations.cloud_init = Some("seed".to_owned());
    let mut volumes = pod.attach().unwrap();
    assert!(volumes.disks.is_empty() && volumes.cloud_init.is_some());
    let link = volumes.keep_writes(Path::new("/base")).unwrap();
    let over = volumes.given[0].over.as_ref().unwrap();
    assert_eq!(over.path, Path::new("/base"));
    assert!(link.ends_with("volumes/state/edgevmm-overlay.qcow2"));
    pod.annotations.overlay = Some("seed".to_owned());
    assert!(pod.refused().contains("use a claim or an emptyDir"));
}

#[test]
fn a_volume_is_there_once_and_names_are_their_own() {
    let mut pod = Pod::new();
    pod.mount("secret", "a", "/one");
    pod.mount("secret", "a", "/two");
    assert_eq!(pod.attach().unwrap().disks.len(), 1);
    pod.mount("", "x", "/a");
    assert!(pod.refused().contains("called `a`"));
    assert_eq!(serial("short"), "short");
    let (long, other) = (serial(&"n".repeat(63)), serial(&"n".repeat(62)));
    assert!(long.len() == MAX_SERIAL && long != other, "{long} {other}");
}

#[test]
fn writes_to_a_device_need_a_rule() {
    let device = Device {
        path: "/dev/xvda".to_owned(),
        kind: "b".to_owned(),
        major: 7,
        minor: 1,
    };
    let rule = |allow, major, access: &str| DeviceRule {
        allow,
        major,
        access: access.to_owned(),
        ..DeviceRule::default()
    };
    let mut spec = Spec::default();
    for (access, expected) in [("r", false), ("rwm", true), ("", true)] {
        spec.linux.resources.devices = vec![rule(false, None, "rwm"), rule(true, Some(7), access)];
        assert_eq!(
            spec.linux.resources.may_write(&device),
            expected,
            "{access}"
        );
    }
}

proptest! {
    #[test]
    fn no_path_or_name_panics(path: String, place: String) {
        let mount = Mount { destination: place, source: path.into(), ..Mount::default() };
        let volume = Volume::new(&mount);
        let serial = serial(&volume.name);
        prop_assert!(serial.len() <= MAX_SERIAL);
    }
}
