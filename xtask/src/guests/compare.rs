//! One guest by each firmware, beside QEMU: `cargo xtask guests --compare`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Boot, Cell, Firmware, Guests, Vmm, expect, matrix, place};
use crate::bench::load;
use crate::bench::probe::Machine;
use crate::bench::report::{median, number};
use crate::images::{Image, Images};
use crate::progress::step;

const HEAD: &str = "# Boots beside QEMU\n\n\
    Written by `cargo xtask guests --compare`: one guest, from exec to its first program's first \
    words. Medians; each start\nhas a lab and a copy of the disk of its own, and the kinds of \
    start take turns.\n";

/// All that a run found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The commit of the checkout.
    pub commit: String,
    /// Where the VMMs ran.
    pub machine: Machine,
    /// QEMU's version.
    pub qemu: String,
    /// This host's load average over a minute, before and after.
    pub load: [f64; 2],
    /// The boots of each cell, by its name.
    pub boots: BTreeMap<String, Vec<Boot>>,
}

impl Guests {
    /// Starts each compared cell `rounds` times, and writes boots.md and boots.json.
    ///
    /// # Errors
    /// A start fails, or results cannot be written.
    pub fn compare(&self, rounds: usize) -> Result<()> {
        ensure!(rounds > 0, "Nothing to measure");
        Images::of_this_user().ensure(Image::Firmware)?;
        let (date, commit) = self.origin()?;
        let before = load();
        let (machine, qemu) = place::describe(self)?;
        let mut boots: BTreeMap<String, Vec<Boot>> = BTreeMap::new();
        for round in 1..=rounds {
            for cell in matrix::compared() {
                let boot = step(&format!("{cell}, {round} of {rounds}"), || {
                    let boot = place::boot(self, &cell)?;
                    expect(&cell, &boot.report)?;
                    Ok(boot)
                })?;
                boots.entry(cell.to_string()).or_default().push(boot);
            }
        }
        let comparison = Comparison {
            date,
            commit,
            machine,
            qemu,
            load: [before, load()],
            boots,
        };
        let json = serde_json::to_string_pretty(&comparison)? + "\n";
        for (name, text) in [("boots.json", json), ("boots.md", comparison.markdown())] {
            let path = self.out.join(name);
            fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

impl Comparison {
    /// The page.
    #[must_use]
    pub fn markdown(&self) -> String {
        let cells = matrix::compared();
        let shape = cells.first().map(|cell| cell.shape.to_string());
        let rounds = self.boots.values().map(Vec::len).max().unwrap_or(0);
        let Machine {
            cpu,
            cpus,
            kernel,
            kvm,
        } = &self.machine;
        let mut text = HEAD.to_owned();
        let _ = write!(
            text,
            "\n- Guest: {}, 1 vCPU, 512 MiB, virtio disk (qcow2), console on the serial port, no \
             network.\n\
             - {rounds} starts of each on {} at {}; load average of the host before and after: \
             {:.1} and {:.1}.\n\
             - Machine: {cpus} × {cpu}, Linux {kernel}, {kvm}. Where that is emulated, counts and \
             memory hold, times only compare.\n\
             - QEMU: {}; `-M q35,accel=kvm -cpu host -nodefaults -display none`.\n\
             - SeaBIOS and OVMF are the same files under both; *UEFI* is CLOUDHV.fd, which QEMU does \
             not start. QEMU's direct boot\n  goes through SeaBIOS.\n\
             - Exits to the VMM are returns of KVM_RUN. PSS is beyond the guest's RAM, of the VMM with \
             what is mapped for the guest.\n\n",
            shape.unwrap_or_default(),
            self.date,
            self.commit,
            self.load[0],
            self.load[1],
            self.qemu
        );
        text.push_str(
            "| boot | VMM | time, s | CPU, s | exits | exits to the VMM | PSS, kB |\n\
             |---|---|---:|---:|---:|---:|---:|\n",
        );
        use Firmware::{Bios, Direct, Fast, Ovmf, Uefi};
        for firmware in [Direct, Fast, Bios, Uefi, Ovmf] {
            for cell in cells.iter().filter(|cell| cell.firmware == firmware) {
                text.push_str(&self.row(cell));
            }
        }
        self.ratios(&mut text);
        text.push_str("\nAll figures are in boots.json.\n");
        text
    }

    fn row(&self, cell: &Cell) -> String {
        let vmm = match cell.vmm {
            Vmm::Edgevmm => "edgevmm",
            Vmm::Qemu => "QEMU",
        };
        let shown = |digits, figure: &dyn Fn(&Boot) -> Option<f64>| {
            let value = self.median(cell, figure);
            value.map_or_else(|| "–".to_owned(), |value| number(value, digits))
        };
        format!(
            "| {} | {vmm} | {} | {} | {} | {} | {} |\n",
            title(cell.firmware),
            shown(2, &|boot| Some(boot.seconds)),
            shown(2, &|boot| Some(boot.cpu_seconds)),
            shown(0, &exits),
            shown(0, &|boot| boot.userspace_exits.map(|count| count as f64)),
            shown(0, &|boot| Some(boot.memory as f64)),
        )
    }

    /// What the fast firmware saves against SeaBIOS and GRUB.
    fn ratios(&self, text: &mut String) {
        let ours = |firmware| {
            let is = |cell: &Cell| cell.vmm == Vmm::Edgevmm && cell.firmware == firmware;
            matrix::compared().into_iter().find(is)
        };
        let (Some(fast), Some(bios)) = (ours(Firmware::Fast), ours(Firmware::Bios)) else {
            return;
        };
        let share = |figure: &dyn Fn(&Boot) -> Option<f64>| {
            Some(100.0 * self.median(&fast, figure)? / self.median(&bios, figure)?)
        };
        if let (Some(time), Some(exits)) = (share(&|boot| Some(boot.seconds)), share(&exits)) {
            let _ = writeln!(
                text,
                "\nOf SeaBIOS and GRUB under edgevmm the fast firmware takes {time:.0} % of the time \
                 and {exits:.0} % of the exits."
            );
        }
    }

    fn median(&self, cell: &Cell, figure: &dyn Fn(&Boot) -> Option<f64>) -> Option<f64> {
        let boots = self.boots.get(&cell.to_string())?;
        median(boots.iter().filter_map(figure))
    }
}

fn exits(boot: &Boot) -> Option<f64> {
    boot.exits.map(|exits| exits as f64)
}

fn title(firmware: Firmware) -> &'static str {
    match firmware {
        Firmware::Direct => "direct",
        Firmware::Fast => "fast",
        Firmware::Bios => "BIOS: SeaBIOS, GRUB",
        Firmware::Uefi => "UEFI: CLOUDHV.fd, GRUB",
        Firmware::Ovmf => "UEFI: OVMF, GRUB",
        Firmware::Auto => "auto",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_medians() {
        let boot = |seconds, exits| Boot {
            report: String::new(),
            seconds,
            cpu_seconds: 1.0,
            exits,
            userspace_exits: None,
            memory: 4321,
            until_off: 0.0,
            messages: String::new(),
        };
        let of =
            |seconds: [f64; 3], exits| seconds.map(|seconds| boot(seconds, Some(exits))).into();
        let text = Comparison {
            date: "2026-01-31".into(),
            commit: "abc".into(),
            machine: Machine {
                cpu: "C".into(),
                cpus: 4,
                kernel: "6".into(),
                kvm: "kvm_amd".into(),
            },
            qemu: "QEMU 10".into(),
            load: [0.0, 1.0],
            boots: BTreeMap::from([
                (
                    "bookworm-cloud-gpt-ext4/fast/1".into(),
                    of([4.0, 9.0, 3.0], 1000),
                ),
                (
                    "bookworm-cloud-gpt-ext4/bios/1".into(),
                    of([20.0, 16.0, 1.0], 5000),
                ),
                (
                    "bookworm-cloud-gpt-ext4/bios/1/qemu".into(),
                    vec![boot(7.0, None)],
                ),
            ]),
        }
        .markdown();
        for part in [
            "| fast | edgevmm | 4.00 | 1.00 | 1,000 | – | 4,321 |",
            "| BIOS: SeaBIOS, GRUB | edgevmm | 16.00 | 1.00 | 5,000 | – | 4,321 |",
            "| BIOS: SeaBIOS, GRUB | QEMU | 7.00 | 1.00 | – | – | 4,321 |",
            "| direct | QEMU | – | – | – | – | – |",
            "3 starts of each on 2026-01-31 at abc",
            "takes 25 % of the time and 20 % of the exits",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
