//! The report about disks: what each contestant does, where we are behind, and why.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use super::super::chart::Chart;
use super::super::config::Cause;
use super::super::report::{machine, median, number, table};
use super::cases::{self, Section};
use super::compare::{against_raw, behind};
use super::native::{Contestant, Sample};
use super::{DiskResults, Measured};

/// What the picture about guests is called.
const GUESTS: &str = "disks-guest.svg";

impl Measured {
    /// The median of what `figure` takes from a contestant's samples.
    fn median(&self, of: Contestant, figure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(
            self.samples
                .get(of.key())?
                .iter()
                .flatten()
                .filter_map(figure),
        )
    }

    /// Requests a second in the best round: whatever else the host does only takes from them.
    pub(super) fn iops(&self, of: Contestant) -> Option<f64> {
        best(self.samples.get(of.key())?.iter().flatten())
    }

    pub(super) fn cpu(&self, of: Contestant) -> Option<f64> {
        self.median(of, |sample| Some(sample.cpu))
    }

    /// How much faster one of ours is than what QEMU has of the same kind.
    pub(super) fn ratio(&self, of: Contestant) -> Option<f64> {
        Some(self.iops(of)? / self.iops(of.rival())?)
    }
}

/// The most requests a second.
fn best<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Option<f64> {
    let iops = samples.into_iter().map(|sample| sample.iops);
    iops.max_by(f64::total_cmp)
}

/// The report as Markdown.
#[must_use]
pub fn markdown(
    results: &DiskResults,
    causes: &[Cause],
    charts: &[Section],
    with_guests: bool,
) -> String {
    let mut text = String::from("# Disk benchmarks\n\n");
    text.push_str(&circumstances(results));
    for section in Section::ALL {
        let rows: Vec<_> = rows(results, section).collect();
        if rows.is_empty() {
            continue;
        }
        let title = section.title();
        let _ = write!(text, "\n## {title}\n\n{}", throughput(&rows));
        let _ = write!(text, "\n{}", costs(&rows));
        let _ = write!(text, "\n{}", latencies(&rows));
        if charts.contains(&section) {
            let _ = write!(text, "\n![{title}, times QEMU]({})\n", section.file());
        }
    }
    if !results.native.is_empty() {
        text.push_str("\n## qcow2 against raw\n\n");
        text.push_str(&against_raw(results));
    }
    if with_guests {
        text.push_str("\n## In a guest\n\n");
        text.push_str(&guests(results));
        let _ = write!(text, "\n![Requests a second in a guest]({GUESTS})\n");
    }
    text.push_str("\n## Behind QEMU\n\n");
    text.push_str(&behind(results, causes));
    if !results.native.is_empty() {
        text.push_str("\n## Telling of ended requests\n\n");
        text.push_str(&notifications(results));
    }
    text
}

fn circumstances(results: &DiskResults) -> String {
    let load: Vec<_> = results
        .load
        .iter()
        .map(|load| format!("{load:.1}"))
        .collect();
    format!(
        "Measured by `cargo xtask bench disks` on {}, commit {}, {}. What is compared, and how each \
         figure comes about: [benches](../../benches/README.md#disks).\n\n\
         - Host: {}; load average before, between and after the parts: {}\n\
         - File system: {}\n- QEMU on this host: {}\n- Lab: {}\n",
        results.date,
        results.commit,
        results.compiler,
        machine(&results.host),
        load.join(", "),
        results.file_system,
        results.qemu,
        machine(&results.lab),
    )
}

fn rows(results: &DiskResults, section: Section) -> impl Iterator<Item = &Measured> {
    results
        .native
        .iter()
        .filter(move |row| row.case.section() == section)
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| number(value, digits))
}

pub(super) fn times(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2} ×"))
}

/// What a row is called: where both kinds are in one table, with how it is cached.
fn title(row: &Measured) -> String {
    match row.case.section() {
        Section::Direct | Section::Cached => row.case.title(),
        Section::Allocating | Section::Compressed => row.case.key(),
    }
}

fn throughput(rows: &[&Measured]) -> String {
    let header = [
        "Requests a second",
        "edgevmm, block layer",
        "QEMU, io_uring",
        "QEMU, native or threads",
        "edgevmm, virtio disk",
        "QEMU, virtio disk",
        "Layer to io_uring",
        "Disk to QEMU's",
    ]
    .map(str::to_owned);
    let rows = rows.iter().map(|row| {
        let iops = |contestant: &Contestant| shown(row.iops(*contestant), 0);
        let mut cells = vec![title(row)];
        cells.extend(Contestant::ALL.iter().map(iops));
        cells.push(times(row.ratio(Contestant::Layer)));
        cells.push(times(row.ratio(Contestant::Disk)));
        cells
    });
    table(&header, rows)
}

fn costs(rows: &[&Measured]) -> String {
    let header = [
        "CPU time of a request, µs",
        "edgevmm, block layer",
        "QEMU, io_uring",
        "QEMU, native or threads",
        "edgevmm, virtio disk",
        "QEMU, virtio disk",
        "Interrupts for a request, edgevmm",
        "Interrupts for a request, QEMU",
    ]
    .map(str::to_owned);
    let rows = rows.iter().map(|row| {
        let cpu = |contestant: &Contestant| shown(row.cpu(*contestant), 1);
        let interrupts = |of| shown(row.median(of, |sample| sample.interrupts), 2);
        let mut cells = vec![title(row)];
        cells.extend(Contestant::ALL.iter().map(cpu));
        cells.push(interrupts(Contestant::Disk));
        cells.push(interrupts(Contestant::Export));
        cells
    });
    table(&header, rows)
}

