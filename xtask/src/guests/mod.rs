//! The matrix of guests: releases, kernels, partition tables and file systems, by each firmware.
//!
//! Every cell has a disk of its own and, where this host's KVM does not do, a lab of its own, so
//! that none sees what another left. A cell that fails is tried once more: under emulation a guest
//! or its machine now and then ends for reasons of the emulator's.

mod compare;
mod matrix;
mod place;
mod report;
mod trial;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::bench::first_word;
use crate::images::{Image, Images};
use crate::progress::note;

pub use matrix::{Cell, Firmware, Vmm, cells};
pub use trial::{Boot, Trial};

/// Tries of a cell until it counts as failed.
const TRIES: u32 = 2;

/// What came of a cell.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The commit of the checkout.
    pub commit: String,
    /// How often it was tried.
    pub tries: u32,
    /// The load average of this host over a minute when it was done.
    pub load: f64,
    /// The start, if it went well.
    pub boot: Option<Boot>,
    /// Why the last try that went wrong did.
    pub failure: Option<String>,
}

/// All cells ever done, by name.
pub type Outcomes = BTreeMap<String, Outcome>;

/// A run over some cells.
#[derive(Debug)]
pub struct Guests {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The release build, its firmware beside it.
    pub edgevmm: PathBuf,
    /// This program, for the lab.
    pub xtask: PathBuf,
    /// Whether guests run in the lab.
    pub in_lab: bool,
    /// Cells done at once.
    pub jobs: usize,
    /// Where table and figures go. What an earlier run wrote there of other cells is kept.
    pub out: PathBuf,
}

impl Guests {
    /// Does `cells` and returns how many failed.
    ///
    /// # Errors
    /// Results cannot be read or written. A cell that fails is no error.
    pub fn run(&self, cells: &[Cell]) -> Result<usize> {
        Images::of_this_user().ensure(Image::Firmware)?;
        let (date, commit) = self.origin()?;
        let queue = Mutex::new(cells.iter().enumerate());
        let outcomes = Mutex::new(read(&self.out)?);
        let failed = Mutex::new(0);
        let work = || -> Result<()> {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((index, cell)) = next else {
                    return Ok(());
                };
                let mut outcome = self.cell(cell);
                (outcome.date, outcome.commit) = (date.clone(), commit.clone());
                let number = index + 1;
                note(&format!(
                    "[{number}/{}] {}",
                    cells.len(),
                    line(cell, &outcome)
                ));
                if outcome.boot.is_none() {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                }
                let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                outcomes.insert(cell.to_string(), outcome);
                write(&outcomes, &self.out)?;
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.jobs.max(1)).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| {
                let done = worker.join();
                done.unwrap_or_else(|_| anyhow::bail!("A worker panicked"))
            })
        })?;
        Ok(failed.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The day and the commit.
    fn origin(&self) -> Result<(String, String)> {
        let mut git = Command::new("git");
        git.current_dir(&self.workspace);
        Ok((
            first_word(Command::new("date").arg("+%F"))?,
            first_word(git.args(["describe", "--always", "--dirty"]))?,
        ))
    }

    fn cell(&self, cell: &Cell) -> Outcome {
        let mut outcome = Outcome {
            date: String::new(),
            commit: String::new(),
            tries: 0,
            load: 0.0,
            boot: None,
            failure: None,
        };
        while outcome.boot.is_none() && outcome.tries < TRIES {
            outcome.tries += 1;
            let boot = place::boot(self, cell).and_then(|boot| {
                expect(cell, &boot.report)?;
                Ok(boot)
            });
            match boot {
                Ok(boot) => outcome.boot = Some(boot),
                Err(error) => {
                    let reason = format!("{error:#}");
                    if outcome.tries < TRIES {
                        note(&format!("{cell} is tried again: {reason}"));
                    }
                    outcome.failure = Some(reason);
                }
            }
        }
        outcome.load = crate::bench::load();
        outcome
    }
}

/// What earlier runs wrote to `dir`; nothing if there was none.
///
/// # Errors
/// It cannot be read.
pub fn read(dir: &Path) -> Result<Outcomes> {
    let path = dir.join("guests.json");
    match fs::read(&path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Outcomes::new()),
        Err(error) => Err(anyhow::Error::new(error)),
    }
    .with_context(|| format!("Cannot read {}", path.display()))
}

/// Writes table and figures to `dir`.
///
/// # Errors
/// They cannot be written.
pub fn write(outcomes: &Outcomes, dir: &Path) -> Result<()> {
    let json = serde_json::to_string_pretty(outcomes)? + "\n";
    let table = report::markdown(outcomes);
    for (name, text) in [("guests.json", json), ("guests.md", table)] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Checks that the guest is what the cell is called.
fn expect(cell: &Cell, report: &str) -> Result<()> {
    let mut words = vec![
        format!("cpus={}", cell.cpus),
        format!("root={}", cell.shape.root.name()),
    ];
    match cell.firmware {
        Firmware::Bios => words.push("fw=bios".into()),
        Firmware::Uefi | Firmware::Ovmf => words.push("fw=uefi".into()),
        Firmware::Fast | Firmware::Auto | Firmware::Direct => {}
    }
    for word in words {
        let has = report.split(' ').any(|each| each == word);
        ensure!(has, "The guest does not say {word} but: {report}");
    }
    Ok(())
}

/// A cell's line of progress.
fn line(cell: &Cell, outcome: &Outcome) -> String {
    match (&outcome.boot, &outcome.failure) {
        (Some(boot), _) => {
            let left = report::left(boot).map_or_else(String::new, |left| format!(", {left}"));
            format!("{cell} … ok{left} ({:.1} s)", boot.seconds)
        }
        (None, why) => format!("{cell} … FAILED: {}", why.as_deref().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_guest_has_to_be_what_it_is_called() {
        let named = |name: &str| {
            let cells = cells();
            *cells.iter().find(|cell| cell.to_string() == name).unwrap()
        };
        let uefi = named("bookworm-cloud-gpt-ext4/uefi/2");
        let good = "kernel=6.1 cpus=2 fw=uefi root=ext4";
        assert!(expect(&uefi, good).is_ok());
        for (right, wrong) in [("cpus=2", "cpus=21"), ("uefi", "bios"), ("ext4", "tmpfs")] {
            assert!(
                expect(&uefi, &good.replace(right, wrong)).is_err(),
                "{wrong}"
            );
        }
    }
}
