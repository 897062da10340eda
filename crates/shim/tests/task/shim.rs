//! A shim as containerd starts it, with the test in containerd's place.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use edgevmm_shim::proto::bootstrap::{Params, Result as Started};
use edgevmm_shim::proto::events::{
    ForwardRequest, TaskCreate, TaskDelete, TaskExecStarted, TaskExit, TaskPaused, TaskResumed,
    TaskStart,
};
use edgevmm_shim::proto::task::{
    ConnectResponse, CreateRequest, DeleteResponse, KillRequest, Mount, ProcessRequest,
    WaitResponse,
};
use edgevmm_shim::ttrpc::{self, Answer, CallError, Code, Service};
use prost::Message;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::UnixListener;

use crate::guest;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-edgevmm-v1");
/// How long anything may take. Much, as other tests run beside.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Why this machine can't run the tests; `None` when it can.
pub fn missing() -> Option<&'static str> {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    let cgroup = ["memory", "."].map(|name| Path::new("/sys/fs/cgroup").join(name));
    let cgroup = cgroup
        .iter()
        .find(|path| path.join("cgroup.procs").exists());
    let writable = cgroup.is_some_and(|folder| {
        let group = folder.join(format!("edgevmm-probe-{}", std::process::id()));
        fs::create_dir(&group).is_ok() && fs::remove_dir(&group).is_ok()
    });
    let machine = Path::new(PROGRAM).with_file_name("edgevmm");
    match () {
        () if !nix::unistd::geteuid().is_root() => Some("only root starts containers"),
        () if kvm.is_err() => Some("there is no /dev/kvm to be used"),
        () if !writable => Some("no control groups can be made"),
        () if !machine.is_file() => Some("edgevmm is not built: build the whole workspace"),
        () => None,
    }
}

/// What was told of a container: a topic's last word, and of which container or program.
type Told = Arc<Mutex<Vec<(String, String)>>>;

/// Takes events as containerd does.
struct Sink(Told);

impl Service for Sink {
    async fn call(&self, _service: &str, _method: &str, payload: Vec<u8>) -> Answer {
        let request = ForwardRequest::decode(payload.as_slice()).unwrap();
        let envelope = request.envelope.unwrap();
        let event = envelope.event.unwrap().value;
        let topic = envelope.topic.trim_start_matches("/tasks/").to_owned();
        let event = event.as_slice();
        let of = match topic.as_str() {
            "create" => TaskCreate::decode(event).unwrap().container_id,
            "start" => TaskStart::decode(event).unwrap().container_id,
            "exit" => TaskExit::decode(event).unwrap().id,
            "delete" => TaskDelete::decode(event).unwrap().container_id,
            "paused" => TaskPaused::decode(event).unwrap().container_id,
            "resumed" => TaskResumed::decode(event).unwrap().container_id,
            "exec-added" | "exec-started" => TaskExecStarted::decode(event).unwrap().exec_id,
            _ => String::new(),
        };
        self.0.lock().unwrap().push((topic, of));
        Ok(Vec::new())
    }
}

/// A shim's daemon, and what is around it.
pub struct Shim {
    folder: TempDir,
    socket: PathBuf,
    namespace: String,
    told: Told,
}

impl Shim {
    /// Starts one, for a container `id`.
    pub async fn start(id: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image/boot");
        fs::create_dir_all(&image).unwrap();
        fs::write(image.join("guest"), guest::elf()).unwrap();
        let told = Told::default();
        let events = UnixListener::bind(folder.path().join("events")).unwrap();
        tokio::spawn(ttrpc::serve(events, Arc::new(Sink(Arc::clone(&told)))));
        let mut shim = Self {
            socket: PathBuf::new(),
            // Names of machines and groups come from it, which others have too.
            namespace: unique(folder.path()),
            folder,
            told,
        };
        shim.bundle(id, "/boot/guest");
        let input = Params {
            instance_id: id.to_owned(),
            namespace: shim.namespace.clone(),
            socket_dir: Some(shim.folder.path().join("s").to_str().unwrap().to_owned()),
            ..Params::default()
        };
        let output = shim.command(id, "start", &input.encode_to_vec());
        assert!(output.status.success(), "{output:?}");
        let started = Started::decode(output.stdout.as_slice()).unwrap();
        shim.socket = started.address.strip_prefix("unix://").unwrap().into();
        shim
    }

