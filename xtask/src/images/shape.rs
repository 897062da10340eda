//! What guests of the matrix differ in: release, kernel, partition table, root file system.

use std::fmt;

/// Which of a release's kernels a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelKind {
    /// The one made for virtual machines.
    Cloud,
    /// The one for any machine.
    Generic,
}

impl KernelKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }
}

/// A disk's partition table. Both have an ESP, so that either firmware boots either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Table {
    /// GPT with a BIOS boot partition for GRUB's core.
    Gpt,
    /// MBR with GRUB's core in the gap before the first partition.
    Mbr,
}

/// The file system of the root, which the kernel lies in too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RootFs {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl RootFs {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// What Linux calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

/// One guest of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The release that kernel, busybox and GRUB are from, by its code name.
    pub suite: &'static str,
    /// Its kernel.
    pub kernel: KernelKind,
    /// Its partition table.
    pub table: Table,
    /// Its root file system.
    pub root: RootFs,
}

impl Shape {
    /// A guest.
    #[must_use]
    pub const fn new(suite: &'static str, kernel: KernelKind, table: Table, root: RootFs) -> Self {
        Self {
            suite,
            kernel,
            table,
            root,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = match self.table {
            Table::Gpt => "gpt",
            Table::Mbr => "mbr",
        };
        let (kernel, root) = (self.kernel.name(), self.root.name());
        write!(formatter, "{}-{kernel}-{table}-{root}", self.suite)
    }
}
