//! The page on the matrix.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Boot, Cell, Firmware, Outcome, Outcomes, cells};
use crate::bench::report::number;

const HEAD: &str = "# Guests\n\n\
    Written by `cargo xtask guests`: disks made of Debian's packages alone (kernel, GRUB and busybox \
    of the release), each\nstarted by each firmware. A guest tells what it is, writes 4 MiB, reads \
    them back from the disk and powers off; its root\nis then checked by e2fsck, xfs_repair or \
    btrfs check. It has 512 MiB of RAM, a virtio disk (qcow2) and a serial console.\nSeconds are \
    from exec to the guest's first words, in the nested-KVM lab, an emulated machine, with others \
    busy beside it:\nexits, which KVM counts up to the same moment, compare better.\n";

const WORDS: &str = "- *bios* is SeaBIOS and the release's GRUB; *uefi* is CLOUDHV.fd and GRUB; *ovmf* is OVMF \
    and GRUB; *fast* is the project's own\n  firmware without a boot loader; *auto* is what the \
    partition table asks for; *direct* is a kernel and RAM disk that\n  are given.\n\
    - Kernels are *cloud*, made for virtual machines, and *generic*, made for any.\n";

const ELSEWHERE: &str = "\n## Boots that are elsewhere\n\n\
    In end-to-end tests (tests/tests/sata.rs): a guest whose RAM disk has no virtio drivers, from a \
    SATA disk; the disc of\ngrub-rescue-pc to its menu; kernel and RAM disk of \
    debian-installer-12-netboot-amd64 to the installer's first question.\nDebian has the ISO of \
    that installer in no package.\n";

/// What the fast firmware left the guest to and why, as the VMM tells it.
pub fn left(boot: &Boot) -> Option<String> {
    let mut lines = boot.messages.lines();
    let rest = lines.find_map(|line| Some(line.split_once("leaves the disk to `")?.1))?;
    let (who, why) = rest.split_once("`: ").unwrap_or((rest, ""));
    // The rest is for whoever wants to change that.
    let why = why.split(" (").next().unwrap_or(why);
    Some(format!("left to {who}: {}", why.trim_end_matches('.')))
}

/// The report on all cells of the matrix that were done.
pub fn markdown(outcomes: &Outcomes) -> String {
    let done: Vec<(Cell, &Outcome)> = cells()
        .into_iter()
        .filter_map(|cell| Some((cell, outcomes.get(&cell.to_string())?)))
        .collect();
    let good = done.iter().filter(|(_, each)| each.boot.is_some()).count();
    let all = cells().len();
    let mut text = HEAD.to_owned();
    let _ = writeln!(
        text,
        "\nOf {all} starts {} were made, and {good} went well.\n",
        done.len()
    );
    text.push_str(WORDS);
    by_firmware(&mut text, &done);
    others(&mut text, &done);
    remarks(&mut text, &done);
    text.push_str(ELSEWHERE);
    let commits: BTreeSet<String> = done
        .iter()
        .map(|(_, each)| format!("{} ({})", each.commit, each.date))
        .collect();
    let commits: Vec<String> = commits.into_iter().collect();
    let _ = writeln!(
        text,
        "\nMade at {}; all figures are in guests.json. [How long it takes beside QEMU](boots.md).",
        commits.join(", ")
    );
    text
}

/// The firmware that every guest is started by.
const EACH: [Firmware; 3] = [Firmware::Bios, Firmware::Uefi, Firmware::Fast];

fn in_first_table(cell: &Cell) -> bool {
    cell.cpus == 1 && EACH.contains(&cell.firmware)
}

/// One vCPU: a guest a row, a firmware a column.
fn by_firmware(text: &mut String, done: &[(Cell, &Outcome)]) {
    text.push_str(
        "\n## One vCPU\n\nSeconds and exits.\n\n\
         | guest | Linux | bios | uefi | fast |\n|---|---|---:|---:|---:|\n",
    );
    let mut shapes = Vec::new();
    for (cell, _) in done.iter().filter(|(cell, _)| in_first_table(cell)) {
        if !shapes.contains(&cell.shape) {
            shapes.push(cell.shape);
        }
    }
    for shape in shapes {
        let of = |firmware| {
            let is = |cell: &Cell| (cell.shape, cell.cpus, cell.firmware) == (shape, 1, firmware);
            done.iter().find(|(cell, _)| is(cell))
        };
        let found = EACH.map(of);
        let boots = found.iter().flatten();
        let kernel = boots
            .filter_map(|(_, outcome)| outcome.boot.as_ref())
            .map(|boot| word(&boot.report, "kernel="))
            .next();
        let kernel = kernel.unwrap_or("?").split('+').next().unwrap_or("?");
        let _ = write!(text, "| {shape} | {kernel} |");
        for outcome in found {
            let _ = write!(text, " {} |", figures(outcome));
        }
        text.push('\n');
    }
}

fn figures(found: Option<&(Cell, &Outcome)>) -> String {
    let Some((_, outcome)) = found else {
        return String::new();
    };
    let Some(boot) = &outcome.boot else {
        return "**fails**".to_owned();
    };
    let mark = if left(boot).is_some() {
        "declines: "
    } else {
        ""
    };
    format!("{mark}{:.1} s, {}", boot.seconds, exits(boot))
}

