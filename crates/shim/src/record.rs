//! What is written down of a container in its bundle, so that it can be cleared up by whoever finds
//! the bundle, also after the daemon died.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use edgevmm_api::{RuntimeDir, RuntimeDirError};
use serde::{Deserialize, Serialize};

use crate::network;
use crate::process::Process;
use crate::rootfs;
use crate::runc::Runc;

/// The file.
const FILE: &str = "edgevmm.json";
/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 16;
/// How long an ended process may take to be gone.
const DEATH: Duration = Duration::from_secs(2);
/// Time between two looks for it.
const PAUSE: Duration = Duration::from_millis(2);

/// What a container has on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The VMM, or what holds the sandbox's namespaces.
    pub process: Option<Process>,
    /// Where the root file system is mounted.
    pub root: Option<PathBuf>,
    /// Folders of its control group.
    pub cgroups: Vec<PathBuf>,
    /// Name of the machine.
    pub machine: Option<String>,
    /// Network namespace whose interfaces the machine has.
    pub network: Option<PathBuf>,
    /// The container, if it is an ordinary one.
    pub runc: Option<Runc>,
}

impl Record {
    /// Reads the record in a bundle; an empty one when there is none that can be read.
    pub fn read(bundle: &Path) -> Self {
        let mut text = Vec::new();
        let read = File::open(bundle.join(FILE))
            .and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        match read {
            Ok(_) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(_) => Self::default(),
        }
    }

    /// Writes it, so that a reader finds the old one or the new one.
    ///
    /// # Errors
    ///
    /// When the file can't be written.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        let new = bundle.join("edgevmm.json.new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(new, bundle.join(FILE))
    }

    /// Ends the process and removes all that there is, and then the record. Goes on where something
    /// is gone already; what fails is told last, and the record stays for the next try.
    ///
    /// # Errors
    ///
    /// When something can't be removed.
    pub fn clear(&self, bundle: &Path) -> Result<(), crate::Failure> {
        if let Some(process) = self.process {
            process.kill();
            let deadline = Instant::now() + DEATH;
            while process.is_alive() && Instant::now() < deadline {
                std::thread::sleep(PAUSE);
            }
        }
        let machine = self.machine.as_deref().map_or(Ok(()), remove_machine);
        if let Some(network) = &self.network {
            // Gone with the pod, or else cleared by the next machine.
            let _ = network::tear_down(network);
        }
        let runc = self.runc.as_ref().map_or(Ok(()), Runc::delete);
        let mounts = self.root.as_deref().map_or(Ok(()), rootfs::unmount);
        let groups = crate::cgroup::remove(&self.cgroups);
        machine?;
        runc?;
        mounts?;
        groups?;
        match fs::remove_file(bundle.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl Record {
    /// As [`Record::clear`], on a thread that may wait.
    ///
    /// # Errors
    ///
    /// As [`Record::clear`].
    pub async fn clear_aside(&self, bundle: &Path) -> Result<(), crate::Failure> {
        let (record, bundle) = (self.clone(), bundle.to_owned());
        tokio::task::spawn_blocking(move || record.clear(&bundle)).await?
    }
}

/// Where machines of containers have their sockets: with all others, so that `edgevmm ps` shows them.
pub fn machines() -> RuntimeDir {
    RuntimeDir::new("/run/edgevmm")
}

/// Removes a machine's folder once its VMM is gone: threads may outlive what the process ID tells.
fn remove_machine(name: &str) -> Result<(), RuntimeDirError> {
    let deadline = Instant::now() + DEATH;
    loop {
        let removed = match machines().open(name) {
            Ok(folder) => folder.remove(),
            Err(_) => return Ok(()),
        };
        match removed {
            Err(RuntimeDirError::Alive { .. }) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            // Its VMM may be removing it, too.
            Err(RuntimeDirError::NotFound { .. }) => return Ok(()),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn records_are_read_as_written_and_broken_ones_are_empty() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(bundle.path()), Record::default());
        let record = Record {
            process: Process::find(1),
            root: Some("/r".into()),
            cgroups: vec!["/c".into()],
            machine: Some("vm".to_owned()),
            network: Some("/n".into()),
            runc: Runc::new("ns", "id", bundle.path()),
        };
        record.write(bundle.path()).unwrap();
        assert_eq!(Record::read(bundle.path()), record);
        fs::write(bundle.path().join(FILE), "{").unwrap();
        assert_eq!(Record::read(bundle.path()), Record::default());
    }

    #[test]
    fn clearing_ends_what_runs_and_can_be_done_again() {
        let bundle = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let record = Record {
            process: Process::find(i32::try_from(child.id()).unwrap()),
            root: Some(bundle.path().join("none")),
            cgroups: vec![bundle.path().join("none")],
            machine: None,
            network: Some(bundle.path().join("none")),
            runc: None,
        };
        record.write(bundle.path()).unwrap();
        record.clear(bundle.path()).unwrap();
        record.clear(bundle.path()).unwrap();
        child.wait().unwrap();
        assert_eq!(Record::read(bundle.path()), Record::default());
    }
}
