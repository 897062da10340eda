//! Where we are behind QEMU, and qcow2 behind raw: by how much, whether in every round, and why.

use std::fmt::Write;

use super::super::config::Cause;
use super::super::report::{number, table};
use super::cases::{self, Image};
use super::native::{Contestant, Sample};
use super::report::{guest_ratio, times};
use super::{DiskResults, Measured};

/// How near to raw qcow2 is to be.
const NEAR: f64 = 0.9;

const OVERLAP: &str =
    "Who is ahead changes from round to round, with the host's disk: the rounds of both overlap.";

/// The least and the most requests a second of all rounds.
#[derive(Debug, Clone, Copy)]
struct Rounds {
    least: f64,
    most: f64,
}

impl Rounds {
    fn of<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Option<Self> {
        let iops = samples.into_iter().map(|sample| sample.iops);
        iops.fold(None, |rounds: Option<Self>, iops| {
            let rounds = rounds.unwrap_or(Self {
                least: iops,
                most: iops,
            });
            Some(Self {
                least: rounds.least.min(iops),
                most: rounds.most.max(iops),
            })
        })
    }

    fn beside(self, other: Self) -> Beside {
        let span = |rounds: Self| format!("{}–{}", number(rounds.least, 0), number(rounds.most, 0));
        Beside {
            overlap: self.least <= other.most && other.least <= self.most,
            shown: format!("{} to {}", span(self), span(other)),
        }
    }
}

/// The rounds of two that are compared.
#[derive(Debug, Default)]
struct Beside {
    overlap: bool,
    shown: String,
}

impl Measured {
    fn rounds(&self, of: Contestant) -> Option<Rounds> {
        Rounds::of(self.samples.get(of.key())?.iter().flatten())
    }
}

/// The rounds of edgevmm's guest in a case beside those of the best of the others.
fn guest_rounds(results: &DiskResults, index: usize) -> Option<Beside> {
    let rounds = |vmm: &super::guest::Measured| Rounds::of(vmm.samples.get(index)?);
    let (own, others) = results.guests.split_first()?;
    let others = others.iter().filter_map(rounds);
    let best = others.max_by(|a, b| a.most.total_cmp(&b.most))?;
    Some(rounds(own)?.beside(best))
}

/// qcow2 to raw.
pub(super) fn against_raw(results: &DiskResults) -> String {
    let header = [
        "Requests a second, qcow2 to raw",
        "edgevmm, block layer",
        "QEMU, io_uring",
        "edgevmm, virtio disk",
        "QEMU, virtio disk",
    ]
    .map(str::to_owned);
    let pairs = results.native.iter().filter_map(|raw| {
        let same = |row: &&Measured| {
            row.case.image == Image::Qcow2
                && row.case.direct == raw.case.direct
                && row.case.access() == raw.case.access()
        };
        let qcow2 = results.native.iter().find(same)?;
        (raw.case.image == Image::Raw).then_some((raw, qcow2))
    });
    let pairs: Vec<_> = pairs.collect();
    let title = |raw: &Measured| {
        let cache = if raw.case.direct { "direct" } else { "cached" };
        format!("{cache}: {}", raw.case.access())
    };
    let share = |qcow2: &Measured, raw: &Measured, of| Some(qcow2.iops(of)? / raw.iops(of)?);
    let rows = pairs.iter().map(|(raw, qcow2)| {
        let share = |of| times(share(qcow2, raw, of));
        vec![
            title(raw),
            share(Contestant::Layer),
            share(Contestant::Uring),
            share(Contestant::Disk),
            share(Contestant::Export),
        ]
    });
    let mut text = table(&header, rows);
    let layer = Contestant::Layer;
    let beyond = pairs.iter().filter_map(|(raw, qcow2)| {
        let share = share(qcow2, raw, layer).filter(|share| *share < NEAR)?;
        let cpu = Some(qcow2.cpu(layer)? / raw.cpu(layer)?);
        Some(Behind {
            title: title(raw),
            ratio: share,
            cpu,
            rounds: qcow2.rounds(layer)?.beside(raw.rounds(layer)?),
        })
    });
    let beyond: Vec<_> = beyond.collect();
    if !beyond.is_empty() {
        text.push_str("\nBlock layer, further than 10 % behind raw:\n");
        let (close, clear): (Vec<_>, _) = beyond.into_iter().partition(|row| row.rounds.overlap);
        tell(&mut text, OVERLAP, close.into_iter());
        tell(&mut text, "In every round:", clear.into_iter());
    }
    text
}

