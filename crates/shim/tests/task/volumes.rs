//! What a container mounts, as open files of its machine.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::shim::Shim;

/// Files that a process has open.
fn open_files(pid: u32) -> Vec<PathBuf> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    all.filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect()
}

/// The container `b` has the disk of a volume, and keeps what is written to its image's in another.
pub async fn become_disks(shim: &Shim) {
    let disks = shim.image().join("disk");
    fs::create_dir(&disks).unwrap();
    fs::write(disks.join("base.raw"), vec![1; 1 << 20]).unwrap();
    let folder = |name: &str| shim.bundle_path(name);
    for name in ["data", "state"] {
        fs::create_dir(folder(name)).unwrap();
    }
    fs::write(folder("data").join("disk.img"), vec![2; 1 << 20]).unwrap();
    shim.bundle("b", "/boot/guest");
    let config = shim.bundle_path("b").join("config.json");
    let text = fs::read(&config).unwrap();
    let mut spec: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let mount = |name: &str| json!({ "destination": format!("/{name}"), "source": folder(name), "type": "bind" });
    spec["mounts"] = json!([mount("data"), mount("state")]);
    spec["annotations"]["edgevmm.io/overlay"] = "state".into();
    fs::write(&config, spec.to_string()).unwrap();
    let overlay = folder("state").join("edgevmm-overlay.qcow2");
    for _ in 0..2 {
        shim.run("b").await;
        let (_, machine) = shim.pids("b").await;
        let open = open_files(machine);
        for path in [&folder("data").join("disk.img"), &overlay] {
            assert!(open.contains(path), "{} in {open:?}", path.display());
        }
        end(shim).await;
    }

    // Another image under an overlay is told as the reason.
    fs::write(disks.join("base.raw"), vec![3; 1 << 20]).unwrap();
    shim.create("b").await.unwrap();
    let error = shim.plain("Start", "b").await.unwrap_err().message;
    assert!(error.contains("does not fit its base"), "{error}");
    end(shim).await;
    assert!(overlay.exists());
}

async fn end(shim: &Shim) {
    let _ = shim.kill("b", 9).await;
    shim.wait("b", "").await.unwrap();
    shim.delete("b").await.unwrap();
    // containerd makes a bundle for each container.
    let _ = fs::remove_dir_all(shim.bundle_path("b").join("volumes"));
}
