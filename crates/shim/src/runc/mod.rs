//! Ordinary containers beside a pod's machine, such as those that prepare its volumes: runc makes,
//! starts and removes them in the namespaces of the pod's sandbox.
//!
//! runc leaves once it has made a container, so the container's holder, which started runc, becomes
//! the parent of its first process and ends as that does. Left out: containers with a terminal,
//! containers that share their processes with the pod, and pausing.

mod kind;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub use kind::{check, is_machine};

use crate::Failure;
use crate::holder::output;

/// The program.
const PROGRAM: &str = "runc";
/// Where runc keeps what it knows of containers: containerd's own shim for runc has it there too, so
/// tools find all containers.
const ROOT: &str = "/run/containerd/runc";
/// File in the bundle for runc's messages.
const LOG: &str = "runc.log";
/// File in the bundle with the process ID.
const PID: &str = "runc.pid";
/// Longest log that is read, in bytes.
const MAX_LOG: u64 = 64 << 10;

/// A container of runc's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runc {
    /// runc itself.
    pub program: PathBuf,
    /// Where it keeps what it knows.
    pub root: PathBuf,
    /// Folder of the container.
    pub bundle: PathBuf,
    /// The container's ID.
    pub id: String,
}

/// A container that a holder makes and is the parent of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ordinary {
    /// The container.
    pub runc: Runc,
    /// FIFO of its input; none when empty.
    pub stdin: PathBuf,
    /// FIFO or file of its output; none when empty.
    pub stdout: PathBuf,
    /// FIFO or file of its messages; none when empty.
    pub stderr: PathBuf,
}

/// Keeps the FIFO of a container's input open for writing, so that it ends only when this is closed and
/// no client has it. None where there is no input.
///
/// # Errors
///
/// When it can't be opened.
pub fn keep_open(path: &Path) -> io::Result<Option<OwnedFd>> {
    if path.as_os_str().is_empty() || !fs::metadata(path)?.file_type().is_fifo() {
        return Ok(None);
    }
    // Opening an end waits for the other one, unless both are opened at once.
    let _both = File::options().read(true).write(true).open(path)?;
    Ok(Some(File::options().write(true).open(path)?.into()))
}

/// The input of a container, whose FIFO [`keep_open`] has open for writing.
fn reader(path: &Path) -> io::Result<Stdio> {
    if path.as_os_str().is_empty() {
        return Ok(Stdio::null());
    }
    Ok(File::open(path)?.into())
}

impl Ordinary {
    /// Makes the container. Returns the ID of its first process, which becomes a child of this one.
    ///
    /// # Errors
    ///
    /// When its streams can't be opened, or runc can't make it.
    pub fn create(&self) -> Result<Pid, Failure> {
        let open = || -> io::Result<[Stdio; 3]> {
            Ok([
                reader(&self.stdin)?,
                output(&self.stdout)?,
                output(&self.stderr)?,
            ])
        };
        let streams =
            open().map_err(|error| format!("Can't open the container's streams: {error}"))?;
        nix::sys::prctl::set_child_subreaper(true)?;
        self.runc.create(streams)
    }
}

impl Runc {
    /// The container `id` of a namespace of containerd's. `None` when the host has no runc.
    pub fn new(namespace: &str, id: &str, bundle: &Path) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut programs = std::env::split_paths(&path).map(|folder| folder.join(PROGRAM));
        Some(Self {
            program: programs.find(|path| path.is_absolute() && path.is_file())?,
            root: Path::new(ROOT).join(namespace),
            bundle: bundle.to_owned(),
            id: id.to_owned(),
        })
    }

    /// Makes the container, whose first process has these streams.
    fn create(&self, streams: [Stdio; 3]) -> Result<Pid, Failure> {
        let [stdin, stdout, stderr] = streams;
        let file = self.bundle.join(PID);
        let mut command = self.command();
        command.arg("create").arg("--bundle").arg(&self.bundle);
        command.arg("--pid-file").arg(&file).arg(&self.id);
        let status = command
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .status()?;
        if !status.success() {
            return Err(self.said());
        }
        let pid = fs::read_to_string(file)?;
        Ok(Pid::from_raw(pid.trim().parse()?))
    }

    /// ID of the container's first process.
    pub fn pid(&self) -> Option<i32> {
        let text = fs::read_to_string(self.bundle.join(PID)).ok()?;
        text.trim().parse().ok()
    }

    /// Lets the container run.
    ///
    /// # Errors
    ///
    /// What runc says.
    pub async fn start(&self) -> Result<(), Failure> {
        self.tell(&["start", &self.id]).await
    }

    /// Sends a signal to the container's first process.
    ///
    /// # Errors
    ///
    /// What runc says.
    pub async fn kill(&self, signal: i32) -> Result<(), Failure> {
        self.tell(&["kill", &self.id, &signal.to_string()]).await
    }

    /// Removes what there is of the container. That there is nothing is fine.
    ///
    /// # Errors
    ///
    /// When runc can't be started.
    pub fn delete(&self) -> io::Result<()> {
        let mut command = self.command();
        let command = command.args(["delete", "--force"]).arg(&self.id);
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null());
        silent.stderr(Stdio::null()).status().map(drop)
    }

    /// Arguments that run the program described in a file, by OCI's runtime specification, and have
    /// its process ID written to another.
    pub fn exec(&self, file: &Path, pid: &Path) -> Vec<String> {
        let root = self.root.display().to_string();
        let (file, pid) = (file.display().to_string(), pid.display().to_string());
        let options = ["--root", &root, "exec", "--process", &file];
        let words = options.into_iter().chain(["--pid-file", &pid, &self.id]);
        words.map(ToOwned::to_owned).collect()
    }

    async fn tell(&self, words: &[&str]) -> Result<(), Failure> {
        let mut command = tokio::process::Command::from(self.command());
        let silent = command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let ended = silent.stderr(Stdio::null()).status().await?;
        if ended.success() {
            Ok(())
        } else {
            Err(self.said())
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // Where systemd started containerd, runc would have the container tell that it is ready.
        command.env_remove("NOTIFY_SOCKET");
        command.arg("--root").arg(&self.root);
        // The container's streams are not for runc's messages.
        let log = self.bundle.join(LOG);
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        command
    }

    /// runc's last error.
    fn said(&self) -> Failure {
        let mut text = String::new();
        let read = File::open(self.bundle.join(LOG))
            .and_then(|file| file.take(MAX_LOG).read_to_string(&mut text));
        let error = match read {
            Ok(_) => last_error(&text),
            Err(_) => None,
        };
        format!(
            "runc: {}",
            error.as_deref().unwrap_or("it failed without a word")
        )
        .into()
    }
}

