//! `delete`: clears up what a daemon that died left of a container. containerd also runs it after a
//! container was deleted in the usual way, when there is nothing to do.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::Failure;
use crate::cli::Cli;
use crate::proto::now;
use crate::proto::task::DeleteResponse;
use crate::record::Record;
use crate::rootfs;

use crate::start::{ADDRESS_FILE, alone};

/// Exit status of what was ended by SIGKILL.
const KILLED: u32 = 137;

/// Clears up and tells containerd how the container ended.
///
/// # Errors
///
/// When something can't be removed; containerd may try again.
pub fn run(cli: &Cli) -> Result<(), Failure> {
    let bundle = match &cli.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir()?,
    };
    let record = Record::read(&bundle);
    let cleared = record.clear(&bundle);
    // A record that could not be written or read leaves the usual place.
    let unmounted = rootfs::unmount(&bundle.join("rootfs"));
    remove_dead_socket(&bundle);
    cleared?;
    unmounted?;
    let response = DeleteResponse {
        pid: record.process.map_or(0, |process| process.id()),
        exit_status: KILLED,
        exited_at: Some(now()),
    };
    std::io::stdout().write_all(&response.encode_to_vec())?;
    Ok(())
}

/// Removes the daemon's socket, unless the daemon lives: for other containers of the pod.
fn remove_dead_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE)) else {
        return;
    };
    if let Some(path) = address.strip_prefix("unix://").map(PathBuf::from)
        && let Ok(_alone) = alone(&path)
        && UnixStream::connect(&path).is_err()
    {
        let _ = fs::remove_file(path);
    }
}
