//! The benchmark of disks: ours against QEMU's, in one run, on this host and in a guest.

pub mod cases;
mod compare;
mod export;
pub mod guest;
mod images;
mod native;
mod notification;
mod report;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::config;
use super::probe::{Job, Machine};
use super::{Place, first_word, load};
use crate::images::Images as TestImages;
use crate::process;
use crate::progress::step;
use cases::{Case, Section};
use guest::Guests;
use native::{Contestant, Native, Sample};
use notification::Notification;

/// What a run needs.
#[derive(Debug)]
pub struct DiskBench {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The release build; `None` leaves out guests.
    pub edgevmm: Option<PathBuf>,
    /// `crates/devices/examples/blkbench`, statically linked.
    pub blkbench: PathBuf,
    /// This program, for the lab.
    pub xtask: PathBuf,
    /// Whether guests run in the lab.
    pub in_lab: bool,
    /// Runs of each contestant in each case.
    pub rounds: usize,
    /// Boots of each VMM.
    pub boots: usize,
    /// The directory whose file system is measured.
    pub dir: PathBuf,
}

/// Everything that was measured in one run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct DiskResults {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The commit of this checkout.
    pub commit: String,
    /// The compiler.
    pub compiler: String,
    /// The version of `qemu-img`.
    pub qemu: String,
    /// Load averages over a minute of this host: before, between the host's part and the guests',
    /// and after.
    pub load: Vec<f64>,
    /// This host.
    pub host: Option<Machine>,
    /// The kind of file system, and the device below it.
    pub file_system: String,
    /// The machine that ran guests, if it was the lab's.
    pub lab: Option<Machine>,
    /// What telling of ended requests costs here.
    pub notification: Option<Notification>,
    /// Cases on this host.
    pub native: Vec<Measured>,
    /// VMMs with guests.
    pub guests: Vec<guest::Measured>,
}

/// A case, and the samples of each contestant in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// What was done.
    pub case: Case,
    /// By `Contestant::key`, one of each round.
    pub samples: BTreeMap<String, Vec<Option<Sample>>>,
}

impl DiskBench {
    /// Measures everything.
    ///
    /// # Errors
    /// One of our programs or `qemu-img` does not run, or the disk is full.
    pub fn run(&self) -> Result<DiskResults> {
        let folder = tempfile::tempdir_in(&self.dir)
            .with_context(|| format!("Cannot make a directory in {}", self.dir.display()))?;
        let mut results = DiskResults {
            date: first_word(Command::new("date").arg("+%F"))?,
            commit: first_word(
                Command::new("git")
                    .current_dir(&self.workspace)
                    .args(["describe", "--always", "--dirty"]),
            )?,
            compiler: first_word(Command::new("rustc").arg("--version"))?,
            load: vec![load()],
            host: Some(Place::Here.measure(&Job::Machine)?),
            ..DiskResults::default()
        };
        if self.rounds > 0 {
            let version = process::output(Command::new("qemu-img").arg("--version"))?;
            version
                .lines()
                .next()
                .unwrap_or_default()
                .clone_into(&mut results.qemu);
            let mut find = Command::new("findmnt");
            find.args(["-nr", "-o", "FSTYPE,OPTIONS", "-T"]);
            results.file_system = first_word(find.arg(folder.path()))?;
            results.notification = Some(Notification::measure()?);
            self.natively(folder.path(), &mut results.native)?;
            results.load.push(load());
        }
        if let Some(edgevmm) = &self.edgevmm {
            let disks = config::disks(&self.workspace.join("benches"))?;
            let guests = Guests {
                comparison: &disks.comparison,
                edgevmm,
                xtask: &self.xtask,
                blkbench: &self.blkbench,
                dir: folder.path(),
                in_lab: self.in_lab,
            };
            let (guests, lab) = guests.run(self.boots)?;
            results.guests = guests;
            results.lab = lab.map(serde_json::from_value).transpose()?;
            results.load.push(load());
        }
        Ok(results)
    }

    /// Contestants take turns within each case, so that all get the same share of whatever else
    /// the host does; who begins changes from round to round.
    fn natively(&self, dir: &Path, measured: &mut Vec<Measured>) -> Result<()> {
        let native = Native {
            blkbench: self.blkbench.clone(),
            images: step("Making disk images", || images::Images::make(dir))?,
        };
        measured.extend(cases::native().into_iter().map(|case| Measured {
            case,
            samples: BTreeMap::new(),
        }));
        for round in 0..self.rounds {
            step(&format!("Disks, {} of {}", round + 1, self.rounds), || {
                for Measured { case, samples } in measured.iter_mut() {
                    if !case.direct {
                        native.images.warm(case.image)?;
                    }
                    for turn in 0..Contestant::ALL.len() {
                        let turn = (turn + round) % Contestant::ALL.len();
                        let contestant = Contestant::ALL[turn];
                        let sample = native.run(contestant, case)?;
                        let all = samples.entry(contestant.key().to_owned()).or_default();
                        all.push(sample);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Writes report, pictures and figures to `dir`, and returns the report. Causes are those that
/// `workspace` has now.
///
/// # Errors
/// A file cannot be written.
pub fn write(results: &DiskResults, workspace: &Path, dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    let disks = config::disks(&workspace.join("benches"))?;
    let mut charts = Vec::new();
    for section in Section::ALL {
        if report::draw(results, section, dir)? {
            charts.push(section);
        }
    }
    let with_guests = report::draw_guests(results, dir)?;
    let report = report::markdown(results, &disks.causes, &charts, with_guests);
    let json = serde_json::to_string_pretty(results)? + "\n";
    for (name, text) in [("disks.md", &report), ("disks.json", &json)] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(report)
}

/// What making the images and measuring takes from elsewhere: kernel and initial RAM disk.
///
/// # Errors
/// No apt, no network, or not enough disk.
pub fn ensure_images() -> Result<()> {
    TestImages::of_this_user().ensure(crate::images::Image::Kernel)
}
