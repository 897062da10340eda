//! A Kubernetes of one node, on a host of the test's own.

mod make;

use anyhow::{Context, Result};
use xtask::lab::Machine;

use crate::command::Command;
use crate::containerd::Node;
use crate::host::{Host, Limit};
use crate::prepare;

pub(crate) use make::saved;

/// What it runs on.
pub(crate) const MACHINE: Machine = Machine {
    cpus: 4,
    memory_mib: 6144,
    drives: Vec::new(),
};

/// Asks Kubernetes without `kubectl`, whose start alone takes a second in a lab, until the answer is as
/// wanted: arguments are the address, a program that reads the answer, and its arguments.
const UNTIL: &str = r#"address=$0 end=$(($(date +%s) + 400))
until answer=$(busybox wget -q -O - "$address" 2>&1) && printf %s "$answer" | "$@"; do
    [ $(date +%s) -lt $end ] || { echo "Not as wanted: $*"; printf %s "$answer" | tail -c 3000; exit 1; }
    sleep 0.5
done"#;

/// Waits until nothing is left of pods: processes, networks, control groups and volumes.
const LEFTOVERS: &str = r#"for i in $(seq 300); do
    left=$(pgrep -af '^[^ ]*containerd-shim'; ip -o link show type veth; grep ' nsfs ' /proc/mounts
        grep volumes/kubernetes.io /proc/mounts; find /sys/fs/cgroup/kubepods -type d -name 'pod*')
    [ -z "$left" ] && exit; sleep 0.3
done; echo "$left"; exit 1"#;

/// What the reader of a failure wants to know; its arguments are `kubectl`.
const REPORT: &str = r#"exec 2>&1
"$@" get pods -o wide; "$@" describe pods | tail -n 80
for pod in $("$@" get pods -o name); do
    echo "--- $pod"; "$@" logs --all-containers --tail=8 "$pod"
done
grep -v level=info containerd.log | tail -n 20 | cut -c -600"#;

/// Where `kubectl proxy` listens.
const PROXY: &str = "http://127.0.0.1:8001";

/// Kubernetes as it runs: node `node1` with containerd and the images `local.test/busybox:1`,
/// `local.test/mini:1` (a machine with the mini disk) and `local.test/guest:1` (a kernel in `/boot`
/// whose initial RAM disk runs the script of a ConfigMap or serves its address at port 80).
#[derive(Debug)]
pub struct Cluster<'h> {
    /// What it runs on.
    pub host: &'h Host,
    /// The node's containerd.
    pub node: Node<'h>,
}

impl<'h> Cluster<'h> {
    /// Starts one on this machine. None where there are no programs for it.
    ///
    /// # Errors
    /// A part of it can't be had, or does not start.
    pub fn start(host: &'h Host) -> Result<Option<Self>> {
        let pods = prepare::pods()?;
        let kubernetes = pods.kubernetes()?;
        kubernetes
            .map(|kubernetes| make::make(host, &pods, &kubernetes))
            .transpose()
    }

    /// The one that runs on a host, or will.
    pub(crate) fn on(host: &'h Host) -> Self {
        Self {
            host,
            node: Node::for_kubelet(host),
        }
    }

