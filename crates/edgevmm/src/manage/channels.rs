//! Sockets of channels that a machine in the background left: a VMM in its sandbox can't remove them.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use edgevmm_api::MachineDir;
use edgevmm_config::VmConfig;

/// Where a machine has them; nowhere when it did not come to run.
pub(super) fn of(dir: &MachineDir) -> Vec<PathBuf> {
    let text = dir.config_json().ok().flatten().unwrap_or_default();
    let vm: Option<VmConfig> = serde_json::from_str(&text).ok();
    let channels = vm.map(|vm| vm.channels).unwrap_or_default();
    channels.into_iter().map(|channel| channel.socket).collect()
}

/// Removes those at which nobody listens: another machine may have taken the place of one.
pub(super) fn remove(sockets: &[PathBuf]) {
    for socket in sockets {
        let found = fs::symlink_metadata(socket);
        let is_socket = found.is_ok_and(|found| found.file_type().is_socket());
        let refused = UnixStream::connect(socket).err();
        let refused = refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused);
        if is_socket && refused {
            let _ = fs::remove_file(socket);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_socket_that_was_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let sockets = [path("left"), path("served"), path("none")];
        drop(UnixListener::bind(&sockets[0]).unwrap());
        let _listener = UnixListener::bind(&sockets[1]).unwrap();
        remove(&sockets);
        assert!(!sockets[0].exists() && sockets[1].exists());
        // A connection to a file is refused as well.
        let file = [path("file")];
        fs::write(&file[0], "kept").unwrap();
        remove(&file);
        assert!(file[0].exists());
    }
}
