//! Builds the product and finds what was built.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::progress::step;

/// The program that containerd starts.
const SHIM: &str = "containerd-shim-edgevmm-v1";
const OPERATOR: &str = "edgevmm-operator";

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

/// Builds `edgevmm`, its boot firmware and containerd's shim beside it for release, and returns the
/// path of the first.
///
/// # Errors
/// It does not build.
pub fn release_binary() -> Result<PathBuf> {
    step("Building edgevmm", || {
        let mut build = cargo();
        build.args(["build", "--package", "edgevmm", "--bin", "edgevmm"]);
        build.args(["--package", "edgevmm-fast", "--bin", "edgevmm-fast"]);
        build.args(["--package", "edgevmm-shim", "--bin", SHIM]);
        release(&mut build, "edgevmm", &[])
    })
}

/// Builds the measuring program for disks, for release and without shared libraries, as guests
/// have none. Returns its path.
///
/// # Errors
/// It does not build.
pub fn blkbench() -> Result<PathBuf> {
    step("Building blkbench", || {
        let mut build = cargo();
        build.args([
            "rustc",
            "--package",
            "edgevmm-devices",
            "--example",
            "blkbench",
        ]);
        release(
            &mut build,
            "blkbench",
            &["--", "-Ctarget-feature=+crt-static"],
        )
    })
}

/// Builds the measuring program for pods. Returns its path.
///
/// # Errors
/// It does not build.
pub fn podbench() -> Result<PathBuf> {
    step("Building podbench", || {
        let mut build = cargo();
        build.args(["build", "--package", "edgevmm-e2e", "--example", "podbench"]);
        built(&mut build, "podbench", &[])
    })
}

/// Builds the operator for release. Returns its path.
///
/// # Errors
/// It does not build.
pub fn operator() -> Result<PathBuf> {
    step("Building edgevmm-operator", || {
        let mut build = cargo();
        build.args(["build", "--package", OPERATOR]);
        release(&mut build, OPERATOR, &[])
    })
}

/// Builds the measuring program for it. Returns its path.
///
/// # Errors
/// It does not build.
pub fn operatorbench() -> Result<PathBuf> {
    step("Building operatorbench", || {
        let mut build = cargo();
        build.args(["build", "--package", "edgevmm-e2e"]);
        build.args(["--example", "operatorbench"]);
        built(&mut build, "operatorbench", &[])
    })
}

/// Has cargo do `build` for release, the compiler's own arguments last, and finds `target`.
fn release(build: &mut Command, target: &str, compiler: &[&str]) -> Result<PathBuf> {
    built(build.arg("--release"), target, compiler)
}

/// Has cargo do `build`, the compiler's own arguments last, and finds `target`.
fn built(build: &mut Command, target: &str, compiler: &[&str]) -> Result<PathBuf> {
    build.args(["--message-format", "json-render-diagnostics", "--quiet"]);
    let output = build
        .args(compiler)
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    ensure!(output.status.success(), "{target} does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == target)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo does not say where it put {target}"))
}
