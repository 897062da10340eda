//! `cargo xtask pods`: get what runs containers and pods.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use xtask::pods::Pods;
use xtask::progress::note;

/// Get containerds, runc and network plugins, and build Kubernetes (in ~/.cache/edgevmm/pods or
/// $EDGEVMM_PODS), for the tests of pods.
///
/// Takes some minutes the first time, for Kubernetes.
#[derive(Debug, Args)]
pub struct PodsCommand {
    /// Leave out Kubernetes.
    #[arg(long)]
    no_kubernetes: bool,
}

impl PodsCommand {
    /// Makes what is missing.
    ///
    /// # Errors
    /// Something cannot be had or built.
    pub fn run(&self) -> Result<ExitCode> {
        let pods = Pods::ensure()?;
        println!("{}", pods.runc().display());
        if !self.no_kubernetes {
            match pods.kubernetes()? {
                Some(folder) => println!("{}", folder.display()),
                None => note("this distribution has no sources of Kubernetes"),
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
