//! A containerd of the test's own, as a node has one.

use anyhow::{Context, Result, ensure};
use xtask::pods::Containerd;

use crate::command::{Command, Output};
use crate::host::Host;
use crate::prepare;
use crate::process::Process;

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

/// The part of it for a kubelet. It may not lower a process's score for lack of memory in a lab.
fn for_kubelet(plugins: &str, networks: &str) -> String {
    format!(
        r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{SANDBOX_IMAGE}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.edgevmm]
runtime_type = "io.containerd.edgevmm.v1"
pod_annotations = ["edgevmm.io/*"]
container_annotations = ["edgevmm.io/*"]
"#
    )
}

/// What containers are made of that only keep a pod's namespaces.
pub(crate) const SANDBOX_IMAGE: &str = "local.test/sandbox:1";

/// A command that tries another one for a minute until it succeeds.
pub(crate) fn wait_for(command: &Command) -> Command {
    let script = r#"for i in $(seq 300); do "$@" > /dev/null 2>&1 && exit; sleep 0.2; done; "$@""#;
    Command::new("bash")
        .args(["-c", script, "wait"])
        .wrapping(command)
}

/// A containerd that runs on a host, with the shim on its path. Dropping it ends it.
#[derive(Debug)]
pub struct Node<'h> {
    host: &'h Host,
    bin: String,
    path: String,
    namespace: String,
    process: Option<Process<'h>>,
}

impl<'h> Node<'h> {
    /// Starts a containerd.
    ///
    /// # Errors
    /// It can't be had, or does not answer.
    pub fn start(host: &'h Host, which: Containerd) -> Result<Self> {
        Self::with(host, which, ALONE, "default")
    }

    /// Starts a containerd as a kubelet needs it.
    pub(crate) fn for_kubelet(host: &'h Host, which: Containerd) -> Result<Self> {
        let plugins = host.shared(&prepare::pods()?.plugins())?;
        let networks = host.path("networks");
        let mut config = for_kubelet(&plugins, &networks);
        if host.is_this_machine() {
            // Here it may be forbidden to lower the score of a process.
            config = config.replace(
                "sandbox_image",
                "restrict_oom_score_adj = true\nsandbox_image",
            );
        }
        Self::with(host, which, &config, "k8s.io")
    }

    fn with(host: &'h Host, which: Containerd, config: &str, namespace: &str) -> Result<Self> {
        let pods = prepare::pods()?;
        let bin = host.shared(&pods.containerd(which))?;
        let runc = host.shared(&pods.runc())?;
        let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        // That runc is for the lab's C library; on this machine its own goes before.
        let path = if host.is_this_machine() {
            format!("{}:{bin}:{system}:{runc}", host.programs())
        } else {
            format!("{}:{bin}:{runc}:{system}", host.programs())
        };
        let mut node = Self {
            host,
            bin,
            path,
            namespace: namespace.to_owned(),
            process: None,
        };
        let dir = host.path("node");
        let common = format!(
            "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
             [grpc]\naddress = \"{dir}/sock\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{dir}/opt\"\n"
        );
        host.write("node.toml", &format!("{common}{config}"))?;
        node.run_containerd()?;
        Ok(node)
    }

    /// Kills containerd, and starts it again.
    ///
    /// # Errors
    /// It does not answer.
    pub fn restart(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.signal(9)?;
            let _ = process.wait(self.host.limit(crate::Limit::Command));
        }
        self.run_containerd()
    }

    fn run_containerd(&mut self) -> Result<()> {
        let config = self.host.path("node.toml");
        let containerd = Command::new(format!("{}/containerd", self.bin));
        let containerd = containerd
            .args(["--config", &config])
            .env("PATH", &*self.path);
        self.process = Some(self.host.spawn(&containerd)?);
        let wait = wait_for(&self.ctr(["version"]));
        self.host.ok(&wait).context("containerd does not answer")?;
        Ok(())
    }

    /// A call of `ctr`.
    #[must_use]
    pub fn ctr<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(format!("{}/ctr", self.bin))
            .args(["--address", &self.host.path("node/sock")])
            .args(["--namespace", &self.namespace])
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
        let tasks = self.host.ok(&self.ctr(["tasks", "ls"]))?;
        let line = tasks.lines().find(|line| line.starts_with(name));
        let state = line.and_then(|line| line.split_whitespace().nth(2));
        Ok(state.context("There is no such task")?.to_owned())
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
        if let Some(process) = &self.process {
            let _ = process.signal(15);
        }
    }
}