/// Has runc use the control group that was made for the container: by its path below the mount, as runc
/// takes it without systemd.
///
/// # Errors
///
/// When the specification can't be read or written.
pub fn use_group(bundle: &Path, group: &Path) -> Result<(), Failure> {
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    let wanted = Path::new("/").join(group).display().to_string();
    let linux = spec
        .get_mut("linux")
        .and_then(serde_json::Value::as_object_mut);
    let Some(linux) = linux else {
        return Err("The specification has nothing of Linux".into());
    };
    linux.insert("cgroupsPath".to_owned(), wanted.into());
    let new = bundle.join("config.json.new");
    fs::write(&new, serde_json::to_vec(&spec)?)?;
    Ok(fs::rename(new, path)?)
}

/// The last error in a log with a JSON object on each line.
fn last_error(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Message {
        level: String,
        msg: String,
    }
    let messages = text.lines().rev();
    let mut messages = messages.filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let error = messages.find(|message| ["error", "fatal"].contains(&&*message.level))?;
    Some(error.msg)
}

/// Waits for the end of a process, and clears up after others whose parent this process is. Returns
/// the exit status as shells have it.
///
/// # Errors
///
/// When it is no child of this process.
pub fn wait_for(pid: Pid) -> nix::Result<i32> {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(ended, status)) if ended == pid => return Ok(status),
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => {
                return Ok(128 + signal as i32);
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_error_is_told() {
        let log = r#"{"level":"error","msg":"first","time":"t"}
            {"level":"error","msg":"no such file","time":"t"}
            {"level":"warning","msg":"later","time":"t"}
            {"level":"#;
        assert_eq!(last_error(log).as_deref(), Some("no such file"));
        assert_eq!(last_error("x"), None);
    }

    #[test]
    fn input_ends_when_nobody_keeps_it_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let kept = keep_open(&path).unwrap();
        let mut cat = Command::new("cat");
        let cat = cat.stdin(reader(&path).unwrap()).stdout(Stdio::piped());
        let mut cat = cat.spawn().unwrap();
        for text in ["one ", "two"] {
            fs::write(&path, text).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(
            cat.try_wait().unwrap().is_none(),
            "It ended with its client"
        );
        drop(kept);
        assert_eq!(cat.wait_with_output().unwrap().stdout, b"one two");
        assert!(keep_open(Path::new("")).unwrap().is_none());
    }

    #[test]
    fn the_group_is_that_which_was_made() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().join("config.json");
        fs::write(
            &path,
            r#"{"a": [1.5], "linux": {"cgroupsPath": "s.slice:p:n"}}"#,
        )
        .unwrap();
        use_group(bundle.path(), Path::new("s.slice/p-n.scope")).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            r#"{"a":[1.5],"linux":{"cgroupsPath":"/s.slice/p-n.scope"}}"#
        );
    }

    /// A program in place of runc, which ends as `script` says.
    fn fake(script: &str) -> (tempfile::TempDir, Runc) {
        let bundle = tempfile::tempdir().unwrap();
        let program = bundle.path().join("runc");
        fs::write(
            &program,
            format!("#!/bin/sh\ncd {}\n{script}", bundle.path().display()),
        )
        .unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&program, executable).unwrap();
        let runc = Runc {
            program,
            root: "/r".into(),
            bundle: bundle.path().to_owned(),
            id: "c1".to_owned(),
        };
        (bundle, runc)
    }

    #[test]
    fn a_container_is_made_or_its_failure_told() {
        let streams = || [Stdio::null(), Stdio::null(), Stdio::null()];
        let (bundle, runc) = fake("echo \"$@\" > said; echo 77 > runc.pid");
        assert_eq!(runc.create(streams()).unwrap().as_raw(), 77);
        assert_eq!(runc.pid(), Some(77));
        let said = fs::read_to_string(bundle.path().join("said")).unwrap();
        assert!(
            said.starts_with("--root /r --log ") && said.ends_with(" c1\n"),
            "{said}"
        );
        let (_bundle, runc) =
            fake("echo '{\"level\":\"error\",\"msg\":\"broken\"}' > runc.log; exit 1");
        let error = runc.create(streams()).unwrap_err().to_string();
        assert_eq!(error, "runc: broken");
    }
}