pub(super) fn behind(results: &DiskResults, causes: &[Cause]) -> String {
    let mut rows = rows_behind(results);
    if rows.is_empty() {
        return "In no row.\n".to_owned();
    }
    let mut text = String::from(
        "On a busy host a row may be behind because of what else ran: then its CPU time is not, which \
         load changes less. A row is told of at the first cause that it has.\n",
    );
    for cause in causes {
        let of_cause = rows.extract_if(.., |row| {
            cause.rows.iter().all(|part| row.title.contains(part))
        });
        tell(&mut text, &cause.cause, of_cause);
    }
    let close = rows.extract_if(.., |row| row.rounds.overlap);
    tell(&mut text, OVERLAP, close);
    let waited = rows.extract_if(.., |row| row.cpu.is_some_and(|cpu| cpu < 1.0));
    tell(
        &mut text,
        "With less CPU time than QEMU: what took longer was the disk, or the wait for a CPU.",
        waited,
    );
    tell(&mut text, "No cause known:", rows.into_iter());
    text
}

/// A row in which we, or qcow2, are behind.
struct Behind {
    title: String,
    /// Requests a second, to those of what it is compared with.
    ratio: f64,
    /// CPU time of a request, likewise.
    cpu: Option<f64>,
    rounds: Beside,
}

fn tell(text: &mut String, cause: &str, rows: impl Iterator<Item = Behind>) {
    let rows: Vec<_> = rows
        .map(|row| {
            vec![
                row.title,
                times(Some(row.ratio)),
                times(row.cpu),
                row.rounds.shown,
            ]
        })
        .collect();
    if !rows.is_empty() {
        let header = ["", "Requests a second", "CPU time", "Rounds"].map(str::to_owned);
        let _ = write!(text, "\n{cause}\n\n{}", table(&header, rows));
    }
}

/// What is behind QEMU, and by how much.
fn rows_behind(results: &DiskResults) -> Vec<Behind> {
    let mut rows = Vec::new();
    for measured in &results.native {
        for (contestant, who) in [
            (Contestant::Layer, "block layer"),
            (Contestant::Disk, "virtio disk"),
        ] {
            let cpu = |of| measured.cpu(of);
            let rounds = measured
                .rounds(contestant)
                .zip(measured.rounds(contestant.rival()));
            let rounds = rounds.map(|(ours, qemu)| ours.beside(qemu));
            if let Some(ratio) = measured.ratio(contestant).filter(|ratio| *ratio < 1.0) {
                rows.push(Behind {
                    title: format!("{}, {who}", measured.case.key()),
                    ratio,
                    cpu: cpu(contestant)
                        .zip(cpu(contestant.rival()))
                        .map(|(ours, qemu)| ours / qemu),
                    rounds: rounds.unwrap_or_default(),
                });
            }
        }
    }
    for (index, case) in cases::of_guest().iter().enumerate() {
        if let Some(ratio) = guest_ratio(results, index).filter(|ratio| *ratio < 1.0) {
            rows.push(Behind {
                title: format!("in a guest: {}, against the best QEMU", case.access()),
                ratio,
                cpu: None,
                rounds: guest_rounds(results, index).unwrap_or_default(),
            });
        }
    }
    rows
}
