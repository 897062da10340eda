//! The few things this system itself must have.

use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Uid;

use crate::process;
use crate::progress::note;

/// Installs packages on this system, by `sudo` unless run by root.
///
/// # Errors
/// Neither root nor `sudo`, or apt fails.
pub fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    note(&format!("installing {names} on this system with apt"));
    let apt = |arguments: &[&str]| {
        let mut command = if Uid::effective().is_root() {
            Command::new("apt-get")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.arg("apt-get");
            sudo
        };
        command
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let install = [&["install", "--yes", "--no-install-recommends"], packages].concat();
    // Lists may be missing (containers) or old: then once more with fresh ones.
    process::output(&mut apt(&install))
        .or_else(|_| {
            process::output(&mut apt(&["update"]))?;
            process::output(&mut apt(&install))
        })
        .map(drop)
        .with_context(|| {
            format!("Cannot install {names}. Install it by hand: sudo apt-get install {names}")
        })
}
