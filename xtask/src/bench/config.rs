//! What is compared and against what, as `benches/` has it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::guest::Launch;

/// The name under which the release build of this checkout is asked for.
pub const EDGEVMM: &str = "edgevmm";

/// The VMMs that are compared, and the guest they all get.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// RAM of the guest in MiB.
    pub memory_mib: u64,
    /// The kernel's command line.
    pub cmdline: String,
    /// The VMMs.
    pub vmms: Vec<Vmm>,
}

/// One VMM in one shape.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// What the report calls it.
    pub name: String,
    /// Its program.
    pub program: String,
    /// What is special about this shape.
    pub note: String,
    /// Arguments that boot a kernel with an initial RAM disk.
    pub boot: Option<Vec<String>>,
    /// Arguments that start a payload.
    pub payload: Option<Vec<String>>,
}

/// A figure to beat.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The figure.
    pub value: f64,
    /// Whose it is.
    pub of: String,
    /// What would be a failure, if that is more than not beating the figure.
    pub limit: Option<f64>,
    /// Why it is not reached, for the report to tell while that is so.
    pub cause: String,
}

/// What is compared where disks are.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disks {
    /// The VMMs, and the guest they all get.
    pub comparison: Comparison,
    /// Why we are behind.
    pub causes: Vec<Cause>,
}

/// Why we are behind in some rows, for the report to tell while that is so.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cause {
    /// Parts that the rows' lines have, all of them.
    pub rows: Vec<String>,
    /// The cause.
    pub cause: String,
}

/// Reads `disks.json` in `dir`.
///
/// # Errors
/// It cannot be read or says something unknown.
pub fn disks(dir: &Path) -> Result<Disks> {
    read(&dir.join("disks.json"))
}

/// Reads `vmms.json` in `dir`.
///
/// # Errors
/// It cannot be read or says something unknown.
pub fn comparison(dir: &Path) -> Result<Comparison> {
    read(&dir.join("vmms.json"))
}

/// Reads `budgets.json` in `dir`: budgets by the key of their row.
///
/// # Errors
/// It cannot be read or says something unknown.
pub fn budgets(dir: &Path) -> Result<BTreeMap<String, Budget>> {
    read(&dir.join("budgets.json"))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("Cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("Cannot read {}", path.display()))
}

/// What the placeholders in arguments stand for.
#[derive(Debug, Default)]
pub struct Files {
    /// Where edgevmm's program is.
    pub edgevmm: PathBuf,
    /// The kernel or payload.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// A disk, where there is one.
    pub disk: PathBuf,
}

impl Comparison {
    /// The guest's RAM in KiB.
    #[must_use]
    pub fn ram_kib(&self) -> u64 {
        self.memory_mib * 1024
    }

    /// How `vmm` is started by `arguments`, in which the placeholders are filled.
    #[must_use]
    pub fn launch(&self, vmm: &Vmm, arguments: &[String], files: &Files) -> Launch {
        let fill = |argument: &String| {
            argument
                .replace("{kernel}", &files.kernel.display().to_string())
                .replace("{initrd}", &files.initrd.display().to_string())
                .replace("{disk}", &files.disk.display().to_string())
                .replace("{memory}", &self.memory_mib.to_string())
                .replace("{cmdline}", &self.cmdline)
        };
        Launch {
            program: program(vmm, files),
            arguments: arguments.iter().map(fill).collect(),
        }
    }
}

/// The program to start for `vmm`.
#[must_use]
pub fn program(vmm: &Vmm, files: &Files) -> String {
    if vmm.program == EDGEVMM {
        files.edgevmm.display().to_string()
    } else {
        vmm.program.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::results::ROWS;
    use super::*;

    fn benches() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches")
    }

    #[test]
    fn no_placeholder_is_left_in_any_command_line() {
        let comparison = comparison(&benches()).unwrap();
        let files = Files {
            edgevmm: "/e".into(),
            kernel: "/k".into(),
            initrd: "/i".into(),
            disk: "/d".into(),
        };
        let disks = disks(&benches()).unwrap().comparison;
        for vmm in comparison.vmms.iter().chain(&disks.vmms) {
            for arguments in vmm.boot.iter().chain(&vmm.payload) {
                let launch = comparison.launch(vmm, arguments, &files);
                assert!(launch.arguments.contains(&"/k".to_owned()), "{}", vmm.name);
                assert!(launch.arguments.iter().all(|text| !text.contains('{')));
            }
        }
        assert_eq!(program(&comparison.vmms[0], &files), "/e");
    }

    #[test]
    fn every_budget_is_for_a_row() {
        for (key, budget) in budgets(&benches()).unwrap() {
            assert!(ROWS.iter().any(|row| row.key == key), "{key}");
            assert!(budget.limit.is_none_or(|limit| limit >= budget.value));
        }
    }
}
