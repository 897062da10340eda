//! The report about pods: what one that is a machine takes to start, and what it costs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use super::super::chart::Chart;
use super::super::lines::Lines;
use super::super::memory::Memory;
use super::super::report::{machine, median, number, table};
use super::{Density, PodResults, Starts};

/// What others publish for a small guest, in MiB; they are not measured here.
const PUBLISHED: [(&str, f64); 2] = [
    ("KubeVirt, published", 288.0),
    ("Kata Containers, declared", 130.0),
];
/// What a machine's pod may take, in MiB.
const GOAL: f64 = 10.0;
/// How much later than a pod of runc's a machine may be, in ms.
const LATE: f64 = 100.0;

/// The report as Markdown.
#[must_use]
pub(super) fn markdown(results: &PodResults) -> String {
    let load: Vec<_> = results
        .load
        .iter()
        .map(|load| format!("{load:.1}"))
        .collect();
    let mut text = format!(
        "# Pods\n\nMeasured by `cargo xtask bench pods` on {}, commit {}, {}. What is measured, and how: \
         [benches](../../benches/README.md#pods).\n\n- Host: {}; load average before and after: {}\n- {}\n",
        results.date,
        results.commit,
        results.compiler,
        machine(&results.host),
        load.join(" and "),
        results.measured.versions.join(", "),
    );
    text.push_str("\n## From a call to the first output\n\n");
    text.push_str(&starts(&results.measured.starts));
    text.push_str("\n![Medians](pods-start.svg)\n\n## Memory of one pod\n\n");
    text.push_str(&memory(results));
    text.push_str("\n![Memory of a pod](pods-memory.svg)\n\n## Side by side\n\n");
    text.push_str(&density(&results.measured.density));
    text.push_str("\n![Memory of pods](pods-density.svg)\n\n## While guests idle\n\n");
    text.push_str(&idle(results));
    text.push_str("\n## What is declared\n\n");
    text.push_str(&declared(results));
    text
}

fn starts(all: &[Starts]) -> String {
    let header = ["ms", "machine", "runc", "median of differences"].map(str::to_owned);
    let rows = all.iter().map(|starts| {
        let difference = starts.difference();
        let difference = difference.map_or_else(String::new, |it| format!("{it:+.0}"));
        let by = format!("`{}`", starts.by);
        vec![
            by,
            spread(&starts.machines),
            spread(&starts.ordinary),
            difference,
        ]
    });
    let count = all.first().map_or(0, |starts| starts.machines.len());
    let late = all
        .iter()
        .filter_map(Starts::difference)
        .fold(f64::MIN, f64::max);
    table(&header, rows)
        + &format!(
            "\nMedian (fastest to slowest) of {count} starts of each kind, by turns. The goal is to be at most \
             {LATE:.0} ms later than runc: {}.\n",
            verdict(late <= LATE)
        )
}

fn verdict(reached: bool) -> &'static str {
    if reached { "reached" } else { "**missed**" }
}

impl Starts {
    /// How much later machines are, in ms.
    fn difference(&self) -> Option<f64> {
        let pairs = self.machines.iter().zip(&self.ordinary);
        median(pairs.map(|(machine, runc)| machine - runc))
    }
}

fn spread(values: &[f64]) -> String {
    let middle = median(values.iter().copied()).unwrap_or(0.0);
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{middle:.0} ({least:.0} to {most:.0})")
}

