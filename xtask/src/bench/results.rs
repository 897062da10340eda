//! Measured figures: rows of the report's table, and what was measured for them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::probe::{Boot, Idle, Machine};

/// How several measurements become one figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// The one in the middle.
    Median,
    /// The least.
    Minimum,
    /// The one that a tenth is below.
    TenthPercentile,
}

/// A row of the report's table.
#[derive(Debug)]
pub struct Row {
    /// Its name in the results and in `budgets.json`.
    pub key: &'static str,
    /// Its measurements' name: several rows may tell of the same ones.
    pub series: &'static str,
    /// What is shown of them.
    pub statistic: Statistic,
    /// Its title.
    pub title: &'static str,
    /// Its unit, or nothing for a count.
    pub unit: &'static str,
    /// Digits behind the point.
    pub digits: usize,
}

const fn row(key: &'static str, title: &'static str, unit: &'static str, digits: usize) -> Row {
    Row {
        key,
        series: key,
        statistic: Statistic::Median,
        title,
        unit,
        digits,
    }
}

const fn start(key: &'static str, statistic: Statistic, title: &'static str) -> Row {
    Row {
        key,
        series: "start",
        statistic,
        title,
        unit: "ms",
        digits: 1,
    }
}

/// All rows, as they are shown.
pub const ROWS: &[Row] = &[
    row("boot.exits", "Boot: KVM exits", "", 0),
    row("boot.userspace-exits", "Boot: exits to the VMM", "", 0),
    row("boot.cpu", "Boot: CPU time", "s", 2),
    row("boot.time", "Boot: time", "s", 2),
    row("idle.pss", "Idle Linux: PSS beyond RAM", "kB", 0),
    row("idle.private-dirty", "Idle Linux: private dirty", "kB", 0),
    row("idle.anonymous", "Idle Linux: anonymous", "kB", 0),
    row("idle.threads", "Idle Linux: threads", "", 0),
    row("idle.wakeups.vcpu", "Idle Linux: wakeups of vCPUs", "/s", 1),
    row(
        "idle.wakeups.other",
        "Idle Linux: wakeups of other threads",
        "/s",
        1,
    ),
    row("halted.rss", "Payload: RSS beyond RAM", "kB", 0),
    row("halted.pss", "Payload: PSS beyond RAM", "kB", 0),
    row("halted.private-dirty", "Payload: private dirty", "kB", 0),
    start(
        "start.min",
        Statistic::Minimum,
        "Exec to first guest byte: min",
    ),
    start(
        "start.p10",
        Statistic::TenthPercentile,
        "Exec to first guest byte: p10",
    ),
    start(
        "start.median",
        Statistic::Median,
        "Exec to first guest byte: median",
    ),
    row("size.binary", "Program, stripped", "MB", 2),
    row("size.libraries", "Its shared libraries", "MB", 1),
];

/// Everything that was measured in one run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Results {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The commit of this checkout.
    pub commit: String,
    /// Whether the program was given rather than built from that commit.
    pub given: bool,
    /// The compiler.
    pub compiler: String,
    /// Load averages over a minute of this host, before and after.
    pub load: Vec<f64>,
    /// This host.
    pub host: Option<Machine>,
    /// The machine that booted kernels, if it was the lab's.
    pub lab: Option<Machine>,
    /// How long a program that does nothing takes here, in ms.
    pub nothing: Option<f64>,
    /// VMMs in the order of the table.
    pub vmms: Vec<Measured>,
}

/// What was measured of one VMM.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Its name.
    pub name: String,
    /// What is special about it.
    pub note: String,
    /// Its version where kernels boot, and where payloads start.
    pub versions: Vec<String>,
    /// Measurements by series.
    pub series: BTreeMap<String, Vec<f64>>,
    /// Exits of each boot by reason.
    pub reasons: Vec<BTreeMap<String, u64>>,
    /// Wakeups a second of an idle system, by thread.
    pub wakeups: BTreeMap<String, f64>,
}

