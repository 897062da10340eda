//! The report about the operator: how soon it does what objects say, and what it takes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use super::super::lines::Lines;
use super::super::report::{machine, number, table};
use super::{Idle, OperatorResults, Step};

/// What the operator may take with [`FEW`] instances, in MiB.
const GOAL: f64 = 20.0;
/// The number of instances that the goal is about.
const FEW: usize = 100;

/// The report as Markdown.
#[must_use]
pub(super) fn markdown(results: &OperatorResults) -> String {
    let load = results.load.iter().map(|load| format!("{load:.1}"));
    let measured = &results.measured;
    let mut text = format!(
        "# The operator\n\nMeasured by `cargo xtask bench operator` on {}, commit {}, {}. What is measured, and \
         how: [benches](../../benches/README.md#the-operator).\n\n- Host: {}; load average before and after: {}\n\
         - {} nodes that only say that pods run; API server, etcd and the operator share the host\n",
        results.date,
        results.commit,
        results.compiler,
        machine(&results.host),
        load.collect::<Vec<_>>().join(" and "),
        measured.nodes,
    );
    text.push_str("\n## From an object to what it says\n\n");
    text.push_str(&times(&measured.steps));
    text.push_str("\n![Latency](operator-latency.svg)\n\n## Requests to the API server\n\n");
    text.push_str(&requests(&measured.steps));
    text.push_str("\n## While nothing changes\n\n");
    text.push_str(&idle(&measured.idle));
    text.push_str("\n![Memory](operator-memory.svg)\n");
    text
}

/// The value that so many of a hundred are not above.
fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted
        .get((sorted.len() * percent / 100).min(last))
        .copied()
}

fn shown(values: &[f64], percent: usize) -> String {
    percentile(values, percent).map_or_else(|| "–".to_owned(), |value| number(value, 0))
}

fn times(steps: &[Step]) -> String {
    let header = [
        "New instances",
        "created → pod made, ms: p50",
        "p99",
        "pod runs → instance Running, ms: p50",
        "p99",
        "instances a second",
    ]
    .map(str::to_owned);
    let rows = steps.iter().map(|step| {
        let how = if step.singly { "one by one" } else { "at once" };
        let name = format!("{} {how}, {} in all", step.added, step.instances);
        let rate = step.added as f64 / step.seconds.max(f64::MIN_POSITIVE);
        let (pod, running) = (&step.pod, &step.running);
        vec![
            name,
            shown(pod, 50),
            shown(pod, 99),
            shown(running, 50),
            shown(running, 99),
            number(rate, 1),
        ]
    });
    table(&header, rows)
        + "\nTimes are from the sending of a request to a watch's word of what follows, so they have the API \
           server's part, too.\n"
}

