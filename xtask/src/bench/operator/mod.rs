//! The benchmark of the operator: how soon it does what objects say, what it asks of the API server
//! for that, and what it takes while nothing changes.
//!
//! API server and etcd are real, nodes are not: `tests/examples/operatorbench` says of each pod that it
//! runs, and measures; this starts it and writes the report.

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
use crate::progress::{note, step};

/// What a line of the measuring program begins with that tells how far it is.
pub const PROGRESS: &str = "progress: ";
/// What the line with its [`Measured`] begins with.
pub const RESULT: &str = "result: ";

/// What a run needs.
#[derive(Debug)]
pub struct OperatorBench {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The release build of `edgevmm-operator`.
    pub operator: PathBuf,
    /// `tests/examples/operatorbench`.
    pub bench: PathBuf,
    /// What is measured.
    pub plan: Plan,
}

/// What is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Instances that are made one after the other.
    pub singly: usize,
    /// Instances in the end.
    pub instances: usize,
    /// Nodes that they are spread over.
    pub nodes: usize,
    /// Seconds that it is left alone for, to see what it does then.
    pub idle: u64,
}

/// Everything that was measured in one run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct OperatorResults {
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
    /// Nodes.
    pub nodes: usize,
    /// More and more instances.
    pub steps: Vec<Step>,
    /// What the operator does when nothing changes.
    pub idle: Vec<Idle>,
}

/// Some instances more, until all run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Step {
    /// Whether each was made when the one before ran.
    pub singly: bool,
    /// Instances that are new.
    pub added: usize,
    /// Instances with them.
    pub instances: usize,
    /// From the first request for one until the last ran.
    pub seconds: f64,
    /// From the request for an instance until its pod was heard of, in ms.
    pub pod: Vec<f64>,
    /// From the node's request that says that the pod runs until the instance was heard to, in ms.
    pub running: Vec<f64>,
    /// What the operator asked of the API server, by kind.
    pub requests: BTreeMap<String, u64>,
}

/// What the operator does when nothing changes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Idle {
    /// Instances.
    pub instances: usize,
    /// For how long.
    pub seconds: f64,
    /// Its memory afterwards.
    pub memory: Memory,
    /// Its threads.
    pub threads: usize,
    /// How often they are woken, a second.
    pub wakeups: f64,
    /// CPU time in ms, a second.
    pub cpu: f64,
    /// What it asked of the API server, by kind.
    pub requests: BTreeMap<String, u64>,
}

impl OperatorBench {
    /// Measures everything.
    ///
    /// # Errors
    /// A part of Kubernetes does not run here.
    pub fn run(&self) -> Result<OperatorResults> {
        let mut git = Command::new("git");
        git.current_dir(&self.workspace);
        let mut results = OperatorResults {
            date: first_word(Command::new("date").arg("+%F"))?,
            commit: first_word(git.args(["describe", "--always", "--dirty"]))?,
            compiler: first_word(Command::new("rustc").arg("--version"))?,
            host: Some(Place::Here.measure(&Job::Machine)?),
            load: vec![load()],
            measured: Measured::default(),
        };
        results.measured = step("Measuring the operator", || self.measure())?;
        results.load.push(load());
        Ok(results)
    }

    fn measure(&self) -> Result<Measured> {
        let log = tempfile::NamedTempFile::new()?;
        let mut child = Command::new(&self.bench)
            .arg(serde_json::to_string(&self.plan)?)
            .env("EDGEVMM_OPERATOR_BIN", &self.operator)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen()?)
            .spawn()
            .context("Cannot start the measuring program")?;
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
pub fn write(results: &OperatorResults, dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    report::draw(results, dir)?;
    let text = report::markdown(results);
    fs::write(dir.join("operator.md"), &text)?;
    serde_json::to_writer_pretty(File::create(dir.join("operator.json"))?, results)?;
    Ok(text)
}
