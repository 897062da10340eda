//! The benchmark of pods: what one that is a machine takes to start and costs while it idles,
//! against one of ordinary containers, under a real kubelet on this host.
//!
//! The guest is a payload that any KVM runs, so figures are those of the runtime and not of a
//! kernel's boot. `tests/examples/podbench` measures, in namespaces of its own, with the same
//! Kubernetes that the end-to-end tests have; this starts it and writes the report.

mod report;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::memory::Memory;
use super::probe::{Job, Machine};
use super::{Place, first_word, load};
use crate::process;
use crate::progress::{note, step};

pub use super::payload::{FIRST_BYTE, Then, elf};

/// The cgroup below which the kubelet of a run has all of its own.
pub const CGROUP: &str = "edgevmm-bench";
/// What a line of the measuring program begins with that tells how far it is.
pub const PROGRESS: &str = "progress: ";
/// What the line with its [`Measured`] begins with.
pub const RESULT: &str = "result: ";

/// Gives the run folders, processes and a network of its own, so that nothing of it stays and no
/// other Kubernetes sees it, and puts back what a kubelet sets for the whole machine.
const INSIDE: &str = r#"
set -e
mkdir -p -m 0700 /run/edgevmm; mount -t tmpfs -o mode=0700 tmpfs /run/edgevmm
for folder in /run/containerd /run/netns /var/lib/kubelet /var/lib/cni /var/log; do
    mkdir -p $folder; mount -t tmpfs -o mode=0755 tmpfs $folder
done
saved=$(cd /proc/sys; for file in vm/overcommit_memory vm/panic_on_oom kernel/panic \
    kernel/panic_on_oops kernel/keys/root_maxbytes kernel/keys/root_maxkeys; do
    echo "$(cat $file) $file"; done)
trap 'cd /proc/sys; echo "$saved" | while read value file; do echo $value > $file; done' EXIT
"$0" "$@"
"#;

/// Removes the cgroups of a run, which has ended.
const CLEAN: &str = r#"find /sys/fs/cgroup -depth -type d -path "*/$0*" -exec rmdir {} +"#;

/// What a run needs.
#[derive(Debug)]
pub struct PodBench {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The release build, with the shim beside it.
    pub edgevmm: PathBuf,
    /// `tests/examples/podbench`.
    pub podbench: PathBuf,
    /// What is measured.
    pub plan: Plan,
}

/// What is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Starts of each kind of pod.
    pub rounds: usize,
    /// Machines that idle side by side in the end.
    pub pods: usize,
}

/// Everything that was measured in one run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PodResults {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The commit of this checkout.
    pub commit: String,
    /// The compiler.
    pub compiler: String,
    /// The machine.
    pub host: Option<Machine>,
    /// Load average before and after.
    pub load: Vec<f64>,
    /// What was measured.
    pub measured: Measured,
}

/// What the measuring program measures.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Versions of what runs the pods.
    pub versions: Vec<String>,
    /// Times of starts.
    pub starts: Vec<Starts>,
    /// What processes of a machine's pod take when there is one, by what they are.
    pub alone: BTreeMap<String, Memory>,
    /// The same of an ordinary pod.
    pub alone_ordinary: BTreeMap<String, Memory>,
    /// More and more machines.
    pub density: Vec<Density>,
    /// What all processes of machines' pods do while guests idle, by what they are.
    pub idle: BTreeMap<String, Activity>,
    /// What the RuntimeClass declares as a pod's overhead.
    pub declared: String,
}

/// Times from a call to the first output of what it starts, in ms.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Starts {
    /// The call, and what answers it.
    pub by: String,
    /// Of machines.
    pub machines: Vec<f64>,
    /// Of ordinary containers.
    pub ordinary: Vec<f64>,
}

/// Pods that are machines, side by side.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Density {
    /// Their number.
    pub pods: usize,
    /// Their processes' memory beyond the guests' RAM, shared pages by their part, in KiB.
    pub pss: u64,
    /// Pages that one process alone has written to, in KiB.
    pub private_dirty: u64,
    /// What their control groups are charged with beyond the guests' RAM, the kernel's part
    /// included, in KiB.
    pub charged: u64,
    /// RAM that the guests have touched, in KiB.
    pub touched: u64,
}

/// What processes do, a second.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Activity {
    /// Their number.
    pub processes: usize,
    /// How often their threads are woken.
    pub wakeups: f64,
    /// CPU time in ms.
    pub cpu: f64,
}

impl PodBench {
    /// Measures everything.
    ///
    /// # Errors
    /// This is not root, or a part of Kubernetes does not run here.
    pub fn run(&self) -> Result<PodResults> {
        let mut git = Command::new("git");
        git.current_dir(&self.workspace);
        let mut results = PodResults {
            date: first_word(Command::new("date").arg("+%F"))?,
            commit: first_word(git.args(["describe", "--always", "--dirty"]))?,
            compiler: first_word(Command::new("rustc").arg("--version"))?,
            host: Some(Place::Here.measure(&Job::Machine)?),
            load: vec![load()],
            measured: Measured::default(),
        };
        let measured = step("Measuring pods", || self.measure());
        let clean = process::output(Command::new("bash").args(["-c", CLEAN, CGROUP]));
        results.measured = measured?;
        clean?;
        results.load.push(load());
        Ok(results)
    }

    fn measure(&self) -> Result<Measured> {
        let log = tempfile::NamedTempFile::new()?;
        let mut child = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child"])
            .args(["--mount-proc", "bash", "-c", INSIDE])
            .arg(&self.podbench)
            .arg(serde_json::to_string(&self.plan)?)
            .env("EDGEVMM_BIN", &self.edgevmm)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen()?)
            .spawn()
            .context("Cannot start unshare")?;
        let stdout = child.stdout.take().context("No output")?;
        let mut measured = None;
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            if let Some(text) = line.strip_prefix(PROGRESS) {
                note(text);
            } else if let Some(text) = line.strip_prefix(RESULT) {
                measured = Some(serde_json::from_str(text)?);
            }
        }
        let status = child.wait()?;
        match measured {
            Some(measured) if status.success() => Ok(measured),
            _ => bail!("{status}:\n{}", fs::read_to_string(log.path())?),
        }
    }
}

/// Writes report, pictures and figures to `dir`, and returns the report.
///
/// # Errors
/// A file cannot be written.
pub fn write(results: &PodResults, dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    report::draw(results, dir)?;
    let text = report::markdown(results);
    fs::write(dir.join("pods.md"), &text)?;
    serde_json::to_writer_pretty(File::create(dir.join("pods.json"))?, results)?;
    Ok(text)
}
