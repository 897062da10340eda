//! The benchmarks: what a guest costs under edgevmm, and under QEMU in the same run.
//!
//! Kernels boot where KVM can run them, which is the lab on many hosts. What a VMM itself takes to
//! start is measured on this host with a payload that any KVM runs. The code that measures one VMM
//! ([`probe`]) is the same in both places: in the lab it is this very program, started by the
//! agent.

mod chart;
pub mod config;
pub(crate) mod counters;
pub mod disks;
pub(crate) mod guest;
mod lines;
pub mod memory;
pub mod operator;
mod payload;
pub mod pods;
pub mod probe;
pub(crate) mod report;
pub mod results;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use crate::images::Images;
use crate::lab::{self, Lab};
use crate::process;
use crate::progress::{note, step};
use chart::Chart;
use config::{Budget, Comparison, Files, Vmm, program};
use guest::Launch;
use payload::Then;
use probe::{Boot, Idle, Job};
use results::{Measured, ROWS, Results};

/// Where this program lies in the lab.
pub(crate) const LAB_XTASK: &str = "/tmp/xtask";

/// Longer than any measurement takes in a lab that has not hung.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// The rows that are drawn, and what their pictures are called.
const CHARTS: &[(&str, &str)] = &[
    ("boot.exits", "KVM exits until init's first line"),
    (
        "boot.userspace-exits",
        "Exits to the VMM until init's first line",
    ),
    ("idle.pss", "PSS beyond the guest's RAM, idle Linux (kB)"),
    (
        "halted.private-dirty",
        "Private dirty memory beyond the guest's RAM, payload (kB)",
    ),
    (
        "start.median",
        "Exec to the guest's first byte, median (ms)",
    ),
    ("size.binary", "Program, stripped (MB)"),
];

/// What a run needs.
#[derive(Debug)]
pub struct Bench {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The release build.
    pub edgevmm: PathBuf,
    /// Whether that is another program, of unknown origin.
    pub given: bool,
    /// This program, for the lab.
    pub xtask: PathBuf,
    /// Whether kernels boot in the lab.
    pub in_lab: bool,
    /// Boots of each VMM.
    pub boots: usize,
    /// Starts of each VMM with a payload.
    pub starts: usize,
}

/// Where a measurement is made.
pub(crate) enum Place {
    Here,
    Lab(Box<Lab>),
}

impl Place {
    pub(crate) fn measure<T: DeserializeOwned>(&self, job: &Job) -> Result<T> {
        let value = match self {
            Self::Here => probe::perform(job)?,
            Self::Lab(lab) => {
                let command = lab::Command::new(LAB_XTASK)
                    .args(["agent", "probe"])
                    .stdin(serde_json::to_vec(job)?)
                    .timeout(TIMEOUT);
                let output = lab.run(&command)?;
                ensure!(output.success(), "{}", output.stderr.trim());
                serde_json::from_str(&output.stdout)?
            }
        };
        serde_json::from_value(value).context("Cannot read a measurement")
    }
}

impl Bench {
    /// Measures everything.
    ///
    /// # Errors
    /// edgevmm does not start; another VMM that does not is left out.
    pub fn run(&self) -> Result<Results> {
        let comparison = config::comparison(&self.workspace.join("benches"))?;
        // A program that is not on disk yet has dirty pages, which would count as the VMM's.
        let program = fs::File::open(&self.edgevmm);
        program
            .and_then(|program| program.sync_all())
            .with_context(|| format!("Cannot read {}", self.edgevmm.display()))?;
        let mut results = Results {
            date: first_word(Command::new("date").arg("+%F"))?,
            commit: self.commit()?,
            given: self.given,
            compiler: process::output(Command::new("rustc").arg("--version"))?
                .trim()
                .to_owned(),
            load: vec![load()],
            host: Some(Place::Here.measure(&Job::Machine)?),
            ..Results::default()
        };
        for vmm in &comparison.vmms {
            results.vmms.push(Measured {
                name: vmm.name.clone(),
                note: vmm.note.clone(),
                ..Measured::default()
            });
        }
        self.natively(&comparison, &mut results)?;
        if self.boots > 0 {
            self.boots(&comparison, &mut results)?;
        }
        results.load.push(load());
        Ok(results)
    }

