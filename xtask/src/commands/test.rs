//! `cargo xtask test`: everything that has to hold before a change goes in.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Result, bail};
use clap::Args;
use xtask::images::{Image, Images};
use xtask::kvm::{self, KvmVerdict};
use xtask::lab::Layout;
use xtask::pods::Pods;
use xtask::progress::{note, step};
use xtask::{cache, host, process};

use super::{build, lab};

/// Programs the tests call on this host, and the packages they are in.
const HOST_PROGRAMS: &[(&str, &str)] = &[
    ("qemu-img", "qemu-utils"),
    ("passt", "passt"),
    ("ip", "iproute2"),
    ("e2fsck", "e2fsprogs"),
    ("iasl", "acpica-tools"),
    ("nc.openbsd", "netcat-openbsd"),
    ("ssh", "openssh-client"),
    ("sfdisk", "fdisk"),
];

/// The package of the end-to-end tests.
const E2E: &str = "edgevmm-e2e";

/// Run all checks and tests: formatting, lints, licences, unit tests, end-to-end tests.
///
/// The end-to-end tests boot real kernels and disks: on this host where its KVM can, else inside the
/// nested-KVM lab. What they need is installed or made first.
#[derive(Debug, Args)]
pub struct TestCommand {
    /// Only formatting, lints and unit tests.
    #[arg(long)]
    quick: bool,
    /// Leave out the end-to-end tests.
    #[arg(long)]
    no_e2e: bool,
}

impl TestCommand {
    /// Runs the checks in order; the first that fails ends it.
    ///
    /// # Errors
    /// A check fails.
    pub fn run(&self) -> Result<ExitCode> {
        install_programs();
        check(
            "Formatting",
            build::cargo().args(["fmt", "--all", "--check"]),
        )?;
        check(
            "Lints",
            build::cargo()
                .args(["clippy", "--workspace", "--all-targets", "--quiet", "--"])
                .args(["-D", "warnings"]),
        )?;
        if !self.quick {
            licences()?;
        }
        check(
            "Unit tests",
            tests().args(["--workspace", "--exclude", E2E]),
        )?;
        let doc = ["test", "--doc", "--workspace", "--exclude", E2E, "--quiet"];
        check("Documentation tests", build::cargo().args(doc))?;
        if !self.quick && !self.no_e2e {
            end_to_end()?;
        }
        note("all checks passed");
        Ok(ExitCode::SUCCESS)
    }
}

fn check(what: &str, command: &mut Command) -> Result<()> {
    step(what, || process::run(command.stdin(Stdio::null())))
}

/// Tests that need a program that is missing say so and are skipped, so this may fail.
fn install_programs() {
    let missing: Vec<&str> = HOST_PROGRAMS
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return;
    }
    if let Err(error) = host::install(&missing) {
        note(&format!(
            "{error:#}\nGoing on; tests that need it will say that they are skipped."
        ));
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// `cargo nextest` where it is installed: it runs the tests of all crates side by side.
fn tests() -> Command {
    let mut cargo = build::cargo();
    if find("cargo-nextest").is_some() {
        cargo.args(["nextest", "run", "--no-tests=pass", "--status-level=fail"]);
    } else {
        cargo.args(["test", "--all-targets", "--quiet"]);
    }
    cargo
}

fn licences() -> Result<()> {
    let deny = cargo_deny()?;
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&deny);
        command
            .current_dir(build::workspace())
            .args(["--log-level", "error"])
            .args(arguments);
        command
    };
    check(
        "Licences, bans, sources",
        &mut run(&["check", "licenses", "bans", "sources"]),
    )?;
    // An unreachable database says nothing about this project.
    if process::output(&mut run(&["fetch", "db"])).is_ok() {
        check(
            "Advisories",
            &mut run(&["check", "--disable-fetch", "advisories"]),
        )
    } else {
        note("the advisory database cannot be reached; dependencies are not checked against it");
        Ok(())
    }
}

/// The installed `cargo-deny`, or one built into the cache, which takes minutes once.
fn cargo_deny() -> Result<PathBuf> {
    let tools = cache::user_cache().join("tools");
    let own = tools.join("bin/cargo-deny");
    if let Some(installed) = find("cargo-deny").or_else(|| own.is_file().then(|| own.clone())) {
        return Ok(installed);
    }
    note("building cargo-deny once; this takes some minutes");
    step("Building cargo-deny", || install_deny(&tools))?;
    Ok(own)
}

fn install_deny(root: &Path) -> Result<()> {
    let mut install = build::cargo();
    install
        .args(["install", "--locked", "--quiet", "cargo-deny", "--root"])
        .arg(root);
    // Not part of this workspace's build, but its compiled dependencies need a place.
    install.env("CARGO_TARGET_DIR", root.join("target"));
    // It runs for seconds: what its own release profile does to be fast takes longer than that.
    install.env("CARGO_PROFILE_RELEASE_LTO", "off");
    install.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    process::output(&mut install)?;
    Ok(std::fs::remove_dir_all(root.join("target"))?)
}

fn end_to_end() -> Result<()> {
    let binary = thread::scope(|scope| {
        // Beside the rest, much of which keeps one processor busy.
        let pods = scope.spawn(|| Pods::ensure()?.kubernetes());
        let binary = prepare()?;
        let Ok(kubernetes) = pods.join() else {
            bail!("The build of Kubernetes panicked");
        };
        if kubernetes?.is_none() {
            note("this distribution has no sources of Kubernetes; tests that need it will say so");
        }
        Ok(binary)
    })?;
    check(
        "End-to-end tests",
        tests().args(["--package", E2E]).env("EDGEVMM_BIN", binary),
    )
}

/// Makes all that end-to-end tests need but Kubernetes, and returns the program under test.
fn prepare() -> Result<PathBuf> {
    let binary = build::release_binary()?;
    let images = Images::of_this_user();
    for image in [
        Image::Kernel,
        Image::Mini,
        Image::Sata,
        Image::Debian12,
        Image::Firmware,
    ] {
        images.ensure(image)?;
    }
    match kvm::host_kvm_runs_stock_kernels() {
        KvmVerdict::Usable => note("end-to-end tests run on this host's KVM"),
        verdict => {
            note(&format!(
                "{verdict}; end-to-end tests run inside the nested-KVM lab"
            ));
            lab::ensure_lab(&Layout::of_this_user())?;
        }
    }
    Ok(binary)
}
