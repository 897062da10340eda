//! The command line.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use edgevmm_kubevirt::crds;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};

use crate::controllers::{self, Shared};
use crate::manifests::{self, ManifestsArgs};
use crate::server::{self, ServerArgs};

/// Serves KubeVirt's API on edgevmm.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keep the machines of a cluster, until told to stop.
    Run(RunArgs),
    /// Write the definitions of the objects, for `kubectl apply -f -`.
    Crds,
    /// Write all that a cluster needs for the operator, for `kubectl apply -f -`.
    Manifests(ManifestsArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// How to reach the cluster: else as kubectl does, or as a pod does.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Container image for machines that boot from a claim, which need one by name only.
    #[arg(
        long,
        env = "EDGEVMM_IMAGE",
        default_value = "edgevmm.io/edgevmm:latest"
    )]
    image: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Does what the command line says.
pub fn run() -> Result<()> {
    match Cli::parse().command {
        Command::Run(args) => keep(args),
        Command::Crds => write_definitions(),
        Command::Manifests(args) => {
            let manifests = manifests::manifests(&args)?;
            let written = io::stdout().lock().write_all(manifests.as_bytes());
            written.context("Can't write the manifests")
        }
    }
}

fn keep(args: RunArgs) -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let config = match &args.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path);
                let file = file.with_context(|| format!("Can't read {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
            }
            None => Config::infer()
                .await
                .context("Can't tell how to reach the cluster")?,
        };
        let client = Client::try_from(config)?;
        let reporter = Reporter {
            controller: "edgevmm-operator".to_owned(),
            instance: None,
        };
        let shared = Shared {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            image: args.image,
        };
        let served = server::serve(shared.client.clone(), args.server.settings());
        tokio::select! {
            () = controllers::instance::run(shared.clone()) => Ok(()),
            () = controllers::machine::run(shared) => Ok(()),
            served = served => served,
        }
    })
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