fn latencies(rows: &[&Measured]) -> String {
    let header = [
        "Latency, µs: p50 / p99 / p99.9",
        "edgevmm, block layer",
        "edgevmm, virtio disk",
        "QEMU, virtio disk",
    ]
    .map(str::to_owned);
    let rows = rows.iter().map(|row| {
        let latency = |of| {
            let part = |index: usize| {
                let value = row.median(of, |sample| sample.latency?.get(index).copied());
                shown(value, 0)
            };
            format!("{} / {} / {}", part(0), part(1), part(2))
        };
        vec![
            title(row),
            latency(Contestant::Layer),
            latency(Contestant::Disk),
            latency(Contestant::Export),
        ]
    });
    table(&header, rows)
}

fn guests(results: &DiskResults) -> String {
    let mut header = vec![String::new()];
    header.extend(results.guests.iter().map(|vmm| vmm.name.clone()));
    let figure = |index: usize, figure: &dyn Fn(&Sample) -> Option<f64>, digits| {
        let cell = |vmm: &super::guest::Measured| {
            let samples = vmm.samples.get(index).into_iter().flatten();
            shown(median(samples.filter_map(figure)), digits)
        };
        results.guests.iter().map(cell).collect::<Vec<_>>()
    };
    let mut rows = Vec::new();
    for (index, case) in cases::of_guest().iter().enumerate() {
        let mut add = |what: &str, cells| {
            rows.push([vec![format!("{}: {what}", case.access())], cells].concat());
        };
        let most = |vmm| shown(guest_iops(vmm, index), 0);
        add(
            "requests a second",
            results.guests.iter().map(most).collect(),
        );
        add(
            "latency p50, µs",
            figure(index, &|s| Some(s.latency?[0]), 0),
        );
        add(
            "latency p99, µs",
            figure(index, &|s| Some(s.latency?[1]), 0),
        );
        add("CPU of the VMM, µs", figure(index, &|s| Some(s.cpu), 0));
        add("interrupts", figure(index, &|s| s.interrupts, 2));
    }
    let mut text = table(&header, rows);
    text.push('\n');
    for vmm in &results.guests {
        let _ = writeln!(text, "- {}: {}; {}.", vmm.name, vmm.version, vmm.note);
    }
    text
}

/// Requests a second of a guest's best boot in a case.
fn guest_iops(vmm: &super::guest::Measured, index: usize) -> Option<f64> {
    best(vmm.samples.get(index)?)
}

/// Requests a second of edgevmm's guest in a case, to those of the best of the others.
pub(super) fn guest_ratio(results: &DiskResults, index: usize) -> Option<f64> {
    let iops = |vmm| guest_iops(vmm, index);
    let (own, others) = results.guests.split_first()?;
    let best = others.iter().filter_map(iops).max_by(f64::total_cmp)?;
    Some(iops(own)? / best)
}

fn notifications(results: &DiskResults) -> String {
    let mut text = String::new();
    if let Some(cost) = results.notification {
        let _ = writeln!(
            text,
            "On this host a signal through an eventfd takes {:.2} µs to send when nobody sleeps for \
             it, and {:.1} µs until a thread that slept has it. A virtio disk signals each interrupt \
             so; requests that end within 30 µs share one.",
            cost.send, cost.wake
        );
    }
    let shared = |row: &Measured| row.median(Contestant::Disk, |sample| sample.interrupts);
    for depth in [1, 16] {
        let all = results.native.iter().filter(|row| row.case.depth == depth);
        if let Some(interrupts) = median(all.filter_map(shared)) {
            let _ = write!(
                text,
                "\nAt depth {depth} an interrupt told of {:.1} requests (median of the cases above).",
                1.0 / interrupts
            );
        }
    }
    text.push('\n');
    text
}

/// Draws how the rows of a section compare to QEMU. Returns whether there are any.
///
/// # Errors
/// The file cannot be written.
pub fn draw(results: &DiskResults, section: Section, dir: &Path) -> Result<bool> {
    let bars: Vec<_> = rows(results, section)
        .filter_map(|row| Some((title(row), row.ratio(Contestant::Layer)?)))
        .collect();
    if bars.is_empty() {
        return Ok(false);
    }
    let title = format!("{}: block layer, times QEMU io_uring", section.title());
    let chart = Chart {
        title: &title,
        bars: bars
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect(),
        budget: Some(1.0),
        digits: 2,
        own: bars.len(),
    };
    chart.write(&dir.join(section.file()))?;
    Ok(true)
}

/// Draws how guests compare. Returns whether there were any.
///
/// # Errors
/// The file cannot be written.
pub fn draw_guests(results: &DiskResults, dir: &Path) -> Result<bool> {
    let bars: Vec<_> = cases::of_guest()
        .iter()
        .enumerate()
        .filter_map(|(index, case)| Some((case.access(), guest_ratio(results, index)?)))
        .collect();
    if bars.is_empty() {
        return Ok(false);
    }
    let chart = Chart {
        title: "In a guest: edgevmm, times the best QEMU",
        bars: bars
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect(),
        budget: Some(1.0),
        digits: 2,
        own: bars.len(),
    };
    chart.write(&dir.join(GUESTS))?;
    Ok(true)
}
