//! How many labs run at once, whoever starts the tests.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// Machines with four vCPUs each; with more of them, all would only be slower.
const SLOTS: u32 = 2;

/// The right to run a lab, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl Slot {
    /// Takes a free one, or waits for one of them.
    pub(crate) fn take() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("edgevmm-e2e-{}", nix::unistd::geteuid()));
        fs::create_dir_all(&dir).with_context(|| format!("Cannot make {}", dir.display()))?;
        for number in 0..SLOTS {
            let file = open(&dir, number)?;
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                return Ok(Self(lock));
            }
        }
        let number = std::process::id() % SLOTS;
        let lock = Flock::lock(open(&dir, number)?, FlockArg::LockExclusive);
        lock.map(Self)
            .map_err(|(_, errno)| errno)
            .context("Cannot wait for a lab")
    }
}

fn open(dir: &Path, number: u32) -> Result<File> {
    let path = dir.join(format!("slot-{number}"));
    File::create(&path).with_context(|| format!("Cannot make {}", path.display()))
}