impl Measured {
    /// The figure of a row.
    #[must_use]
    pub fn figure(&self, row: &Row) -> Option<f64> {
        let mut values = self.series.get(row.series)?.clone();
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let index = match row.statistic {
            Statistic::Minimum => 0,
            Statistic::TenthPercentile => last / 10,
            Statistic::Median => last / 2,
        };
        values.get(index).copied()
    }

    /// Exits by reason in the boot that had the median number of them.
    #[must_use]
    pub fn median_reasons(&self) -> BTreeMap<String, u64> {
        let mut boots: Vec<_> = self.reasons.iter().collect();
        boots.sort_by_key(|reasons| reasons.values().sum::<u64>());
        let middle = boots.len().saturating_sub(1) / 2;
        boots
            .get(middle)
            .map(|boot| (*boot).clone())
            .unwrap_or_default()
    }

    /// Adds one measurement.
    pub fn add(&mut self, series: &str, value: f64) {
        self.series
            .entry(series.to_owned())
            .or_default()
            .push(value);
    }

    /// Adds what a boot gave.
    pub fn add_boot(&mut self, boot: Boot) {
        self.add("boot.time", boot.seconds);
        self.add("boot.cpu", boot.cpu_seconds);
        for (series, count) in [
            ("boot.exits", boot.exits),
            ("boot.userspace-exits", boot.userspace_exits),
        ] {
            if let Some(count) = count {
                self.add(series, count as f64);
            }
        }
        self.reasons.push(boot.reasons);
        if let Some(idle) = boot.idle {
            self.add("idle.pss", idle.memory.pss as f64);
            self.add("idle.private-dirty", idle.memory.private_dirty as f64);
            self.add("idle.anonymous", idle.memory.anonymous as f64);
            self.add("idle.threads", idle.threads as f64);
            let (vcpus, others): (Vec<_>, Vec<_>) =
                idle.wakeups.iter().partition(|(name, _)| is_vcpu(name));
            // An empty sum of floats is a negative zero.
            let sum =
                |threads: &[(&String, &f64)]| threads.iter().fold(0.0, |sum, (_, n)| sum + **n);
            self.add("idle.wakeups.vcpu", sum(&vcpus));
            self.add("idle.wakeups.other", sum(&others));
            for (name, count) in idle.wakeups {
                let name = if is_vcpu(&name) {
                    "vCPUs".to_owned()
                } else {
                    name
                };
                *self.wakeups.entry(name).or_default() += count;
            }
        }
    }

    /// Adds what a halted payload's VMM takes.
    pub fn add_halted(&mut self, idle: &Idle) {
        self.add("halted.rss", idle.memory.rss as f64);
        self.add("halted.pss", idle.memory.pss as f64);
        self.add("halted.private-dirty", idle.memory.private_dirty as f64);
        self.add("size.libraries", idle.libraries as f64 / 1e6);
    }
}

/// Whether a thread runs a vCPU, by the names that edgevmm and QEMU (`debug-threads`) give them.
pub(super) fn is_vcpu(thread: &str) -> bool {
    thread.starts_with("vcpu") || thread.starts_with("CPU ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rows_of_one_series_show_its_statistics() {
        let mut measured = Measured::default();
        for value in (1..=40).rev() {
            measured.add("start", f64::from(value));
        }
        let figure = |key| {
            let row = ROWS.iter().find(|row| row.key == key).unwrap();
            measured.figure(row).unwrap()
        };
        assert_eq!(
            figure("start.min").total_cmp(&1.0),
            std::cmp::Ordering::Equal
        );
        assert!((4.0..=5.0).contains(&figure("start.p10")));
        assert!((20.0..=21.0).contains(&figure("start.median")));
    }

    #[test]
    fn reasons_are_those_of_the_middle_boot() {
        let boot = |interrupts| BTreeMap::from([("interrupt".to_owned(), interrupts)]);
        let measured = Measured {
            reasons: vec![boot(934), boot(586), boot(774)],
            ..Measured::default()
        };
        assert_eq!(measured.median_reasons(), boot(774));
        assert!(Measured::default().median_reasons().is_empty());
    }

    #[test]
    fn what_was_not_measured_has_no_figure() {
        assert!(
            ROWS.iter()
                .all(|row| Measured::default().figure(row).is_none())
        );
    }
}
