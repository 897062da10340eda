//! `cargo xtask guests`: start the matrix of guests, and write its table.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use xtask::guests::{self, Cell, Guests};
use xtask::kvm::{self, KvmVerdict};
use xtask::lab::Layout;
use xtask::progress::note;

use super::{build, lab};

/// Start guests of all releases, file systems and partition tables by each firmware, and write
/// docs/guests.md.
///
/// They run on this host where its KVM can, else inside the nested-KVM lab, where all of them take
/// an hour. Cells that are left out keep what an earlier run said of them.
#[derive(Debug, Args)]
pub struct GuestsCommand {
    /// Only cells with this in their name, as --list shows them; may be repeated.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Only cells that docs/guests.json has no good outcome of.
    #[arg(long)]
    missing: bool,
    /// Cells done at once.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Instead start one guest by each firmware N times, beside QEMU, and write docs/boots.md.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "5")]
    #[arg(conflicts_with_all = ["only", "missing", "jobs", "list"])]
    compare: Option<usize>,
    /// Start nothing: print the names of the cells.
    #[arg(long)]
    list: bool,
    /// Start this program instead of building one.
    #[arg(long, value_name = "FILE")]
    edgevmm: Option<PathBuf>,
    /// Where table and figures go [default: docs].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl GuestsCommand {
    /// Builds, starts and writes. Exit code 1 when a cell fails.
    ///
    /// # Errors
    /// edgevmm does not build, or there is no lab.
    pub fn run(&self) -> Result<ExitCode> {
        let workspace = build::workspace();
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("docs"));
        let mut cells = guests::cells();
        cells.retain(|cell| self.wants(cell));
        ensure!(!cells.is_empty(), "No guest is called that");
        let known = guests::read(&out)?;
        if self.missing {
            cells.retain(|cell| {
                let outcome = known.get(&cell.to_string());
                outcome.is_none_or(|outcome| outcome.boot.is_none())
            });
        }
        if self.list {
            cells.iter().for_each(|cell| println!("{cell}"));
            return Ok(ExitCode::SUCCESS);
        }
        if cells.is_empty() {
            note("none is missing; the page is written anew");
            guests::write(&known, &out)?;
            return Ok(ExitCode::SUCCESS);
        }
        let edgevmm = match &self.edgevmm {
            Some(path) => std::path::absolute(path)?,
            None => build::release_binary()?,
        };
        let verdict = kvm::host_kvm_runs_stock_kernels();
        let in_lab = verdict != KvmVerdict::Usable;
        if in_lab {
            note(&format!("{verdict}; guests run inside the nested-KVM lab"));
            lab::ensure_lab(&Layout::of_this_user())?;
        }
        let guests = Guests {
            workspace,
            edgevmm,
            xtask: std::env::current_exe().context("Cannot find this program")?,
            in_lab,
            jobs: self.jobs,
            out,
        };
        if let Some(rounds) = self.compare {
            guests.compare(rounds)?;
            return Ok(ExitCode::SUCCESS);
        }
        let failed = guests.run(&cells)?;
        note(&format!("the table is in {}", guests.out.display()));
        Ok(if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn wants(&self, cell: &Cell) -> bool {
        let name = cell.to_string();
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part))
    }
}
