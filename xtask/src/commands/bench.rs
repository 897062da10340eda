//! `cargo xtask bench`: measure edgevmm and QEMU, and write the report.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use xtask::bench::disks::{self, DiskBench, DiskResults};
use xtask::bench::operator::{self, OperatorBench, OperatorResults};
use xtask::bench::pods::{self, Plan, PodBench, PodResults};
use xtask::bench::results::Results;
use xtask::bench::{self, Bench};
use xtask::host;
use xtask::images::{Image, Images};
use xtask::kvm::{self, KvmVerdict};
use xtask::lab::Layout;
use xtask::pods::Pods;
use xtask::progress::note;

use super::{build, lab};

/// Measure edgevmm and QEMU in one run, and write table and plots.
///
/// Kernels boot on this host where its KVM can, else inside the nested-KVM lab. What is compared is
/// in benches/.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchCommand {
    #[command(subcommand)]
    part: Option<Part>,
    /// Boots of each VMM; 0 leaves out what needs a kernel.
    #[arg(long, value_name = "N", default_value_t = 3)]
    boots: usize,
    /// Starts of each VMM with a payload.
    #[arg(long, value_name = "N", default_value_t = 60)]
    starts: usize,
    /// Measure this program instead of building one.
    #[arg(long, value_name = "FILE")]
    edgevmm: Option<PathBuf>,
    /// Measure nothing: write the report anew from the results.json of an earlier run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["boots", "starts", "edgevmm"])]
    from: Option<PathBuf>,
    /// Where to write the report [default: docs/bench].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Part {
    Disks(DisksCommand),
    Operator(OperatorCommand),
    Pods(PodsCommand),
}

/// Measure disks only: natively against `qemu-img bench`, and in a guest against QEMU's.
#[derive(Debug, Args)]
struct DisksCommand {
    /// Runs of each contestant in each case on this host; 0 leaves those out.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Boots of each VMM; 0 leaves out what needs a guest.
    #[arg(long, value_name = "N", default_value_t = 3)]
    boots: usize,
    /// The directory whose file system is measured; takes 3 GB [default: where this program is].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Measure nothing: write the report anew from the disks.json of an earlier run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rounds", "boots", "dir"])]
    from: Option<PathBuf>,
    /// Where to write the report [default: docs/bench].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Measure pods only: a machine's against those of runc, under a real kubelet on this host.
///
/// The guests are bare payloads, so any KVM does. Takes root, and what `cargo xtask pods` gets.
#[derive(Debug, Args)]
struct PodsCommand {
    /// Starts of each kind of pod.
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: usize,
    /// Machines that run side by side in the end.
    #[arg(long, value_name = "N", default_value_t = 60)]
    pods: usize,
    /// Measure this program, with the shim beside it, instead of building one.
    #[arg(long, value_name = "FILE")]
    edgevmm: Option<PathBuf>,
    /// Measure nothing: write the report anew from the pods.json of an earlier run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rounds", "pods", "edgevmm"])]
    from: Option<PathBuf>,
    /// Where to write the report [default: docs/bench].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Measure the operator only: many machines' objects, against a real API server and nodes that only say
/// that pods run.
#[derive(Debug, Args)]
struct OperatorCommand {
    /// Instances that are made one after the other, at first.
    #[arg(long, value_name = "N", default_value_t = 50)]
    singly: usize,
    /// Instances in the end.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    instances: usize,
    /// Nodes that they are spread over.
    #[arg(long, value_name = "N", default_value_t = 50)]
    nodes: usize,
    /// Seconds that the operator is left alone for after each step.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    idle: u64,
    /// Measure this program instead of building one.
    #[arg(long, value_name = "FILE")]
    operator: Option<PathBuf>,
    /// Measure nothing: write the report anew from the operator.json of an earlier run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["singly", "instances", "nodes", "idle", "operator"])]
    from: Option<PathBuf>,
    /// Where to write the report [default: docs/bench].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl OperatorCommand {
    fn run(&self) -> Result<ExitCode> {
        let workspace = build::workspace();
        let results = match &self.from {
            Some(path) => read(path)?,
            None => self.measure(&workspace)?,
        };
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("docs/bench"));
        print!("{}", operator::write(&results, &out)?);
        note(&format!("the report is in {}", out.display()));
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, workspace: &Path) -> Result<OperatorResults> {
        let operator = match &self.operator {
            Some(path) => std::path::absolute(path)?,
            None => build::operator()?,
        };
        Pods::ensure()?.kubernetes()?;
        let bench = OperatorBench {
            workspace: workspace.to_owned(),
            operator,
            bench: build::operatorbench()?,
            plan: operator::Plan {
                singly: self.singly,
                instances: self.instances,
                nodes: self.nodes,
                idle: self.idle,
            },
        };
        bench.run()
    }
}

impl PodsCommand {
    fn run(&self) -> Result<ExitCode> {
        let workspace = build::workspace();
        let results = match &self.from {
            Some(path) => read(path)?,
            None => self.measure(&workspace)?,
        };
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("docs/bench"));
        print!("{}", pods::write(&results, &out)?);
        note(&format!("the report is in {}", out.display()));
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, workspace: &Path) -> Result<PodResults> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "A kubelet needs root: run this as root"
        );
        let edgevmm = match &self.edgevmm {
            Some(path) => std::path::absolute(path)?,
            None => build::release_binary()?,
        };
        if Command::new("runc").arg("--version").output().is_err() {
            host::install(&["runc"])?;
        }
        Pods::ensure()?.kubernetes()?;
        lab::ensure_lab(&Layout::of_this_user())?;
        let bench = PodBench {
            workspace: workspace.to_owned(),
            edgevmm,
            podbench: build::podbench()?,
            plan: Plan {
                rounds: self.rounds,
                pods: self.pods,
            },
        };
        bench.run()
    }
}

