//! containerd's runtime shim for pods whose containers are virtual machines.
//!
//! containerd starts it as `containerd-shim-edgevmm-v1 ... start`, which leaves a daemon behind that
//! serves the task API for all containers of a pod, and as `... delete` to clear up after a daemon
//! that died.

mod annotations;
mod beneath;
mod bootstrap;
mod cgroup;
mod cli;
mod daemon;
mod delete;
mod disks;
mod events;
mod holder;
mod image;
mod machine;
mod network;
mod process;
mod record;
mod rootfs;
mod runc;
mod seed;
mod service;
mod spec;
mod start;
mod stats;
mod task;
mod terminal;
mod vmm;
mod volumes;

use std::io::Write;
use std::process::ExitCode;

use cli::{Action, Cli};
use edgevmm_shim::{proto, ttrpc};

/// What this program is called in its answers.
const NAME: &str = "io.containerd.edgevmm.v1";

/// A failure of one of the commands.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Failure> {
    let cli = Cli::parse(std::env::args_os().skip(1))?;
    match cli.action {
        Action::Start => start::run(&cli)?,
        Action::Daemon => daemon::run(&cli)?,
        Action::Delete => delete::run(&cli)?,
        Action::Hold => return holder::run(),
        Action::Info => std::io::stdout().write_all(&bootstrap::info())?,
        Action::Version => println!("containerd-shim-edgevmm-v1 {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = causes.map(ToString::to_string).collect();
    texts.join(": ").replace('\n', " ")
}
