//! Builds the product and finds what was built.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::progress::step;

/// Cargo, as called by whoever calls this.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Cargo runs this from anywhere in the workspace.
    cargo.current_dir(workspace());
    cargo
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map(PathBuf::from).unwrap_or(manifest)
}

/// Builds `edgevmm` for release and returns its path.
///
/// # Errors
/// It does not build.
pub fn release_binary() -> Result<PathBuf> {
    step("Building edgevmm", || {
        let output = cargo()
            .args([
                "build",
                "--release",
                "--package",
                "edgevmm",
                "--bin",
                "edgevmm",
            ])
            .args(["--message-format", "json-render-diagnostics", "--quiet"])
            .stderr(Stdio::inherit())
            .output()
            .context("Cannot start cargo")?;
        ensure!(output.status.success(), "edgevmm does not build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|message| message["target"]["name"] == "edgevmm")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .context("cargo does not say where it put edgevmm")
    })
}