    /// Runs the program with a verb in a container's bundle.
    pub fn command(&self, id: &str, verb: &str, input: &[u8]) -> Output {
        let mut child = Command::new(PROGRAM)
            .args([
                "-namespace",
                &self.namespace,
                "-address",
                "/nowhere",
                "-id",
                id,
            ])
            .args(["-publish-binary", "/bin/true", verb])
            .current_dir(self.bundle_path(id))
            .env("TTRPC_ADDRESS", self.folder.path().join("events"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// containerd's namespace that it is for.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn bundle_path(&self, id: &str) -> PathBuf {
        self.folder.path().join(id)
    }

    /// The container image's folder.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// Makes a bundle for a container that boots a kernel of the image, or else its disk.
    pub fn bundle(&self, id: &str, kernel: &str) {
        let bundle = self.bundle_path(id);
        fs::create_dir_all(&bundle).unwrap();
        let mut spec = json!({
            "root": { "path": "rootfs" },
            "annotations": {},
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.namespace),
                "resources": { "memory": { "limit": 64 << 20 } },
            },
        });
        if !kernel.is_empty() {
            spec["annotations"]["edgevmm.io/kernel"] = kernel.into();
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    }

    /// Makes a call.
    pub async fn call(&self, method: &str, message: &impl Message) -> Answer {
        let service = "containerd.task.v3.Task";
        let payload = message.encode_to_vec();
        let call = ttrpc::call(&self.socket, service, method, payload, &self.namespace);
        let answer = tokio::time::timeout(LIMIT, call).await;
        let answer = answer.unwrap_or_else(|_| panic!("{method} was not answered in time"));
        answer.unwrap_or_else(|error| Err(CallError::new(Code::Unknown, error.to_string())))
    }

    /// Makes a call that names a container only.
    pub async fn plain(&self, method: &str, id: &str) -> Answer {
        self.call(method, &process(id, "")).await
    }

    /// Makes the container of a bundle.
    pub async fn create(&self, id: &str) -> Answer {
        let request = CreateRequest {
            id: id.to_owned(),
            bundle: self.bundle_path(id).to_str().unwrap().to_owned(),
            rootfs: vec![Mount {
                r#type: "bind".to_owned(),
                source: self.image().to_str().unwrap().to_owned(),
                options: vec!["rbind".to_owned()],
                ..Mount::default()
            }],
            ..CreateRequest::default()
        };
        self.call("Create", &request).await
    }

    /// Makes a container and has it run.
    pub async fn run(&self, id: &str) {
        self.create(id).await.unwrap();
        self.plain("Start", id).await.unwrap();
    }

    pub async fn kill(&self, id: &str, signal: u32) -> Answer {
        let request = KillRequest {
            id: id.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.call("Kill", &request).await
    }

    /// Waits for the end of a container, or of a program in it.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<u32, CallError> {
        let answer = self.call("Wait", &process(id, exec_id)).await?;
        Ok(WaitResponse::decode(answer.as_slice()).unwrap().exit_status)
    }

    pub async fn delete(&self, id: &str) -> Result<u32, CallError> {
        let answer = self.plain("Delete", id).await?;
        Ok(DeleteResponse::decode(answer.as_slice())
            .unwrap()
            .exit_status)
    }

    /// IDs of the daemon, and of a container's process.
    pub async fn pids(&self, id: &str) -> (u32, u32) {
        let answer = self.plain("Connect", id).await.unwrap();
        let answer = ConnectResponse::decode(answer.as_slice()).unwrap();
        (answer.shim_pid, answer.task_pid)
    }

    /// What was told so far, once the last of it is `last`.
    pub async fn told(&self, last: (&str, &str)) -> Vec<(String, String)> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let told = self.told.lock().unwrap().clone();
            let end = told.last().map(|(topic, of)| (topic.as_str(), of.as_str()));
            if end == Some(last) {
                return told;
            }
            assert!(
                Instant::now() < deadline,
                "{last:?} was not told, but {told:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What containers have left on the host: mounts, control groups, folders of machines, records.
    pub fn leftovers(&self, machines: &[String]) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let own = self.folder.path().to_str().unwrap();
        let mounts = mounts.lines().filter(|line| line.contains(own));
        let mut found: Vec<_> = mounts.map(ToOwned::to_owned).collect();
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap();
        let groups = hierarchies.map(|entry| entry.unwrap().path().join(&self.namespace));
        let groups = groups.chain([Path::new("/sys/fs/cgroup").join(&self.namespace)]);
        for group in groups.filter(|group| group.is_dir()) {
            let inner = fs::read_dir(group).unwrap().map(|entry| entry.unwrap());
            let inner = inner.filter(|entry| entry.file_type().unwrap().is_dir());
            found.extend(inner.map(|entry| entry.path().display().to_string()));
        }
        let folders = machines
            .iter()
            .map(|name| Path::new("/run/edgevmm").join(name));
        let records = ["a", "b"].map(|id| self.bundle_path(id).join("edgevmm.json"));
        let files = folders.chain(records).filter(|path| path.exists());
        found.extend(files.map(|path| path.display().to_string()));
        found
    }

    /// Name of a container's machine.
    pub fn machine(&self, id: &str) -> Option<String> {
        let record = fs::read(self.bundle_path(id).join("edgevmm.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        record["machine"].as_str().map(ToOwned::to_owned)
    }

    /// Sockets in the folder of daemons.
    pub fn sockets(&self) -> usize {
        let folder = fs::read_dir(self.folder.path().join("s")).unwrap();
        let kinds = folder.map(|entry| entry.unwrap().file_type().unwrap());
        kinds.filter(FileTypeExt::is_socket).count()
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // A failed test leaves nothing running: the daemon takes its containers along.
        let command = format!("-id a -socket {}", self.socket.display());
        for pid in processes(|line| line.contains(&command)) {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        for id in ["a", "b"] {
            if self.bundle_path(id).exists() {
                let _ = self.command(id, "delete", &[]);
            }
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(hierarchy.path().join(&self.namespace));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.namespace));
        let _ = fs::remove_dir(Path::new("/run/containerd/runc").join(&self.namespace));
    }
}

/// A name from that of a new folder, which is unique.
fn unique(folder: &Path) -> String {
    let name = folder.file_name().unwrap().to_str().unwrap();
    format!("test-{}", name.trim_start_matches(['.', 't', 'm', 'p']))
}

/// What names a container, or a program in it.
pub fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    }
}

/// IDs of processes whose command line is as `wanted`.
fn processes(wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        wanted(&String::from_utf8_lossy(&line).replace('\0', " "))
    })
    .collect()
}

/// IDs of a process's children, also of those that ended and nobody waited for.
pub fn children(of: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1));
        parent.and_then(|parent| parent.parse().ok()) == Some(of)
    })
    .collect()
}

/// Number of a process's file descriptors.
pub fn descriptors(of: u32) -> usize {
    fs::read_dir(format!("/proc/{of}/fd")).unwrap().count()
}

/// Memory of a process's own in KiB. Its program's file is none of it, which may be dirty as it was
/// built just now.
pub fn memory(of: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{of}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Anonymous:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

/// Waits until `done`.
pub async fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
