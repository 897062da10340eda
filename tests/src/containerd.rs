//! A containerd of the test's own, as a node has one.

use anyhow::{Context, Result, ensure};
use xtask::pods::Containerd;

use crate::command::{Command, Output};
use crate::host::Host;
use crate::prepare;
use crate::process::Process;

/// Makes an archive that containerd imports: arguments are folder of the content, name, archive.
const ARCHIVE: &str = r#"
work=$(mktemp -d "$PWD/archive.XXXXXX")
tar -C "$1" --owner=0 --group=0 -cf "$work/layer.tar" .
diff=$(sha256sum < "$work/layer.tar")
cat > "$work/config.json" << EOF
{"architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z", "config": {},
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
pgrep -lx 'containerd-shim|edgevmm' || true
grep "$1" /proc/mounts | grep rootfs || true
find /run/edgevmm /run/containerd/s "$1/state" -mindepth 1 2> /dev/null \
    | grep -v -e '/io.containerd' || true
find /sys/fs/cgroup -type d -path '*/default/*'
"#;

/// A containerd that runs on a host, with the shim on its path. Dropping it ends it.
#[derive(Debug)]
pub struct Node<'h> {
    host: &'h Host,
    bin: String,
    path: String,
    process: Option<Process<'h>>,
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
        let path = format!(
            "{}:{bin}:{runc}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            host.programs()
        );
        let mut node = Self {
            host,
            bin,
            path,
            process: None,
        };
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
        let dir = self.host.path("node");
        let config = self.host.write(
            "node.toml",
            &format!(
                "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.runtime\", \
                 \"io.containerd.cri.v1.images\"]\n\
                 [grpc]\naddress = \"{dir}/sock\"\n\
                 [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{dir}/opt\"\n"
            ),
        )?;
        let containerd = Command::new(format!("{}/containerd", self.bin));
        let containerd = containerd
            .args(["--config", &config])
            .env("PATH", &*self.path);
        self.process = Some(self.host.spawn(&containerd)?);
        let ctr = format!("{}/ctr", self.bin);
        let wait = Command::new("bash").args([
            "-ec",
            r#"for i in $(seq 300); do "$@" > /dev/null 2>&1 && exit; sleep 0.2; done; exit 1"#,
            "wait",
            &ctr,
            "--address",
            &format!("{dir}/sock"),
            "version",
        ]);
        self.host.ok(&wait).context("containerd does not answer")?;
        Ok(())
    }

    /// A call of `ctr`.
    #[must_use]
    pub fn ctr<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(format!("{}/ctr", self.bin))
            .args(["--address", &self.host.path("node/sock")])
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
        let archive = self.host.path("image.tar");
        let make = Command::new("bash").args(["-ec", ARCHIVE, "archive", folder, name, &archive]);
        self.host.ok(&make)?;
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