/// All that the first table has no room for.
fn others(text: &mut String, done: &[(Cell, &Outcome)]) {
    text.push_str(
        "\n## Several vCPUs, and other ways\n\n\
         | guest | started by | vCPUs | seconds | exits |\n|---|---|---:|---:|---:|\n",
    );
    for (cell, outcome) in done.iter().filter(|(cell, _)| !in_first_table(cell)) {
        let (shape, firmware, cpus) = (cell.shape, cell.firmware.name(), cell.cpus);
        let chosen = match (cell.firmware, &outcome.boot) {
            (Firmware::Auto, Some(boot)) => format!(": {}", word(&boot.report, "fw=")),
            _ => String::new(),
        };
        let _ = write!(text, "| {shape} | {firmware}{chosen} | {cpus} |");
        let _ = match &outcome.boot {
            Some(boot) => writeln!(text, " {:.1} | {} |", boot.seconds, exits(boot)),
            None => writeln!(text, " **fails** | |"),
        };
    }
}

/// What happened otherwise than asked for.
fn remarks(text: &mut String, done: &[(Cell, &Outcome)]) {
    let mut lines = Vec::new();
    let mut declined: Vec<(String, Vec<String>)> = Vec::new();
    for (cell, outcome) in done {
        let Some(boot) = &outcome.boot else {
            lines.push(format!("- {cell} **fails**: {}", reason(outcome)));
            continue;
        };
        if outcome.tries > 1 {
            let why = reason(outcome);
            lines.push(format!("- {cell} failed once, and not again: {why}"));
        }
        if let Some(left) = left(boot) {
            match declined.iter_mut().find(|(each, _)| *each == left) {
                Some((_, shapes)) => shapes.push(cell.shape.to_string()),
                None => declined.push((left, vec![cell.shape.to_string()])),
            }
        }
    }
    lines.extend(
        declined
            .into_iter()
            .map(|(left, shapes)| format!("- *fast* declines, {left}: {}.", shapes.join(", "))),
    );
    if !lines.is_empty() {
        let _ = writeln!(text, "\n## Remarks\n\n{}", lines.join("\n"));
    }
}

fn exits(boot: &Boot) -> String {
    boot.exits
        .map_or_else(|| "?".to_owned(), |exits| number(exits as f64, 0))
}

/// What follows `key` in the guest's report.
fn word<'a>(report: &'a str, key: &str) -> &'a str {
    report
        .split(' ')
        .find_map(|word| word.strip_prefix(key))
        .unwrap_or("?")
}

/// The first words and the last of why a cell failed, on one line.
fn reason(outcome: &Outcome) -> String {
    let why = outcome.failure.as_deref().unwrap_or_default();
    let mut lines = why.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next();
    let ends: Vec<&str> = first.into_iter().chain(lines.next_back()).collect();
    let clean = ends.join(" … ");
    clean
        .chars()
        .filter(|each| !each.is_control())
        .take(240)
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn boot(messages: &str) -> Boot {
        Boot {
            report: "kernel=6.1.0-9-amd64 cpus=1 fw=bios root=ext4".into(),
            seconds: 12.3,
            cpu_seconds: 11.0,
            exits: Some(4567),
            userspace_exits: Some(123),
            memory: 8900,
            until_off: 13.0,
            messages: messages.into(),
        }
    }

    const LEFT: &str = "WARN The fast firmware leaves the disk to `bios`: no file system it knows.";

    #[test]
    fn tells_what_the_guest_was_left_to() {
        assert_eq!(left(&boot("WARN something else")), None);
        let told = left(&boot(LEFT)).unwrap();
        assert_eq!(told, "left to bios: no file system it knows");
    }

    #[test]
    fn each_outcome_is_where_it_belongs() {
        let outcome = |boot: Option<Boot>, failure: Option<&str>| Outcome {
            date: "2026-01-31".into(),
            commit: "abc".into(),
            tries: 1,
            load: 0.0,
            boot,
            failure: failure.map(str::to_owned),
        };
        let text = markdown(&Outcomes::from([
            (
                "bookworm-cloud-gpt-ext4/uefi/1".into(),
                outcome(None, Some("The VMM ended.\nGRUB\nsaid\x1b no\n")),
            ),
            (
                "bookworm-cloud-gpt-ext4/fast/1".into(),
                outcome(Some(boot(LEFT)), None),
            ),
            (
                "bookworm-cloud-gpt-ext4/bios/4".into(),
                Outcome {
                    tries: 2,
                    ..outcome(Some(boot("")), Some("It hung."))
                },
            ),
            (
                "bookworm-cloud-gpt-ext4/auto/1".into(),
                outcome(Some(boot("")), None),
            ),
            ("no such guest".into(), outcome(None, None)),
        ]));
        for part in [
            "4 were made, and 3 went well",
            "| bookworm-cloud-gpt-ext4 | 6.1.0-9-amd64 |  | **fails** | declines: 12.3 s, 4,567 |",
            "| bookworm-cloud-gpt-ext4 | bios | 4 | 12.3 | 4,567 |",
            "| bookworm-cloud-gpt-ext4 | auto: bios | 1 | 12.3 | 4,567 |",
            "- bookworm-cloud-gpt-ext4/uefi/1 **fails**: The VMM ended. … said no\n",
            "- bookworm-cloud-gpt-ext4/bios/4 failed once, and not again: It hung.\n",
            "- *fast* declines, left to bios: no file system it knows: bookworm-cloud-gpt-ext4.",
            "Made at abc (2026-01-31);",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
