//! `doctor`: what this host has and lacks to run machines, and how to get it.

mod k8s;
mod kvm;
mod system;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use crate::cli::JsonArg;
use crate::exit::Outcome;

pub use kvm::warn_of_software_backend;

/// What `doctor` takes.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Check what pods with machines need, too
    #[arg(long)]
    pub k8s: bool,
    #[command(flatten)]
    pub format: JsonArg,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Something doesn't work, but machines run.
    Warn,
    /// Machines don't run.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, found, fix)
        }
    }
}

/// The files of a host, below `/` or a folder that stands for it.
#[derive(Debug)]
struct Host {
    root: PathBuf,
}

impl Host {
    fn this() -> Self {
        Self { root: "/".into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The trimmed text of a file; `None` when it can't be read.
    fn read(&self, path: &str) -> Option<String> {
        Some(fs::read_to_string(self.path(path)).ok()?.trim().to_owned())
    }
}

/// Looks at everything and prints it. Fails when machines can't run.
///
/// # Errors
///
/// When JSON can't be written.
pub fn run(args: &DoctorArgs) -> Outcome {
    let host = Host::this();
    let mut checks = kvm::checks(&host);
    checks.extend(system::checks(&host));
    if args.k8s {
        checks.extend(k8s::checks(&host));
    }
    if args.format.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&checks).context("Can't write JSON")?
        );
    } else {
        print!("{}", text(&checks));
    }
    let failed = checks.iter().any(|check| check.status == Status::Fail);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    for Check {
        name,
        status,
        found,
        fix,
    } in checks
    {
        let status = match status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        text += &format!("{status}  {name:<15}  {found}\n");
        if let Some(fix) = fix {
            text += &format!("{:21}  -> {fix}\n", "");
        }
    }
    text
}

/// Finds a program as a shell would.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok() && path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_lists_fixes_below_findings() {
        let checks = [Check::ok("a", "fine"), Check::fail("b", "bad", "do")];
        let expected = "ok    a                fine\nFAIL  b                bad\n                       -> do\n";
        assert_eq!(text(&checks), expected);
    }

    #[test]
    fn programs_are_found() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-here").is_none());
    }
}
