//! Which guests are started how.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::images::{KernelKind, RootFs, Shape, Table};

/// What starts a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// edk2 for Cloud Hypervisor, by PVH.
    Uefi,
    /// edk2 for QEMU.
    Ovmf,
    /// The project's own, with what it leaves the disk to when it declines.
    Fast,
    /// What the partition table asks for.
    Auto,
    /// None: kernel and RAM disk are given.
    Direct,
}

impl Firmware {
    /// As the report has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
            Self::Ovmf => "ovmf",
            Self::Fast => "fast",
            Self::Auto => "auto",
            Self::Direct => "direct",
        }
    }
}

/// What runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// The release build of this checkout.
    Edgevmm,
    /// QEMU's q35 machine with KVM.
    Qemu,
}

/// One start of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// The guest.
    pub shape: Shape,
    /// Its firmware.
    pub firmware: Firmware,
    /// Its vCPUs.
    pub cpus: u8,
    /// What runs it.
    pub vmm: Vmm,
}

impl Cell {
    fn new(shape: Shape, firmware: Firmware, cpus: u8) -> Self {
        Self {
            shape,
            firmware,
            cpus,
            vmm: Vmm::Edgevmm,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (firmware, cpus) = (self.firmware.name(), self.cpus);
        write!(formatter, "{}/{firmware}/{cpus}", self.shape)?;
        match self.vmm {
            Vmm::Edgevmm => Ok(()),
            Vmm::Qemu => formatter.write_str("/qemu"),
        }
    }
}

/// The releases, by their code names, oldest first.
const SUITES: [&str; 4] = ["bullseye", "bookworm", "trixie", "sid"];

/// The guest that several vCPUs are tried with, and QEMU.
const TYPICAL: Shape = Shape::new("bookworm", KernelKind::Cloud, Table::Gpt, RootFs::Ext4);

/// The guests: each release with each partition table and root file system. The kernels take turns,
/// so that each of them has each table and each file system.
fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (turn, suite) in SUITES.into_iter().enumerate() {
        for (step, table) in [Table::Gpt, Table::Mbr].into_iter().enumerate() {
            for (number, root) in RootFs::ALL.into_iter().enumerate() {
                let kernel = if (turn + step + number) % 2 == 1 {
                    KernelKind::Cloud
                } else {
                    KernelKind::Generic
                };
                shapes.push(Shape::new(suite, kernel, table, root));
            }
        }
    }
    shapes
}

/// The starts that are compared with one another: one guest by each firmware under each VMM.
#[must_use]
pub fn compared() -> Vec<Cell> {
    use Firmware::{Bios, Direct, Fast, Ovmf, Uefi};
    let ours = [Direct, Fast, Bios, Uefi, Ovmf].map(|firmware| (firmware, Vmm::Edgevmm));
    let qemu = [Direct, Bios, Ovmf].map(|firmware| (firmware, Vmm::Qemu));
    let cells = ours.into_iter().chain(qemu);
    let cell = |(firmware, vmm)| Cell {
        vmm,
        ..Cell::new(TYPICAL, firmware, 1)
    };
    cells.map(cell).collect()
}

/// All starts of the matrix.
#[must_use]
pub fn cells() -> Vec<Cell> {
    use Firmware::{Auto, Bios, Direct, Fast, Ovmf, Uefi};
    let mut cells = Vec::new();
    for shape in shapes() {
        let mut starts = [Bios, Uefi, Fast].map(|firmware| (firmware, 1)).to_vec();
        if shape.root == RootFs::Ext4 {
            starts.push((Auto, 1));
            if shape == TYPICAL || shape.suite == "sid" {
                let several = |firmware| [(firmware, 2), (firmware, 4)];
                starts.extend([Bios, Uefi, Fast].into_iter().flat_map(several));
            }
        }
        if shape == TYPICAL {
            starts.extend([(Direct, 1), (Ovmf, 1)]);
        }
        let cell = |(firmware, cpus)| Cell::new(shape, firmware, cpus);
        cells.extend(starts.into_iter().map(cell));
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_combination_is_there_once() {
        let cells = cells();
        let names: BTreeSet<String> = cells.iter().map(Cell::to_string).collect();
        assert_eq!(names.len(), cells.len());
        for suite in SUITES {
            for table in ["gpt", "mbr"] {
                for root in ["ext4", "xfs", "btrfs"] {
                    for firmware in ["bios", "uefi", "fast"] {
                        let count = ["cloud", "generic"]
                            .map(|kernel| format!("{suite}-{kernel}-{table}-{root}/{firmware}/1"))
                            .iter()
                            .filter(|name| names.contains(*name))
                            .count();
                        assert_eq!(count, 1, "{suite} {table} {root} {firmware}");
                    }
                }
            }
        }
        assert!(names.contains("bookworm-cloud-gpt-ext4/direct/1"));
        assert!(names.contains("bookworm-cloud-gpt-ext4/fast/4"));
    }

    #[test]
    fn each_kernel_has_each_table_and_file_system() {
        for kernel in ["cloud", "generic"] {
            for other in ["gpt", "mbr", "ext4", "xfs", "btrfs", "sid"] {
                let mut names = shapes().into_iter().map(|shape| shape.to_string());
                let both = |name: String| name.contains(kernel) && name.contains(other);
                assert!(names.any(both), "{kernel} {other}");
            }
        }
    }
}
