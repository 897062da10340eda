//! Messages for containerd's log, which reads them from a FIFO in the bundle.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc::O_NONBLOCK;

/// The FIFO.
const FILE: &str = "log";

/// The way to containerd's log.
#[derive(Debug, Clone)]
pub struct Log {
    path: Arc<PathBuf>,
}

impl Log {
    /// That of the daemon which was started in a bundle.
    pub fn new(bundle: &Path) -> Self {
        Self {
            path: Arc::new(bundle.join(FILE)),
        }
    }

    /// Writes a line. It is lost when containerd is away or does not read.
    pub fn say(&self, text: &str) {
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .custom_flags(O_NONBLOCK)
            .open(&*self.path);
        if let Ok(mut file) = file {
            let _ = file.write_all(format!("edgevmm: {text}\n").as_bytes());
        }
    }
}