/// KiB as MiB.
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn memory(results: &PodResults) -> String {
    let header = ["MiB", "PSS", "written to by it alone"].map(str::to_owned);
    let mut rows = Vec::new();
    let mut add = |what: &str, parts: &BTreeMap<String, Memory>| {
        for (name, memory) in parts {
            rows.push(line(name, memory.pss, memory.private_dirty));
        }
        let all = parts.values();
        rows.push(line(
            what,
            all.clone().map(|memory| memory.pss).sum(),
            all.map(|memory| memory.private_dirty).sum(),
        ));
    };
    add("**A machine's pod**", &results.measured.alone);
    add("**A pod of runc**", &results.measured.alone_ordinary);
    let mut text = table(&header, rows);
    let all = results.measured.alone.values().map(|it| it.pss).sum();
    let _ = write!(
        text,
        "\nThe guest's RAM is left out. It is the first pod of its kind on the node: of each further one \
         the program's pages are shared. The goal is at most {GOAL:.0} MiB: {}.\n\n",
        verdict(mib(all) <= GOAL)
    );
    text.push_str(
        "Published, not measured here: KubeVirt adds 288 MiB to the request \
         of a pod with one vCPU and 256 MiB (its formula for memory overhead, amd64); Kata Containers' \
         RuntimeClasses declare 130 MiB with Cloud Hypervisor, Firecracker or Dragonball and 320 MiB with QEMU.\n",
    );
    text
}

fn line(name: &str, pss: u64, private_dirty: u64) -> Vec<String> {
    vec![
        name.to_owned(),
        number(mib(pss), 1),
        number(mib(private_dirty), 1),
    ]
}

/// A pod's part of a sum in KiB, in MiB.
fn each(kib: u64, density: &Density) -> f64 {
    mib(kib) / density.pods.max(1) as f64
}

fn density(steps: &[Density]) -> String {
    let header = [
        "Machines",
        "PSS, MiB",
        "of each",
        "written to by them alone, of each",
        "charged to control groups, of each",
    ]
    .map(str::to_owned);
    let rows = steps.iter().map(|step| {
        vec![
            step.pods.to_string(),
            number(mib(step.pss), 0),
            number(each(step.pss, step), 2),
            number(each(step.private_dirty, step), 2),
            number(each(step.charged, step), 2),
        ]
    });
    table(&header, rows)
        + "\nAll without what guests touched of their RAM. PSS and what is written to are sums over shims, \
           holders of namespaces and VMMs; control groups have the latter two and what the kernel keeps \
           for them.\n"
}

fn idle(results: &PodResults) -> String {
    let pods = results.measured.density.last().map_or(1, |last| last.pods);
    let per_pod = |value: f64| number(value / pods.max(1) as f64, 3);
    let header = [
        "Of each pod, a second",
        "processes",
        "wakeups",
        "CPU time, ms",
    ]
    .map(str::to_owned);
    let activities = &results.measured.idle;
    let mut rows: Vec<_> = activities
        .iter()
        .map(|(name, it)| {
            let processes = number(it.processes as f64 / pods.max(1) as f64, 1);
            vec![
                name.clone(),
                processes,
                per_pod(it.wakeups),
                per_pod(it.cpu),
            ]
        })
        .collect();
    let all = || activities.values();
    rows.push(vec![
        "**all**".to_owned(),
        number(
            all().map(|it| it.processes).sum::<usize>() as f64 / pods.max(1) as f64,
            1,
        ),
        per_pod(all().map(|it| it.wakeups).sum()),
        per_pod(all().map(|it| it.cpu).sum()),
    ]);
    table(&header, rows)
        + &format!(
            "\n{pods} machines at a time. The guests halt for ever, so this is what runtime and kubelet \
             cost: the kubelet asks the shim for figures, which it reads from control groups.\n"
        )
}

fn declared(results: &PodResults) -> String {
    let measured = &results.measured;
    let mut text = format!(
        "The RuntimeClass of `edgevmm install` declares {} (`overhead.podFixed`). ",
        measured.declared
    );
    if let Some(last) = measured.density.last() {
        let _ = writeln!(
            text,
            "Measured with {} machines: {:.1} MiB PSS each; of it and of the kernel's part, control groups \
             are charged with {:.1} MiB.",
            last.pods,
            each(last.pss, last),
            each(last.charged, last),
        );
    }
    text
}

