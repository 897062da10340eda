//! `edgevmm-operator`: keeps the machines of a cluster as KubeVirt's objects say, by pods whose
//! runtime class is edgevmm. One process, no daemon on nodes; it hears of changes by watching.

mod cli;
mod control;
mod controllers;
mod manifests;
mod server;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