impl DisksCommand {
    fn run(&self) -> Result<ExitCode> {
        let workspace = build::workspace();
        let results = match &self.from {
            Some(path) => read(path)?,
            None => self.measure(&workspace)?,
        };
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("docs/bench"));
        print!("{}", disks::write(&results, &workspace, &out)?);
        note(&format!("the report is in {}", out.display()));
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, workspace: &Path) -> Result<DiskResults> {
        let xtask = std::env::current_exe().context("Cannot find this program")?;
        let beside = xtask.parent().context("This program is nowhere")?;
        let mut bench = DiskBench {
            workspace: workspace.to_owned(),
            edgevmm: None,
            blkbench: build::blkbench()?,
            dir: self.dir.clone().unwrap_or_else(|| beside.to_owned()),
            xtask,
            in_lab: false,
            rounds: self.rounds,
            boots: self.boots,
        };
        if self.boots > 0 {
            bench.edgevmm = Some(build::release_binary()?);
            disks::ensure_images()?;
            // Kernel and busybox of the guest are the lab's too.
            lab::ensure_lab(&Layout::of_this_user())?;
            bench.in_lab = kvm::host_kvm_runs_stock_kernels() != KvmVerdict::Usable;
        }
        bench.run()
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&fs::read(path)?)
        .with_context(|| format!("Cannot read {}", path.display()))
}

impl BenchCommand {
    /// Builds, measures and writes.
    ///
    /// # Errors
    /// edgevmm does not build or run.
    pub fn run(&self) -> Result<ExitCode> {
        match &self.part {
            Some(Part::Disks(disks)) => return disks.run(),
            Some(Part::Operator(operator)) => return operator.run(),
            Some(Part::Pods(pods)) => return pods.run(),
            None => {}
        }
        let workspace = build::workspace();
        let results = match &self.from {
            Some(path) => read(path)?,
            None => self.measure(&workspace)?,
        };
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("docs/bench"));
        print!("{}", bench::write(&results, &workspace, &out)?);
        note(&format!("the report is in {}", out.display()));
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, workspace: &Path) -> Result<Results> {
        let edgevmm = match &self.edgevmm {
            Some(path) => std::path::absolute(path)?,
            None => build::release_binary()?,
        };
        let verdict = kvm::host_kvm_runs_stock_kernels();
        let in_lab = verdict != KvmVerdict::Usable;
        if self.boots > 0 {
            Images::of_this_user().ensure(Image::Kernel)?;
            if in_lab {
                note(&format!(
                    "{verdict}; kernels boot inside the nested-KVM lab"
                ));
                lab::ensure_lab(&Layout::of_this_user())?;
            }
        }
        let bench = Bench {
            workspace: workspace.to_owned(),
            edgevmm,
            given: self.edgevmm.is_some(),
            xtask: std::env::current_exe().context("Cannot find this program")?,
            in_lab,
            boots: self.boots,
            starts: self.starts,
        };
        bench.run()
    }
}
