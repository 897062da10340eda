//! The physical memory map, as the BIOS call INT 15h, AX=E820h gives it.

use crate::layout::{
    ACPI_TABLES, EBDA_START, ECAM_BASE, ECAM_RESERVED_LEN, FIRMWARE_END, IDENTITY_MAP,
    LEGACY_HOLE_END, LEGACY_HOLE_START,
};
use crate::memory::ram_ranges;

/// Name of the map among the `fw_cfg` files.
pub const FILE: &str = "etc/e820";

/// What a range may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Type {
    /// Free for the operating system.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// A range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it may be used for.
    pub kind: E820Type,
}

impl E820Entry {
    /// The range `start..end`, empty when `end` is not above `start`.
    fn new(start: u64, end: u64, kind: E820Type) -> Self {
        let len = end.saturating_sub(start);
        Self {
            address: start,
            len,
            kind,
        }
    }
}

/// The map for a kernel that is started directly in `ram` bytes, by rising address.
///
/// It leaves out what such a kernel must not touch below 1 MiB and reserves the tables there.
pub fn kernel_map(ram: u64) -> Vec<E820Entry> {
    let low = |start, end: u64| E820Entry::new(start, end.min(ram), E820Type::Ram);
    let mut map = vec![
        low(0, EBDA_START),
        E820Entry::new(EBDA_START, LEGACY_HOLE_START, E820Type::Reserved),
        E820Entry::new(ACPI_TABLES, LEGACY_HOLE_END, E820Type::Reserved),
    ];
    for (start, len) in ram_ranges(ram) {
        let above_hole = start.max(LEGACY_HOLE_END);
        map.push(E820Entry::new(above_hole, start + len, E820Type::Ram));
    }
    map.extend(reserved());
    map.retain(|entry| entry.len > 0);
    map.sort_by_key(|entry| entry.address);
    map
}

/// The map for firmware, which knows the first MiB itself: RAM and what must stay free of BARs.
pub fn firmware_map(ram: u64) -> Vec<E820Entry> {
    let ranges = ram_ranges(ram).into_iter();
    let mut map: Vec<_> = ranges
        .map(|(start, len)| E820Entry::new(start, start + len, E820Type::Ram))
        .collect();
    map.extend(reserved());
    map.sort_by_key(|entry| entry.address);
    map
}

/// The map for firmware that reserves ECAM itself, where it puts it: OVMF.
pub fn ovmf_map(ram: u64) -> Vec<E820Entry> {
    let mut map = firmware_map(ram);
    map.retain(|entry| entry.address != ECAM_BASE || entry.kind == E820Type::Ram);
    map
}

/// The configuration window, and KVM's pages together with the firmware's ROM behind them.
fn reserved() -> [E820Entry; 2] {
    [
        E820Entry::new(ECAM_BASE, ECAM_BASE + ECAM_RESERVED_LEN, E820Type::Reserved),
        E820Entry::new(IDENTITY_MAP, FIRMWARE_END, E820Type::Reserved),
    ]
}

/// The map as the [`FILE`] holds it: 20 bytes each.
pub fn encode(map: &[E820Entry]) -> Vec<u8> {
    let encode = |entry: &E820Entry| {
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..16].copy_from_slice(&entry.len.to_le_bytes());
        bytes[16..].copy_from_slice(&(entry.kind as u32).to_le_bytes());
        bytes
    };
    map.iter().flat_map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HIGH_RAM_START, LOW_RAM_END};

    fn ram(map: &[E820Entry]) -> Vec<(u64, u64)> {
        let ram = map.iter().filter(|e| e.kind == E820Type::Ram);
        ram.map(|e| (e.address, e.address + e.len)).collect()
    }

    fn assert_ordered(map: &[E820Entry]) {
        for pair in map.windows(2) {
            assert!(
                pair[0].address + pair[0].len <= pair[1].address,
                "{pair:x?}"
            );
        }
    }

    #[test]
    fn kernel_map_spares_the_legacy_hole_and_the_pci_hole() {
        let map = kernel_map(5 << 30);
        assert_ordered(&map);
        let high_end = HIGH_RAM_START + (5 << 30) - LOW_RAM_END;
        let expected = [
            (0, EBDA_START),
            (LEGACY_HOLE_END, LOW_RAM_END),
            (HIGH_RAM_START, high_end),
        ];
        assert_eq!(ram(&map), expected);
    }

    #[test]
    fn firmware_map_gives_all_ram_in_one_piece_each_side() {
        let map = firmware_map(5 << 30);
        assert_ordered(&map);
        let high_end = HIGH_RAM_START + (5 << 30) - LOW_RAM_END;
        assert_eq!(ram(&map), [(0, LOW_RAM_END), (HIGH_RAM_START, high_end)]);
        assert_eq!(ram(&firmware_map(64 << 20)), [(0, 64 << 20)]);
    }

    #[test]
    fn ovmf_reserves_its_own_ecam() {
        let map = ovmf_map(5 << 30);
        assert_eq!(ram(&map), ram(&firmware_map(5 << 30)));
        let reserved = map.iter().filter(|e| e.kind == E820Type::Reserved);
        let reserved: Vec<_> = reserved.map(|e| (e.address, e.address + e.len)).collect();
        assert_eq!(reserved, [(IDENTITY_MAP, FIRMWARE_END)]);
    }

    #[test]
    fn small_and_odd_sizes_overlap_nothing() {
        for size in [
            0,
            4096,
            EBDA_START,
            LEGACY_HOLE_END,
            LOW_RAM_END,
            LOW_RAM_END + 4096,
        ] {
            assert_ordered(&kernel_map(size));
            assert_ordered(&firmware_map(size));
        }
    }

    #[test]
    fn encoding_is_twenty_bytes_little_endian() {
        let entry = E820Entry::new(0x1_0000_0000, 0x1_0000_1000, E820Type::Reserved);
        let bytes = encode(&[entry; 2]);
        assert_eq!(bytes.len(), 40);
        assert_eq!(bytes[..20], bytes[20..]);
        assert_eq!(
            bytes[..20],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]
        );
    }
}