    /// A call of `kubectl`.
    #[must_use]
    pub fn kubectl<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(self.host.path("kubernetes/kubectl"))
            .args(["--kubeconfig", &self.host.path("secrets/admin.conf")])
            .args(["--cache-dir", &self.host.path("kubectl")])
            .args(arguments)
    }

    /// A call of `kubectl`, its arguments separated by spaces, that must succeed; gives its stdout.
    ///
    /// # Errors
    /// It fails.
    pub fn ok(&self, arguments: &str) -> Result<String> {
        self.host.ok(&self.kubectl(arguments.split_whitespace()))
    }

    /// Makes or changes objects.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &str) -> Result<()> {
        let file = self.host.write("objects.yaml", objects)?;
        self.host
            .ok(&self.kubectl(["apply", "--validate=false", "-f", &file]))?;
        Ok(())
    }

    /// What an expression of `jq` makes of an object, such as `pods/web`.
    ///
    /// # Errors
    /// There is no such object.
    pub fn get(&self, object: &str, expression: &str) -> Result<String> {
        let address = address(object);
        let script = r#"set -o pipefail; busybox wget -q -O - "$0" | jq -r "$1""#;
        let get = Command::new("bash").args(["-c", script, &address, expression]);
        self.host.ok(&get)
    }

    /// Waits until an expression of `jq` is true for an object, such as `pods/web`, and gives its
    /// value.
    ///
    /// # Errors
    /// It does not come true in time, with the object as it is.
    pub fn until(&self, object: &str, expression: &str) -> Result<String> {
        self.answer(object, &["jq", "-e", "-r", expression])
    }

    /// Waits until a pod is in a phase.
    ///
    /// # Errors
    /// It does not get there.
    pub fn until_phase(&self, pod: &str, phase: &str) -> Result<()> {
        let expression = format!(".status.phase == {phase:?}");
        self.until(&format!("pods/{pod}"), &expression).map(drop)
    }

    /// Waits until a pod is ready.
    ///
    /// # Errors
    /// It does not get there.
    pub fn until_ready(&self, pod: &str) -> Result<()> {
        let ready = r#".status.conditions[]? | select(.type == "Ready") | .status == "True""#;
        self.until(&format!("pods/{pod}"), ready).map(drop)
    }

    /// Waits until a pod's log has a line with what an expression of `grep` says; gives the line. For
    /// a container of several: `POD/log?container=NAME`.
    ///
    /// # Errors
    /// It does not come.
    pub fn until_log(&self, pod: &str, line: &str) -> Result<String> {
        let log = if pod.contains('/') {
            pod.to_owned()
        } else {
            format!("{pod}/log")
        };
        self.answer(
            &format!("pods/{log}"),
            &["grep", "-a", "-m", "1", "-e", line],
        )
    }

    fn answer(&self, object: &str, reader: &[&str]) -> Result<String> {
        let until = Command::new("bash").args(["-c", UNTIL, &address(object)]);
        let until = until.args(reader.iter().copied());
        let output = self.host.run_for(&until, Limit::Boot)?;
        Ok(output.expect_code(0)?.to_owned())
    }

    /// A pod's address.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self, pod: &str) -> Result<String> {
        self.get(&format!("pods/{pod}"), ".status.podIP")
    }

    /// Has what `kubectl delete` takes these words for deleted. Objects of pods may stay for a minute,
    /// as this kubelet looks after containers that have ended no more often.
    ///
    /// # Errors
    /// There is no such thing.
    pub fn delete(&self, what: &str) -> Result<()> {
        self.ok(&format!("delete --wait=false {what}")).map(drop)
    }

    /// Waits until nothing is left of pods, which were deleted.
    ///
    /// # Errors
    /// What is left.
    pub fn expect_clean(&self) -> Result<()> {
        let look = Command::new("bash").args(["-c", LEFTOVERS]);
        self.host.ok(&look).context("Pods left that behind")?;
        self.node.expect_clean()
    }

    /// Kills the kubelet.
    ///
    /// # Errors
    /// It goes on.
    pub fn kill_kubelet(&self) -> Result<()> {
        self.kubelet().end("KILL")
    }

    /// Starts the kubelet, which was killed.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_kubelet(&self) -> Result<()> {
        self.kubelet().start()
    }

    /// What Kubernetes and containerd tell of all pods, for the reader of a failure.
    pub(crate) fn report(&self) {
        let report = Command::new("bash").args(["-c", REPORT, "report"]);
        let none: [&str; 0] = [];
        let _ = self.host.run(&report.wrapping(&self.kubectl(none)));
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        if self.host.is_this_machine() {
            let script = "pids=$(cat $(ls -t *.pid)); kill $pids
                for i in $(seq 100); do kill -0 $pids 2> /dev/null || exit 0; sleep 0.1; done";
            let _ = self.host.run(&Command::script(script));
        }
    }
}

/// Where the proxy has an object, of the default namespace unless a path says otherwise.
fn address(object: &str) -> String {
    if object.starts_with('/') {
        format!("{PROXY}{object}")
    } else {
        format!("{PROXY}/api/v1/namespaces/default/{object}")
    }
}
