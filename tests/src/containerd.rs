//! A containerd of the test's own, as a node has one.

use anyhow::{Context, Result, ensure};
use xtask::pods::Containerd;

use crate::command::{Command, Output};
use crate::daemon::Daemon;
use crate::host::Host;
use crate::prepare;

/// Makes an archive that containerd imports: arguments are folder of the content, name, archive, and
/// the program to run as a JSON list.
const ARCHIVE: &str = r#"
work=$(mktemp -d "$PWD/archive.XXXXXX")
tar -C "$1" --owner=0 --group=0 -cf "$work/layer.tar" .
diff=$(sha256sum < "$work/layer.tar")
cat > "$work/config.json" << EOF
{"architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z", "config": {"Entrypoint": $4},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:${diff%% *}"]}}
EOF
cat > "$work/manifest.json" << EOF
[{"Config": "config.json", "RepoTags": ["$2"], "Layers": ["layer.tar"]}]
EOF
tar -C "$work" -cf "$3" manifest.json config.json layer.tar
rm -r "$work"
"#;

/// Prints what containers left behind; arguments are the folders of the node and of machines.
const LEFTOVERS: &str = r#"
pgrep -af '^[^ ]*(containerd-shim-edgevmm-v1|/edgevmm run|/proc/self/exe hold)' || true
grep "$1" /proc/mounts | grep rootfs || true
find /run/edgevmm /run/containerd/s "$1/state" -mindepth 1 2> /dev/null \
    | grep -v -e '/io.containerd' || true
find /sys/fs/cgroup -type d -path '*/default/*'
"#;

/// The part of containerd's configuration without a kubelet.
const ALONE: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
enable_tls_streaming = false
"#;

/// A command that tries another one for a minute until it succeeds.
pub(crate) fn wait_for(command: &Command) -> Command {
    let script = r#"for i in $(seq 300); do "$@" > /dev/null 2>&1 && exit; sleep 0.2; done; "$@""#;
    Command::new("bash")
        .args(["-c", script, "wait"])
        .wrapping(command)
}

/// A containerd that runs on a host, with the shim on its path. Dropping it ends it, unless it is a
/// cluster's.
#[derive(Debug)]
pub struct Node<'h> {
    host: &'h Host,
    bin: String,
    namespace: &'static str,
    daemon: Daemon<'h>,
    is_ours: bool,
}

impl<'h> Node<'h> {
    /// Starts a containerd.
    ///
    /// # Errors
    /// It can't be had, or does not answer.
    pub fn start(host: &'h Host, which: Containerd) -> Result<Self> {
        let pods = prepare::pods()?;
        let bin = host.shared(&pods.containerd(which))?;
        let runc = host.shared(&pods.runc())?;
        let mut node = Self::at(host, &bin, &runc, "default");
        node.is_ours = true;
        node.configure(ALONE)?;
        node.run()?;
        Ok(node)
    }

    /// One for a kubelet, whose programs were copied to the host; it may run already.
    pub(crate) fn for_kubelet(host: &'h Host) -> Self {
        Self::at(host, &host.path("containerd"), &host.path("runc"), "k8s.io")
    }

    fn at(host: &'h Host, bin: &str, runc: &str, namespace: &'static str) -> Self {
        let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        // That runc is for the lab's C library; on this machine its own goes before.
        let path = if host.is_this_machine() {
            format!("{}:{bin}:{system}:{runc}", host.programs())
        } else {
            format!("{}:{bin}:{runc}:{system}", host.programs())
        };
        let containerd = Command::new(format!("{bin}/containerd"))
            .args(["--config", &host.path("node.toml")])
            .env("PATH", path);
        Self {
            host,
            bin: bin.to_owned(),
            namespace,
            daemon: Daemon::new(host, "containerd", containerd),
            is_ours: false,
        }
    }

    /// Writes its configuration, with more than where its files are.
    pub(crate) fn configure(&self, config: &str) -> Result<()> {
        let dir = self.host.path("node");
        let common = format!(
            "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
             [grpc]\naddress = \"{dir}/sock\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{dir}/opt\"\n"
        );
        self.host.write("node.toml", &format!("{common}{config}"))?;
        Ok(())
    }

