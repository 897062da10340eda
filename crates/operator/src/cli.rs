//! The command line.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use edgevmm_kubevirt::crds;

/// Serves KubeVirt's API on edgevmm.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the definitions of the objects, for `kubectl apply -f -`.
    Crds,
}

/// Does what the command line says.
pub fn run() -> Result<()> {
    match Cli::parse().command {
        Command::Crds => write_definitions(),
    }
}

fn write_definitions() -> Result<()> {
    let list = serde_json::json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": crds::all()?,
    });
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &list)?;
    writeln!(out).context("Can't write the definitions")
}
