//! The virtual machine monitor: KVM, memory, boot, firmware tables and life cycle.
//!
//! [`run`] is the whole of it: it builds a machine from its config, serves its API and returns
//! when the guest has ended.

pub mod agent;
pub mod boot;
pub mod channel;
pub mod confinement;
pub mod console;
mod device_loop;
mod files;
mod heap;
pub mod kvm;
pub mod layout;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod service;
pub mod tables;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use edgevmm_api::{ExitRecord, MachineClaim};
use edgevmm_config::VmConfig;
use edgevmm_devices::virtio::console::Resizer;
use edgevmm_sandbox::Layers;
use edgevmm_sandbox::namespaces::host_pid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use agent::AgentService;
use console::ConsoleHub;
use files::HandedFiles;
use lifecycle::{Handle, Life, Mailbox, Terms};
use machine::Machine;
use service::{Facts, Service, Socket, Ways};

/// How long the API stays up for clients that wait for the end to hear of it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Events that the event loop takes from the kernel at once: there are a few sockets.
const IO_EVENTS: usize = 64;

/// Why a machine could not be started or kept running.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It can't be built.
    #[error(transparent)]
    Build(#[from] machine::BuildError),
    /// The API can't be served.
    #[error(transparent)]
    Serve(#[from] service::ServeError),
    /// The runtime that serves API and signals can't be had.
    #[error("Can't start the VMM's event loop")]
    Runtime(#[source] std::io::Error),
    /// Whoever waited for the start is gone or failed.
    #[error("Can't tell that the machine has started")]
    Announce(#[source] std::io::Error),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] edgevmm_sandbox::SandboxError),
    /// The machine's folder can't be written.
    #[error(transparent)]
    Folder(#[from] edgevmm_api::RuntimeDirError),
}

/// A machine that is about to run.
#[derive(Debug)]
pub struct Started {
    /// The way to control it.
    pub handle: Handle,
    /// Its console.
    pub console: Arc<ConsoleHub>,
    /// Tells the guest the size of the console's terminal, if its device can.
    pub resizer: Option<Resizer>,
    /// The pseudo-terminal of its console, if it has one.
    pub console_pty: Option<PathBuf>,
    /// Which firmware starts the guest and why, where that was left to its disk.
    pub boot_note: Option<String>,
}

/// Runs a machine until its guest has ended. Blocks; call it from the main thread.
///
/// `config` is complete and valid: it has a name, and what it names is checked as far as can be
/// without opening it. `announce` is called when all is built and nothing can be missing any
/// more, just before the guest's first instruction. SIGTERM, SIGINT and SIGHUP stop the machine,
/// a second one kills it, even if the host's storage hangs, at the latest within a
/// minute.
///
/// # Errors
/// Fails when something that the config names can't be had; nothing was changed then.
pub fn run(
    config: &VmConfig,
    claim: &MachineClaim,
    announce: impl FnOnce(Started) -> std::io::Result<()>,
) -> Result<ExitRecord, VmmError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_io_events_per_tick(IO_EVENTS)
        .build()
        .map_err(VmmError::Runtime)?;
    let exit = claim.open_exit()?;
    let record = runtime.block_on(live(config, claim, announce));
    // What the host's storage holds up is left behind.
    runtime.shutdown_background();
    let record = record?;
    exit.write(&record)?;
    Ok(record)
}

async fn live(
    config: &VmConfig,
    claim: &MachineClaim,
    announce: impl FnOnce(Started) -> std::io::Result<()>,
) -> Result<ExitRecord, VmmError> {
    let mailbox = Mailbox::default();
    let mut machine = Machine::build(config, &mailbox)?;
    let console = Arc::clone(machine.console());
    let console_pty = machine.console_pty();
    let boot_note = machine.boot_note();
    let resizer = machine.console_resizer();
    let disks = machine.disks();
    let balloon = machine.balloon();
    let drives = machine.drives();
    let agent = machine.agent().cloned();
    let children = machine.helpers();
    machine.serve_channels().map_err(VmmError::Runtime)?;
    let config_json = serde_json::to_string(config).unwrap_or_default();
    claim.write_config(&config_json)?;
    let socket = Socket::bind(&claim.dir().socket())?;
    let files = HandedFiles::serve(&claim.dir().files_socket()).map_err(VmmError::Runtime)?;

    let (life, handle) = Life::new(machine, mailbox, Terms::from(config));
    let pid = host_pid();
    let status = service::open_status();
    let layers = edgevmm_sandbox::close(&children)?;
    tell_of(layers.as_ref());
    let facts = Facts {
        name: claim.dir().name().to_owned(),
        pid,
        sandbox: layers.map(|layers| layers.to_string()).unwrap_or_default(),
        config_json,
        console_pty: console_pty.clone(),
    };
    let service = Service::new(
        handle.clone(),
        facts,
        Arc::clone(&console),
        Ways {
            resizer: resizer.clone(),
            disks,
            drives,
            balloon,
            agent: agent.clone(),
            memory: config.memory.size.0,
            status,
            files,
        },
    );
    let agent = AgentService::new(agent, handle.clone());
    let (ended, shutdown) = watch::channel(false);
    let server = tokio::spawn(socket.serve(service, agent, shutdown));
    // From here on the signals are ours: one that comes before the guest runs is not lost either.
    let signals = tokio::spawn(obey_signals(take_signals(), handle.clone()));
    let started = Started {
        handle,
        console: Arc::clone(&console),
        resizer,
        console_pty,
        boot_note,
    };
    announce(started).map_err(VmmError::Announce)?;
    // While the guest begins to run.
    tokio::spawn(async { heap::trim() });

    let record = life.run().await;
    console.close();
    signals.abort();
    let _ = ended.send(true);
    if let Ok(Err(error)) = tokio::time::timeout(FAREWELL, server).await {
        tracing::warn!(%error, "The API's task failed");
    }
    Ok(record)
}

/// Tells what the sandbox lacks on this host.
fn tell_of(layers: Option<&Layers>) {
    for (layer, why) in layers.map(Layers::missing).unwrap_or_default() {
        tracing::info!("The sandbox has no {}: {why}", layer.name());
    }
    if let Some(layers) = layers {
        tracing::debug!("The sandbox is closed: {layers}");
    }
}

/// Takes over the signals that ask a process to end.
fn take_signals() -> Option<[Signal; 3]> {
    let kinds = [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ];
    match kinds.map(signal) {
        [Ok(terminate), Ok(interrupt), Ok(hangup)] => Some([terminate, interrupt, hangup]),
        _ => {
            tracing::warn!("Signals can't be received: use the API to stop this machine");
            None
        }
    }
}

/// Turns the signals that ask a process to end into a stop, then a kill.
async fn obey_signals(signals: Option<[Signal; 3]>, handle: Handle) {
    let Some([mut terminate, mut interrupt, mut hangup]) = signals else {
        return;
    };
    let mut stopping = false;
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        if stopping {
            handle.request_kill();
        } else {
            handle.request_stop(None);
        }
        stopping = true;
    }
}
