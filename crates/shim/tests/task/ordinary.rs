//! An ordinary container beside a machine, made by the host's own runc of the host's own programs.

use std::fs;
use std::path::{Path, PathBuf};

use edgevmm_shim::proto::task::{CreateRequest, ExecRequest, KillRequest, Mount};
use edgevmm_shim::ttrpc::Answer;
use serde_json::json;

use crate::shim::{Shim, eventually, process};

/// A program that says that it runs, and ends with 3 when it is asked to.
const PROGRAM: &str = "trap 'exit 3' TERM; echo ready $$; while :; do sleep 0.05; done";

pub fn runc_is_missing() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    !std::env::split_paths(&path).any(|folder| folder.join("runc").is_file())
}

fn program(script: &str) -> serde_json::Value {
    json!({
        "args": ["sh", "-c", script],
        "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "user": { "uid": 0, "gid": 0 },
    })
}

/// Makes the container `b`, which writes to the file returned.
async fn create(shim: &Shim) -> PathBuf {
    let (output, created) = try_create(shim, program(PROGRAM)).await;
    created.unwrap();
    output
}

async fn try_create(shim: &Shim, program: serde_json::Value) -> (PathBuf, Answer) {
    shim.bundle("b", "");
    let bundle = shim.bundle_path("b");
    let config = bundle.join("config.json");
    let spec: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs", "readonly": true },
        "process": program,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
        ],
        "annotations": {
            "io.kubernetes.cri.sandbox-id": "a",
            "io.kubernetes.cri.container-name": "side",
            "edgevmm.io/container": "vm",
        },
        "linux": {
            "cgroupsPath": spec["linux"]["cgroupsPath"],
            "namespaces": [{ "type": "pid" }, { "type": "mount" }],
        },
    });
    fs::write(&config, spec.to_string()).unwrap();
    let output = bundle.join("output");
    let request = CreateRequest {
        id: "b".to_owned(),
        bundle: bundle.to_str().unwrap().to_owned(),
        rootfs: vec![Mount {
            r#type: "bind".to_owned(),
            source: "/".to_owned(),
            options: vec!["bind".to_owned(), "ro".to_owned()],
            ..Mount::default()
        }],
        stdout: format!("file://{}", output.display()),
        ..CreateRequest::default()
    };
    let created = shim.call("Create", &request).await;
    (output, created)
}

/// One that was meant to be the machine is told why it is none.
pub async fn without_a_program_is_told(shim: &Shim) {
    let mut program = program("");
    program["args"] = json!(["no-such-program"]);
    let error = try_create(shim, program).await.1.unwrap_err().message;
    assert!(
        error.contains("no-such-program") && error.contains("edgevmm.io/container"),
        "{error}"
    );
    assert!(!shim.bundle_path("b").join("edgevmm.json").exists());
}

async fn start(shim: &Shim, output: &Path) {
    shim.plain("Start", "b").await.unwrap();
    let said = || fs::read_to_string(output).unwrap_or_default();
    eventually("it does not run", || said() == "ready 1\n").await;
}

/// Has a client's program run.
async fn exec(shim: &Shim, id: &str, script: &str) {
    let request = ExecRequest {
        id: "b".to_owned(),
        exec_id: id.to_owned(),
        spec: Some(prost_types::Any {
            type_url: String::new(),
            value: program(script).to_string().into_bytes(),
        }),
        ..ExecRequest::default()
    };
    shim.call("Exec", &request).await.unwrap();
    shim.call("Start", &process("b", id)).await.unwrap();
}

/// A client's program that is killed does not go on without the client, and what runc was told of
/// programs is gone with them.
async fn programs_end(shim: &Shim) {
    exec(shim, "e1", "exit 4").await;
    assert_eq!(shim.wait("b", "e1").await, Ok(4));
    exec(shim, "e2", "exec sleep 1000").await;
    let bundle = shim.bundle_path("b");
    let inner = || fs::read_to_string(bundle.join("exec-e2.pid")).unwrap_or_default();
    eventually("it does not run", || !inner().is_empty()).await;
    let inner = format!("/proc/{}", inner().trim());
    let request = KillRequest {
        id: "b".to_owned(),
        exec_id: "e2".to_owned(),
        signal: 9,
        ..KillRequest::default()
    };
    shim.call("Kill", &request).await.unwrap();
    assert_eq!(shim.wait("b", "e2").await, Ok(137));
    eventually("it goes on", || !Path::new(&inner).exists()).await;
    for id in ["e1", "e2"] {
        shim.call("Delete", &process("b", id)).await.unwrap();
    }
    let files = fs::read_dir(&bundle).unwrap().flatten();
    let left = files.filter(|file| file.file_name().to_string_lossy().starts_with("exec-"));
    assert_eq!(left.count(), 0);
}

/// It runs, runs programs of clients, is asked to end, and leaves nothing behind.
pub async fn lives_and_ends(shim: &Shim) {
    let output = create(shim).await;
    start(shim, &output).await;
    programs_end(shim).await;
    let (_, first) = shim.pids("b").await;
    shim.kill("b", 15).await.unwrap();
    assert_eq!(shim.wait("b", "").await, Ok(3));
    assert_eq!(shim.delete("b").await, Ok(3));
    assert_nothing_left(shim, first);
}

/// Its shim is killed, and clearing up takes it along.
pub async fn goes_with_its_shim(shim: &Shim) {
    let output = create(shim).await;
    fs::write(&output, "").unwrap();
    start(shim, &output).await;
    let (daemon, first) = shim.pids("b").await;
    let daemon = nix::unistd::Pid::from_raw(i32::try_from(daemon).unwrap());
    nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGKILL).unwrap();
    for id in ["b", "a"] {
        let cleared = shim.command(id, "delete", &[]);
        assert!(cleared.status.success(), "{cleared:?}");
    }
    assert_nothing_left(shim, first);
}

fn assert_nothing_left(shim: &Shim, first: u32) {
    let left = shim.leftovers(&[]);
    let left: Vec<_> = left.iter().filter(|path| path.ends_with("/b")).collect();
    assert_eq!(left, Vec::<&String>::new());
    assert!(!shim.bundle_path("b").join("edgevmm.json").exists());
    // Whoever took it over may not have collected it yet.
    let stat = fs::read_to_string(format!("/proc/{first}/stat")).unwrap_or_default();
    let (_, state) = stat.rsplit_once(") ").unwrap_or_default();
    assert!(state.is_empty() || state.starts_with('Z'), "{stat}");
    let known = Path::new("/run/containerd/runc").join(shim.namespace());
    assert!(!known.join("b").exists());
}
