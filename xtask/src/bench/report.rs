//! The report: a table, what is over budget and why, and where exits and wakeups come from.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::config::Budget;
use super::probe::Machine;
use super::results::{Measured, ROWS, Results, Row};

/// Reasons and threads with less than this share of the largest are summed up.
const SMALL: f64 = 0.01;

/// The report as Markdown; `charts` are the names of its pictures.
#[must_use]
pub fn markdown(
    results: &Results,
    budgets: &BTreeMap<String, Budget>,
    charts: &[(String, &str)],
) -> String {
    let mut text = String::from("# Benchmarks\n\n");
    text.push_str(&circumstances(results));
    text.push_str("\n## Figures\n\n");
    text.push_str(&figures(results, budgets));
    text.push_str(&notes(results));
    text.push_str("\n## Over budget\n\n");
    text.push_str(&over_budget(results, budgets));
    for (file, title) in charts {
        let _ = write!(text, "\n![{title}]({file})\n");
    }
    text.push_str("\n## Exits by reason\n\n");
    text.push_str(&breakdown(results, 0, |vmm| {
        let count = |(reason, count): (&String, &u64)| (reason.clone(), *count as f64);
        vmm.median_reasons().iter().map(count).collect()
    }));
    text.push_str("\n## Wakeups a second while the guest idles, by thread\n\n");
    text.push_str(&breakdown(results, 1, |vmm| vmm.wakeups.clone()));
    text
}

/// A machine in a line.
pub(super) fn machine(machine: &Option<Machine>) -> String {
    machine.as_ref().map_or_else(
        || "not used".to_owned(),
        |machine| {
            let Machine {
                cpu,
                cpus,
                kernel,
                kvm,
            } = machine;
            format!("{cpus} × {cpu}, Linux {kernel}, {kvm}")
        },
    )
}

fn circumstances(results: &Results) -> String {
    let load: Vec<String> = results
        .load
        .iter()
        .map(|load| format!("{load:.1}"))
        .collect();
    let boots = if results.lab.is_some() {
        "Boot and idle rows are from the nested-KVM lab, an emulated machine: counts and memory hold, \
         times only compare."
    } else {
        "All rows are from this host's own KVM."
    };
    let given = if results.given {
        " (the program was given, not built by this run)"
    } else {
        ""
    };
    let mut text = format!(
        "Measured by `cargo xtask bench` on {}, commit {}{given}, {}. What is compared, and how each figure \
         comes about: [benches](../../benches/README.md). Disks have a [page of their own](disks.md).\n\n\
         - Host: {}; load average before and after: {}\n\
         - Lab: {}\n- {boots}\n",
        results.date,
        results.commit,
        results.compiler,
        machine(&results.host),
        load.join(" and "),
        machine(&results.lab),
    );
    if let Some(nothing) = results.nothing {
        let _ = writeln!(
            text,
            "- A program that does nothing comes and goes in {nothing:.2} ms here (median): the \
             floor of the start rows."
        );
    }
    text
}

fn figures(results: &Results, budgets: &BTreeMap<String, Budget>) -> String {
    let names = results.vmms.iter().map(|vmm| vmm.name.clone());
    let mut header: Vec<String> = std::iter::once(String::new()).chain(names).collect();
    header.push("To beat".to_owned());
    let rows = ROWS.iter().filter_map(|row| {
        let figure = |vmm: &Measured| shown(row, vmm.figure(row));
        let cells: Vec<String> = results.vmms.iter().map(figure).collect();
        let title = if row.unit.is_empty() {
            row.title.to_owned()
        } else {
            format!("{}, {}", row.title, row.unit)
        };
        let budget = budgets.get(row.key).map_or_else(String::new, |budget| {
            format!("{} ({})", number(budget.value, row.digits), budget.of)
        });
        let measured = cells.iter().any(|cell| cell != "–");
        measured.then(|| [vec![title], cells, vec![budget]].concat())
    });
    table(&header, rows)
}

fn notes(results: &Results) -> String {
    let mut text = String::from("\n");
    for vmm in &results.vmms {
        let versions = vmm.versions.join("; natively ");
        let _ = writeln!(text, "- {}: {versions}. {}.", vmm.name, capital(&vmm.note));
    }
    text
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(char::to_uppercase);
    first.into_iter().flatten().chain(letters).collect()
}

fn over_budget(results: &Results, budgets: &BTreeMap<String, Budget>) -> String {
    let mut text = String::new();
    let Some(own) = results.vmms.first() else {
        return text;
    };
    for row in ROWS {
        let (Some(value), Some(budget)) = (own.figure(row), budgets.get(row.key)) else {
            continue;
        };
        if value <= budget.value {
            continue;
        }
        let worse = match budget.limit {
            Some(limit) if value > limit => {
                format!(" **Beyond the limit of {}.**", number(limit, row.digits))
            }
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "- {}: {} against {}.{worse} {}",
            row.title,
            number(value, row.digits),
            number(budget.value, row.digits),
            budget.cause
        );
    }
    if text.is_empty() {
        text.push_str("Nothing.\n");
    }
    text
}

