//! `daemon`: serves containerd for all containers of a pod, until the last one is gone.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Failure;
use crate::cli::Cli;
use crate::events::Events;
use crate::service::TaskService;
use crate::task::{Log, Tasks};
use crate::ttrpc;

/// Environment variable with the socket that takes events.
const EVENTS_VARIABLE: &str = "TTRPC_ADDRESS";
/// Time for the last answers to go out.
const FAREWELL: Duration = Duration::from_millis(50);

/// Serves until it is told to shut down. The listening socket is standard input.
///
/// # Errors
///
/// When it can't serve at all.
pub fn run(cli: &Cli) -> Result<(), Failure> {
    nix::unistd::setsid().or_else(|error| match error {
        // It leads a process group already, which is as good.
        nix::errno::Errno::EPERM => Ok(nix::unistd::getpid()),
        error => Err(error),
    })?;
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    nix::unistd::dup2_stdin(fs::File::open("/dev/null")?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(cli, listener))?;
    // Tasks that wait for something are left behind.
    runtime.shutdown_background();
    Ok(())
}

async fn serve(cli: &Cli, listener: UnixListener) -> Result<(), Failure> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let containerd = match std::env::var_os(EVENTS_VARIABLE) {
        Some(address) => PathBuf::from(address),
        None => PathBuf::from(format!("{}.ttrpc", cli.address)),
    };
    let events = Events::new(&cli.namespace, containerd);
    let log = Log::new(&std::env::current_dir()?);
    let tasks = Arc::new(Tasks::new(&cli.namespace, events, log));
    let service = Arc::new(TaskService::new(Arc::clone(&tasks)));
    let end = async {
        tasks.stopping().await;
        // At once, so that the next daemon of that name makes a socket of its own.
        if let Some(socket) = &cli.socket {
            let _ = fs::remove_file(socket);
        }
        tasks.sent().await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        () = ttrpc::serve(listener, service) => {}
        () = end => {}
    }
    Ok(())
}