/// All kinds of requests that there were.
fn kinds<'a>(all: impl Iterator<Item = &'a BTreeMap<String, u64>>) -> Vec<&'a str> {
    let mut kinds: Vec<_> = all.flat_map(|it| it.keys().map(String::as_str)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

fn requests(steps: &[Step]) -> String {
    let mut header = vec!["Requests for each new instance".to_owned()];
    header.extend(steps.iter().map(|step| step.added.to_string()));
    let each = |count: u64, step: &Step| number(count as f64 / step.added.max(1) as f64, 2);
    let mut rows: Vec<_> = kinds(steps.iter().map(|step| &step.requests))
        .into_iter()
        .map(|kind| {
            let count = |step: &Step| step.requests.get(kind).copied().unwrap_or(0);
            let mut row = vec![kind.to_owned()];
            row.extend(steps.iter().map(|step| each(count(step), step)));
            row
        })
        .collect();
    let mut all = vec!["**all**".to_owned()];
    all.extend(
        steps
            .iter()
            .map(|step| each(step.requests.values().sum(), step)),
    );
    rows.push(all);
    table(&header, rows)
        + "\nFrom the API server's audit log: what the operator asked until all ran.\n"
}

/// KiB as MiB.
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn idle(all: &[Idle]) -> String {
    let header = [
        "Instances",
        "PSS, MiB",
        "written to by it alone, MiB",
        "threads",
        "wakeups a second",
        "CPU time, ms a second",
        "requests a minute",
    ]
    .map(str::to_owned);
    let rows = all.iter().map(|idle| {
        let requests: u64 = idle.requests.values().sum();
        let minutes = (idle.seconds / 60.0).max(f64::MIN_POSITIVE);
        vec![
            idle.instances.to_string(),
            number(mib(idle.memory.pss), 1),
            number(mib(idle.memory.private_dirty), 1),
            idle.threads.to_string(),
            number(idle.wakeups, 1),
            number(idle.cpu, 2),
            number(requests as f64 / minutes, 1),
        ]
    });
    let mut text = table(&header, rows);
    text.push_str(
        "\nNothing is polled. Each of its watches is begun anew when the API server ends it, after some five \
         minutes, which counts when it falls into the time that was measured.\n",
    );
    let few = all.iter().find(|idle| idle.instances == FEW);
    if let Some(few) = few {
        let verdict = if mib(few.memory.pss) <= GOAL {
            "reached"
        } else {
            "**missed**"
        };
        let _ = write!(
            text,
            "\nThe goal is at most {GOAL:.0} MiB with {FEW} instances: {verdict}.\n"
        );
    }
    text
}

/// Draws the pictures.
pub(super) fn draw(results: &OperatorResults, dir: &Path) -> Result<()> {
    let measured = &results.measured;
    let memory = measured.idle.iter();
    let memory = memory.map(|idle| (idle.instances as f64, mib(idle.memory.pss)));
    let lines = Lines {
        title: "The idle operator's memory (MiB)",
        axes: ["instances", "PSS, MiB"],
        lines: vec![("PSS", memory.collect())],
    };
    lines.write(&dir.join("operator-memory.svg"))?;
    let at_once = || measured.steps.iter().filter(|step| !step.singly);
    let points = |values: fn(&Step) -> &[f64], percent| {
        let at = move |step: &Step| Some((step.added as f64, percentile(values(step), percent)?));
        at_once().filter_map(at).collect()
    };
    let lines = Lines {
        title: "Many instances at once: until each runs (ms)",
        axes: ["instances created at once", "ms"],
        lines: vec![
            ("created → pod made, p50", points(|step| &step.pod, 50)),
            ("created → pod made, p99", points(|step| &step.pod, 99)),
        ],
    };
    lines.write(&dir.join("operator-latency.svg"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::super::memory::Memory;
    use super::super::Measured;
    use super::*;

    fn results(pss: u64) -> OperatorResults {
        let idle = Idle {
            instances: FEW,
            seconds: 30.0,
            memory: Memory {
                pss,
                ..Memory::default()
            },
            requests: BTreeMap::from([("watch pods".to_owned(), 2)]),
            ..Idle::default()
        };
        let step = Step {
            added: 4,
            instances: 104,
            seconds: 2.0,
            pod: vec![30.0, 10.0, 20.0, 90.0],
            running: vec![5.0],
            requests: BTreeMap::from([("create pods".to_owned(), 4), ("patch x".to_owned(), 2)]),
            ..Step::default()
        };
        OperatorResults {
            measured: Measured {
                nodes: 50,
                steps: vec![step],
                idle: vec![idle],
            },
            ..OperatorResults::default()
        }
    }

    #[test]
    fn tells_times_requests_and_the_verdict() {
        let text = markdown(&results(10 << 10));
        for part in [
            "| 4 at once, 104 in all | 30 | 90 | 5 | 5 | 2.0 |",
            "| create pods | 1.00 |",
            "| **all** | 1.50 |",
            "| 100 | 10.0 | 0.0 | 0 | 0.0 | 0.00 | 4.0 |",
            "100 instances: reached.",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(markdown(&results(21 << 10)).contains("**missed**"));
    }

    #[test]
    fn draws_all_pictures_that_the_text_has() {
        let dir = tempfile::tempdir().unwrap();
        draw(&results(1), dir.path()).unwrap();
        let text = markdown(&results(1));
        let pictures = text.split("](").filter_map(|it| it.split_once(".svg)"));
        let names: Vec<_> = pictures.map(|(name, _)| name).collect();
        assert_eq!(names.len(), 2);
        for name in names {
            assert!(dir.path().join(format!("{name}.svg")).exists(), "{name}");
        }
    }
}