    fn commit(&self) -> Result<String> {
        let mut git = Command::new("git");
        git.current_dir(&self.workspace);
        first_word(git.args(["describe", "--always", "--dirty"]))
    }

    /// Starts, memory with a payload, and size.
    fn natively(&self, comparison: &Comparison, results: &mut Results) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let files = |name: &str, then| -> Result<Files> {
            let kernel = folder.path().join(name);
            fs::write(&kernel, payload::elf(then))?;
            Ok(Files {
                edgevmm: self.edgevmm.clone(),
                kernel,
                ..Files::default()
            })
        };
        let (halt, power_off) = (
            files("halt", Then::Halt)?,
            files("power-off", Then::PowerOff)?,
        );
        for (vmm, measured) in comparison.vmms.iter().zip(&mut results.vmms) {
            let Some(arguments) = &vmm.payload else {
                continue;
            };
            let launch = comparison.launch(vmm, arguments, &halt);
            let ram_kib = comparison.ram_kib();
            let halted: Idle = match Place::Here.measure(&Job::Halted { launch, ram_kib }) {
                Ok(halted) => halted,
                Err(error) => {
                    left_out(vmm, &error)?;
                    continue;
                }
            };
            measured.add_halted(&halted);
            measured.versions.push(version(&Place::Here, vmm, &halt)?);
            if let Some(bytes) = stripped_size(&program(vmm, &halt), folder.path()) {
                measured.add("size.binary", bytes as f64 / 1e6);
            }
        }
        step("Starting payloads", || {
            self.starts(comparison, results, &power_off)
        })
    }

    /// Starts in turns, so that all get the same share of whatever else the host does.
    fn starts(&self, comparison: &Comparison, results: &mut Results, files: &Files) -> Result<()> {
        let mut floor = Measured::default();
        for _ in 0..self.starts {
            floor.add("start", Place::Here.measure::<f64>(&Job::Nothing)? * 1e3);
            for (vmm, measured) in comparison.vmms.iter().zip(&mut results.vmms) {
                let Some(arguments) = &vmm.payload else {
                    continue;
                };
                // One that does not start at all was told of before.
                if measured.series.contains_key("halted.pss") {
                    let launch = comparison.launch(vmm, arguments, files);
                    let seconds: f64 = Place::Here.measure(&Job::Start(launch))?;
                    measured.add("start", seconds * 1e3);
                }
            }
        }
        let median = ROWS.iter().find(|row| row.key == "start.median");
        results.nothing = median.and_then(|row| floor.figure(row));
        Ok(())
    }

    /// Boots, and idle systems.
    fn boots(&self, comparison: &Comparison, results: &mut Results) -> Result<()> {
        let images = Images::of_this_user();
        let mut files = Files {
            edgevmm: self.edgevmm.clone(),
            kernel: images.vmlinux(),
            initrd: images.initrd(),
            ..Files::default()
        };
        let place = if self.in_lab {
            let paths = [&mut files.edgevmm, &mut files.kernel, &mut files.initrd];
            Place::Lab(Box::new(lab(&self.xtask, paths)?))
        } else {
            Place::Here
        };
        if self.in_lab {
            results.lab = Some(place.measure(&Job::Machine)?);
        }
        for round in 0..self.boots {
            for (vmm, measured) in comparison.vmms.iter().zip(&mut results.vmms) {
                let Some(arguments) = &vmm.boot else {
                    continue;
                };
                let job = Job::Boot {
                    launch: comparison.launch(vmm, arguments, &files),
                    ram_kib: comparison.ram_kib(),
                    idle: round + 1 == self.boots,
                };
                let what = format!(
                    "Booting under {}, {} of {}",
                    vmm.name,
                    round + 1,
                    self.boots
                );
                match step(&what, || place.measure::<Boot>(&job)) {
                    Ok(boot) => measured.add_boot(boot),
                    Err(error) => left_out(vmm, &error)?,
                }
                if round == 0 {
                    let version = version(&place, vmm, &files)?;
                    if !measured.versions.contains(&version) {
                        measured.versions.insert(0, version);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A lab with this program, `xtask`, in it, and `paths` turned into those of the same files there.
fn lab(xtask: &Path, paths: [&mut PathBuf; 3]) -> Result<Lab> {
    let lab = Lab::start()?;
    lab.put(xtask, LAB_XTASK)?;
    // Read where they are and kept in the page cache: in a file system in RAM each mapped page
    // would count as one that the VMM has written to.
    let script = r#"cat -- "$@" > /dev/null"#;
    let mut warm = lab::Command::new("sh").args(["-c", script, "sh"]);
    for path in paths {
        *path = Path::new("/host").join(path.strip_prefix("/").unwrap_or(path));
        warm = warm.arg(path.display().to_string());
    }
    let output = lab.run(&warm)?;
    ensure!(output.success(), "{}", output.stderr.trim());
    Ok(lab)
}

/// Writes report, pictures and figures to `dir`, and returns the report. Budgets and causes are
/// those that `workspace` has now.
///
/// # Errors
/// A file cannot be written.
pub fn write(results: &Results, workspace: &Path, dir: &Path) -> Result<String> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    let budgets = config::budgets(&workspace.join("benches"))?;
    let charts = draw(results, &budgets, dir)?;
    let report = report::markdown(results, &budgets, &charts);
    let json = serde_json::to_string_pretty(results)? + "\n";
    for (name, text) in [("README.md", &report), ("results.json", &json)] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(report)
}

/// Tells that a VMM does not run here; for edgevmm itself that is an error.
fn left_out(vmm: &Vmm, error: &anyhow::Error) -> Result<()> {
    ensure!(
        vmm.program != config::EDGEVMM,
        "edgevmm does not run: {error:#}"
    );
    note(&format!("{} is left out here: {error:#}", vmm.name));
    Ok(())
}

fn version(place: &Place, vmm: &Vmm, files: &Files) -> Result<String> {
    let argument = if vmm.program == config::EDGEVMM {
        "version"
    } else {
        "--version"
    };
    place.measure(&Job::FirstLine(Launch {
        program: program(vmm, files),
        arguments: vec![argument.to_owned()],
    }))
}

/// The size of a program without symbols. `None` when there is no `strip` or no such program.
fn stripped_size(program: &str, folder: &Path) -> Option<u64> {
    let path = std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())?;
    let stripped = folder.join("stripped");
    process::output(Command::new("strip").arg("-o").arg(&stripped).arg(path)).ok()?;
    Some(fs::metadata(stripped).ok()?.len())
}

fn draw<'a>(
    results: &Results,
    budgets: &BTreeMap<String, Budget>,
    dir: &Path,
) -> Result<Vec<(String, &'a str)>> {
    let mut charts = Vec::new();
    for (key, title) in CHARTS {
        let Some(row) = ROWS.iter().find(|row| row.key == *key) else {
            continue;
        };
        let bars: Vec<_> = results
            .vmms
            .iter()
            .filter_map(|vmm| Some((vmm.name.as_str(), vmm.figure(row)?)))
            .collect();
        if bars.is_empty() {
            continue;
        }
        let chart = Chart {
            title,
            bars,
            budget: budgets.get(*key).map(|budget| budget.value),
            digits: row.digits,
            own: 1,
        };
        let file = format!("{}.svg", key.replace('.', "-"));
        chart.write(&dir.join(&file))?;
        charts.push((file, *title));
    }
    Ok(charts)
}

pub(crate) fn first_word(command: &mut Command) -> Result<String> {
    Ok(process::output(command)?.trim().to_owned())
}

/// The load average over the last minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().and_then(|first| first.parse().ok());
    first.unwrap_or(0.0)
}