/// A table of parts of a figure, the largest of the first VMM first.
fn breakdown(
    results: &Results,
    digits: usize,
    parts: impl Fn(&Measured) -> BTreeMap<String, f64>,
) -> String {
    let columns: Vec<_> = results
        .vmms
        .iter()
        .map(|vmm| (vmm.name.clone(), parts(vmm)))
        .filter(|(_, parts)| !parts.is_empty())
        .collect();
    if columns.is_empty() {
        return "Not measured: it takes root.\n".to_owned();
    }
    let largest = columns.iter().flat_map(|(_, parts)| parts.values());
    let largest = largest.copied().fold(0.0, f64::max);
    let mut names: Vec<String> = columns
        .iter()
        .flat_map(|(_, parts)| parts.keys().cloned())
        .collect();
    names.sort();
    names.dedup();
    let in_column = |index: usize, name: &String| -> f64 {
        let column = columns.get(index);
        column
            .and_then(|(_, parts)| parts.get(name))
            .copied()
            .unwrap_or(0.0)
    };
    let most = |name: &String| {
        (0..columns.len())
            .map(|index| in_column(index, name))
            .fold(0.0, f64::max)
    };
    let (mut large, small): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|name| most(name) >= largest * SMALL || in_column(0, name) > 0.0);
    large.sort_by(|a, b| {
        let key = |name| (in_column(0, name), most(name));
        let (a, b) = (key(a), key(b));
        b.0.total_cmp(&a.0).then(b.1.total_cmp(&a.1))
    });
    let names = columns.iter().map(|(name, _)| name.clone());
    let header: Vec<String> = std::iter::once(String::new()).chain(names).collect();
    let cells = |title: &str, value: &dyn Fn(usize) -> f64| {
        let values = (0..columns.len()).map(|index| number(value(index), digits));
        std::iter::once(title.to_owned()).chain(values).collect()
    };
    let mut rows: Vec<Vec<String>> = large
        .iter()
        .map(|name| cells(name, &|index| in_column(index, name)))
        .collect();
    let rest = |index| {
        small
            .iter()
            .fold(0.0, |sum, name| sum + in_column(index, name))
    };
    if (0..columns.len()).any(|index| rest(index) > 0.0) {
        rows.push(cells("others", &rest));
    }
    table(&header, rows)
}

pub(super) fn table(header: &[String], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = format!("| {} |\n|---|", header.join(" | "));
    text.push_str(&"---:|".repeat(header.len().saturating_sub(1)));
    text.push('\n');
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

fn shown(row: &Row, value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| number(value, row.digits))
}

/// A number with commas between thousands.
pub(crate) fn number(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

/// The middle one, the lower of two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut own = Measured {
            name: "edgevmm".into(),
            ..Measured::default()
        };
        own.add("boot.exits", 3489.0);
        own.add("idle.pss", 900.0);
        own.reasons = vec![BTreeMap::from([
            ("interrupt".into(), 979),
            ("MSR".into(), 720),
        ])];
        let mut other = Measured {
            name: "other".into(),
            ..Measured::default()
        };
        other.add("boot.exits", 47_664.0);
        other.reasons = vec![BTreeMap::from([
            ("port I/O".into(), 40_000),
            ("odd".into(), 3),
        ])];
        Results {
            vmms: vec![own, other],
            ..Results::default()
        }
    }

    fn budget(value: f64, limit: Option<f64>) -> Budget {
        Budget {
            value,
            of: "somebody".into(),
            limit,
            cause: "Because.".into(),
        }
    }

    #[test]
    fn only_what_is_over_budget_is_explained() {
        let budgets = BTreeMap::from([
            ("boot.exits".to_owned(), budget(2910.0, Some(3000.0))),
            ("idle.pss".to_owned(), budget(3412.0, None)),
        ]);
        let text = over_budget(&results(), &budgets);
        assert_eq!(
            text,
            "- Boot: KVM exits: 3,489 against 2,910. **Beyond the limit of 3,000.** Because.\n"
        );
        assert_eq!(over_budget(&results(), &BTreeMap::new()), "Nothing.\n");
    }

    #[test]
    fn tables_have_a_cell_for_every_vmm() {
        let text = figures(&results(), &BTreeMap::new());
        assert!(
            text.contains("| Boot: KVM exits | 3,489 | 47,664 |  |"),
            "{text}"
        );
        assert!(
            text.contains("| Idle Linux: PSS beyond RAM, kB | 900 | – |  |"),
            "{text}"
        );
        assert!(!text.contains("Payload"), "{text}");
    }

    #[test]
    fn small_parts_are_summed_up() {
        let text = breakdown(&results(), 0, |vmm| {
            let count = |(name, count): (&String, &u64)| (name.clone(), *count as f64);
            vmm.median_reasons().iter().map(count).collect()
        });
        let rows: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| interrupt | 979 | 0 |",
                "| MSR | 720 | 0 |",
                "| port I/O | 0 | 40,000 |",
                "| others | 0 | 3 |",
            ]
        );
    }

    #[test]
    fn thousands_are_grouped() {
        for (value, digits, text) in [
            (0.0, 0, "0"),
            (999.0, 0, "999"),
            (1000.4, 1, "1,000.4"),
            (1_234_567.0, 0, "1,234,567"),
        ] {
            assert_eq!(number(value, digits), text);
        }
    }
}
