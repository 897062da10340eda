//! How the firmware is started: PVH's start info (xen.git docs/misc/pvh.pandoc) and its memory map.

use alloc::vec::Vec;

/// The start info, version 1.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct StartInfo {
    /// [`StartInfo::MAGIC`].
    pub magic: u32,
    /// At least 1 for the memory map to be there.
    pub version: u32,
    /// Reserved.
    pub flags: u32,
    /// Modules that were loaded; the firmware has none.
    pub modules: u32,
    /// Address of the modules' list.
    pub module_list: u64,
    /// Address of the command line, which a zero ends.
    pub command_line: u64,
    /// Address of ACPI's root pointer.
    pub rsdp: u64,
    /// Address of the memory map.
    pub memory_map: u64,
    /// Entries of the memory map.
    pub memory_map_entries: u32,
    /// Reserved.
    pub reserved: u32,
}

impl StartInfo {
    /// What it begins with.
    pub const MAGIC: u32 = 0x336e_c578;
}

/// A range of the memory map, as PVH has it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct MapEntry {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// What e820 calls it; 1 is RAM.
    pub kind: u32,
    /// Reserved.
    pub reserved: u32,
}

/// e820's number for RAM.
pub const RAM: u32 = 1;

/// The machine's memory.
#[derive(Debug, Clone)]
pub struct MemoryMap(Vec<MapEntry>);

impl MemoryMap {
    /// Takes a map as it was found.
    #[must_use]
    pub fn new(entries: Vec<MapEntry>) -> Self {
        Self(entries)
    }

    /// Its entries.
    #[must_use]
    pub fn entries(&self) -> &[MapEntry] {
        &self.0
    }

    /// Whether `start..end` is RAM, in one piece.
    #[must_use]
    pub fn is_ram(&self, start: u64, end: u64) -> bool {
        self.ram()
            .any(|(first, last)| first <= start && end <= last && start <= end)
    }

    /// RAM ranges: (start, end).
    pub fn ram(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let ram = self.0.iter().filter(|entry| entry.kind == RAM);
        ram.map(|entry| (entry.address, entry.address.saturating_add(entry.len)))
    }
}
