//! The command line: what each task is called and does.

mod bench;
mod build;
mod dist;
mod guests;
mod images;
mod lab;
mod pods;
mod run;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::kvm;

/// Tasks of the edgevmm project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Run(run::RunCommand),
    Test(test::TestCommand),
    Lab(Box<lab::LabCommand>),
    Images(images::ImagesCommand),
    Bench(bench::BenchCommand),
    Guests(guests::GuestsCommand),
    Pods(pods::PodsCommand),
    Dist(dist::DistCommand),
    /// Tell whether this host's KVM runs stock kernels; if not, tasks use the lab.
    ///
    /// Exit code 0 when it does, 1 when not.
    DoctorKvm {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The part of the lab that runs inside it.
    #[command(hide = true, subcommand)]
    Agent(AgentCommand),
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    Init,
    Serve,
    Probe,
}

impl Cli {
    /// Does what was asked for.
    ///
    /// # Errors
    /// Whatever the task returns.
    pub fn run(self) -> Result<ExitCode> {
        match self.task {
            Task::Run(command) => command.run(),
            Task::Test(command) => command.run(),
            Task::Lab(command) => command.run(),
            Task::Images(command) => command.run(),
            Task::Bench(command) => command.run(),
            Task::Guests(command) => command.run(),
            Task::Pods(command) => command.run(),
            Task::Dist(command) => command.run(),
            Task::DoctorKvm { json } => doctor_kvm(json),
            Task::Agent(AgentCommand::Init) => xtask::agent::init().map(|()| ExitCode::SUCCESS),
            Task::Agent(AgentCommand::Probe) => {
                xtask::bench::probe::serve().map(|()| ExitCode::SUCCESS)
            }
            Task::Agent(AgentCommand::Serve) => xtask::agent::serve().map(|()| ExitCode::SUCCESS),
        }
    }
}

fn doctor_kvm(json: bool) -> Result<ExitCode> {
    let verdict = kvm::host_kvm_runs_stock_kernels();
    if json {
        println!("{}", serde_json::to_string(&verdict)?);
    } else {
        println!("{verdict}");
    }
    let usable = verdict == kvm::KvmVerdict::Usable;
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
