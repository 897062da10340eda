//! The program under test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The boot firmware, beside `edgevmm`, where that finds it, too.
pub(crate) const FIRMWARE: &str = "edgevmm-fast";
/// The program that containerd starts, beside `edgevmm`.
pub(crate) const SHIM: &str = "containerd-shim-edgevmm-v1";
const OPERATOR: &str = "edgevmm-operator";

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Cargo, as it was called to run this test.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).stdin(Stdio::null());
    cargo
}

/// The path of `edgevmm`: `$EDGEVMM_BIN`, or else a release build of this workspace.
pub(crate) fn edgevmm() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EDGEVMM_BIN") {
        return std::path::absolute(path).context("EDGEVMM_BIN is no path");
    }
    let mut build = cargo();
    build
        .args(["build", "--release", "--quiet", "--package", "edgevmm"])
        .args(["--package", FIRMWARE, "--bin", FIRMWARE])
        .args(["--package", "edgevmm-shim", "--bin", SHIM])
        .args(["--bin", "edgevmm"]);
    built(&mut build, "edgevmm")
}

/// The path of `edgevmm-operator`: `$EDGEVMM_OPERATOR_BIN`, or else a build for tests.
///
/// # Errors
/// It does not build.
pub fn operator() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EDGEVMM_OPERATOR_BIN") {
        return std::path::absolute(path).context("EDGEVMM_OPERATOR_BIN is no path");
    }
    let mut build = cargo();
    build.args(["build", "--quiet", "--package", OPERATOR]);
    built(&mut build, OPERATOR)
}

/// The path of an example of this package, built for tests: what tests run on their hosts.
///
/// # Errors
/// It does not build.
pub fn example(name: &str) -> Result<PathBuf> {
    let mut build = cargo();
    build.args([
        "build",
        "--quiet",
        "--package",
        "edgevmm-e2e",
        "--example",
        name,
    ]);
    built(&mut build, name)
}

/// Builds a program, and tells where it is.
fn built(build: &mut Command, name: &str) -> Result<PathBuf> {
    let output = build
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    ensure!(output.status.success(), "{name} does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo does not say where it put {name}"))
}