    /// Kills containerd, and starts it again.
    ///
    /// # Errors
    /// It does not answer.
    pub fn restart(&self) -> Result<()> {
        self.daemon.end("KILL")?;
        self.run()
    }

    /// Kills containerd.
    ///
    /// # Errors
    /// It goes on.
    pub fn kill(&self) -> Result<()> {
        self.daemon.end("KILL")
    }

    /// Starts containerd, which was killed.
    ///
    /// # Errors
    /// It does not answer.
    pub fn run(&self) -> Result<()> {
        self.daemon.start()?;
        let wait = wait_for(&self.ctr(["version"]));
        self.host.ok(&wait).context("containerd does not answer")?;
        Ok(())
    }

    /// A call of `ctr`.
    #[must_use]
    pub fn ctr<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(format!("{}/ctr", self.bin))
            .args(["--address", &self.host.path("node/sock")])
            .args(["--namespace", self.namespace])
            .args(arguments)
    }

    /// A call of `ctr` that starts a container by the shim, its options first.
    #[must_use]
    pub fn ctr_run(&self, options: &[&str], image: &str, name: &str) -> Command {
        let run = ["run", "--runtime", "io.containerd.edgevmm.v1"];
        self.ctr(run.iter().chain(options).chain(&[image, name]).copied())
    }

    /// Makes an image of a folder.
    ///
    /// # Errors
    /// containerd does not take it.
    pub fn import(&self, folder: &str, name: &str) -> Result<()> {
        self.import_program(folder, name, &[])
    }

    /// Makes an image of a folder whose containers run a program.
    ///
    /// # Errors
    /// containerd does not take it.
    pub fn import_program(&self, folder: &str, name: &str, program: &[&str]) -> Result<()> {
        let archive = self.host.path("image.tar");
        let program = serde_json::to_string(program)?;
        let arguments = ["-ec", ARCHIVE, "archive", folder, name, &archive, &program];
        self.host.ok(&Command::new("bash").args(arguments))?;
        self.host.ok(&self.ctr(["images", "import", &archive]))?;
        Ok(())
    }

    /// The state of a container's task.
    ///
    /// # Errors
    /// It has none.
    pub fn state(&self, name: &str) -> Result<String> {
        Ok(self.task(name)?[2].clone())
    }

    /// What `ctr` tells of a task: its container, process ID and state.
    fn task(&self, name: &str) -> Result<[String; 3]> {
        let tasks = self.host.ok(&self.ctr(["tasks", "ls"]))?;
        let line = tasks.lines().find(|line| line.starts_with(name));
        let words = line.context("There is no such task")?.split_whitespace();
        let words: Vec<_> = words.map(str::to_owned).collect();
        words.try_into().ok().context("ctr says something else")
    }

    /// The process ID of a container's task.
    ///
    /// # Errors
    /// It has none.
    pub fn pid(&self, name: &str) -> Result<String> {
        Ok(self.task(name)?[1].clone())
    }

    /// Waits for a task's end, removes it, and gives what that says, such as an exit code that is
    /// not 0.
    ///
    /// # Errors
    /// It does not end.
    pub fn end(&self, name: &str) -> Result<Output> {
        let script = r#"for i in $(seq 600); do
            "$@" tasks ls | grep -q "^$0 .*STOPPED" && break; sleep 0.2
        done; "$@" tasks rm "$0""#;
        let mut wait = Command::new("bash").args(["-c", script, name]);
        wait = wait.wrapping(&self.ctr(Vec::<String>::new()));
        self.host.run(&wait)
    }

    /// Fails when any container left something behind.
    ///
    /// # Errors
    /// What is left.
    pub fn expect_clean(&self) -> Result<()> {
        let look = ["-c", LEFTOVERS, "leftovers", &self.host.path("node")];
        let left = self.host.ok(&Command::new("bash").args(look))?;
        ensure!(left.is_empty(), "Containers left behind: {left}");
        Ok(())
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if self.is_ours {
            let _ = self.daemon.end("TERM");
        }
    }
}