/// Draws the pictures.
pub(super) fn draw(results: &PodResults, dir: &Path) -> Result<()> {
    let measured = &results.measured;
    let mut bars = Vec::new();
    let names: Vec<_> = measured
        .starts
        .iter()
        .map(|it| (format!("machine, {}", it.by), format!("runc, {}", it.by)))
        .collect();
    let pairs = || measured.starts.iter().zip(&names);
    let middle = |values: &[f64]| median(values.iter().copied()).unwrap_or(0.0);
    bars.extend(pairs().map(|(it, names)| (&*names.0, middle(&it.machines))));
    bars.extend(pairs().map(|(it, names)| (&*names.1, middle(&it.ordinary))));
    let chart = Chart {
        title: "From a call to the first output, median (ms)",
        own: measured.starts.len(),
        bars,
        budget: None,
        digits: 0,
    };
    chart.write(&dir.join("pods-start.svg"))?;
    let sum = |parts: &BTreeMap<String, Memory>| mib(parts.values().map(|it| it.pss).sum());
    let mut bars = vec![
        ("machine", sum(&measured.alone)),
        ("runc", sum(&measured.alone_ordinary)),
    ];
    bars.extend(PUBLISHED);
    let chart = Chart {
        title: "Memory of a pod beyond the guest's RAM (MiB)",
        bars,
        budget: Some(GOAL),
        digits: 1,
        own: 1,
    };
    chart.write(&dir.join("pods-memory.svg"))?;
    let points = |figure: fn(&Density) -> u64| {
        let steps = measured.density.iter();
        steps
            .map(|step| (step.pods as f64, mib(figure(step))))
            .collect()
    };
    let lines = Lines {
        title: "Memory of idle machines' pods beyond guests' RAM (MiB)",
        axes: ["pods", "MiB"],
        lines: vec![
            ("PSS of all processes", points(|step| step.pss)),
            ("charged to control groups", points(|step| step.charged)),
        ],
    };
    lines.write(&dir.join("pods-density.svg"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Activity, Measured};
    use super::*;

    fn results() -> PodResults {
        let memory = |pss| Memory {
            pss,
            ..Memory::default()
        };
        PodResults {
            measured: Measured {
                starts: vec![Starts {
                    by: "ctr run".into(),
                    machines: vec![50.0, 40.0, 90.0],
                    ordinary: vec![80.0, 60.0, 70.0],
                }],
                alone: BTreeMap::from([
                    ("VMM".into(), memory(2048)),
                    ("shim".into(), memory(1024)),
                ]),
                density: vec![Density {
                    pods: 4,
                    pss: 8192,
                    ..Density::default()
                }],
                idle: BTreeMap::from([(
                    "VMM".into(),
                    Activity {
                        processes: 4,
                        wakeups: 2.0,
                        cpu: 1.0,
                    },
                )]),
                declared: "8Mi, 10m".into(),
                ..Measured::default()
            },
            ..PodResults::default()
        }
    }

    #[test]
    fn tells_medians_sums_and_parts_of_each() {
        let text = markdown(&results());
        for part in [
            "| `ctr run` | 50 (40 to 90) | 70 (60 to 80) | -20 |",
            "| **A machine's pod** | 3.0 |",
            "later than runc: reached.",
            "at most 10 MiB: reached.",
            "| 4 | 8 | 2.00 |",
            "| VMM | 1.0 | 0.500 | 0.250 |",
            "declares 8Mi, 10m",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn goals_that_are_missed_are_told() {
        let mut results = results();
        results.measured.starts[0].machines = vec![500.0];
        results.measured.alone.insert(
            "VMM".into(),
            Memory {
                pss: 10 << 10,
                ..Memory::default()
            },
        );
        assert_eq!(markdown(&results).matches("**missed**").count(), 2);
    }

    #[test]
    fn draws_all_pictures_that_the_text_has() {
        let dir = tempfile::tempdir().unwrap();
        draw(&results(), dir.path()).unwrap();
        let text = markdown(&results());
        let pictures = text.split("](").filter_map(|it| it.split_once(".svg)"));
        let mut count = 0;
        for (name, _) in pictures {
            assert!(dir.path().join(format!("{name}.svg")).exists(), "{name}");
            count += 1;
        }
        assert_eq!(count, 3);
    }
}
