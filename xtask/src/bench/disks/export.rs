//! QEMU's virtio disk without a guest: `qemu-storage-daemon` serves an image by vhost-user.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cases::Case;

/// How long the daemon may take to open an image.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with one image.
#[derive(Debug)]
pub struct Export {
    daemon: Child,
    // A socket's path must be short, so it is not where the images are.
    dir: TempDir,
}

impl Export {
    /// Starts a daemon that serves `image` as `case` has it used, in an iothread and by io_uring.
    ///
    /// # Errors
    /// There is none, or it refuses.
    pub fn start(case: &Case, image: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let read_only = !case.write;
        let file = json!({
            "driver": "file",
            "node-name": "file",
            "filename": image,
            "aio": "io_uring",
            "read-only": read_only,
            "cache": { "direct": case.direct },
        });
        let disk = json!({
            "driver": case.image.format(),
            "node-name": "disk",
            "file": "file",
            "read-only": read_only,
        });
        let export = json!({
            "type": "vhost-user-blk",
            "id": "export",
            "node-name": "disk",
            "iothread": "iothread",
            "writable": case.write,
            "addr": { "type": "unix", "path": socket(dir.path()) },
        });
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=iothread"]);
        for (option, value) in [("--blockdev", file), ("--blockdev", disk)] {
            command.arg(option).arg(value.to_string());
        }
        command.arg("--export").arg(export.to_string());
        let daemon = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("Cannot start qemu-storage-daemon")?;
        let mut this = Self { daemon, dir };
        this.wait_for_socket()?;
        Ok(this)
    }

    /// Where it is to be found, as `blkbench` takes it.
    #[must_use]
    pub fn peer(&self, case: &Case) -> Value {
        json!({
            "socket": socket(self.dir.path()),
            "pid": self.daemon.id(),
            "size": case.image.size(),
        })
    }

    fn wait_for_socket(&mut self) -> Result<()> {
        let started = Instant::now();
        while !socket(self.dir.path()).exists() {
            if let Some(status) = self.daemon.try_wait()? {
                ensure!(false, "qemu-storage-daemon ended ({status})");
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "qemu-storage-daemon makes no socket"
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Export {
    /// Asked to end, it closes the image as it should be.
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.daemon.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.daemon.wait();
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("disk.sock")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::cases;
    use super::*;

    #[test]
    fn a_daemon_serves_an_image_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        for case in [&cases::native()[0], &cases::native()[2]] {
            std::fs::File::create(&image)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            let export = Export::start(case, &image).unwrap();
            let peer = export.peer(case);
            let process = format!("/proc/{}", peer["pid"]);
            assert!(Path::new(&process).exists());
            assert!(Path::new(peer["socket"].as_str().unwrap()).exists());
            drop(export);
            assert!(!Path::new(&process).exists());
            let missing = Export::start(case, &dir.path().join("nothing"));
            assert!(missing.unwrap_err().to_string().contains("ended"));
        }
    }
}
