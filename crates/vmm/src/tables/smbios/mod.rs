//! SMBIOS tables (DMTF DSP0134): who the machine is, its processors and its memory.
//!
//! Structures 0, 1, 3, 4, 16, 17, 19, 32 and 127, with only what is true of a virtual machine;
//! anything else says "unknown". A kernel that is started directly finds both the 3.0 and the 2.x
//! anchor. Firmware gets the 2.x anchor, which old operating systems need, and no structure 0: it
//! adds its own.

mod structure;
#[cfg(test)]
mod tests;

use uuid::Uuid;

use self::structure::Structures;
use super::{FirmwareFile, PlacedBytes};
use crate::layout::SMBIOS_TABLES;
use crate::memory::ram_ranges;

/// Name of the anchor among the `fw_cfg` files.
pub const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// Name of the structures among the `fw_cfg` files.
pub const TABLES_FILE: &str = "etc/smbios/smbios-tables";

const MANUFACTURER: &str = "edgevmm";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Offsets of the second anchor and of the structures from the first anchor.
const ANCHOR_2_OFFSET: u64 = 0x20;
const STRUCTURES_OFFSET: u64 = 0x40;

const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_DEVICE: u16 = 0x1100;
const NO_HANDLE: u16 = 0xffff;
const NO_ERROR_INFORMATION: u16 = 0xfffe;
const UNKNOWN: u8 = 2;
const OTHER: u8 = 1;

/// What the tables say of the machine.
#[derive(Debug, Clone, Copy)]
pub struct SmbiosConfig<'a> {
    /// UUID of the machine.
    pub uuid: Uuid,
    /// Serial number of the machine. Characters beyond printable ASCII become question marks.
    pub serial: Option<&'a str>,
    /// Processor sockets.
    pub sockets: u8,
    /// Cores of each socket.
    pub cores: u8,
    /// Threads of each core.
    pub threads: u8,
    /// RAM in bytes.
    pub ram: u64,
}

/// The tables for a kernel that is started directly, at [`SMBIOS_TABLES`].
pub fn place(config: &SmbiosConfig) -> Vec<PlacedBytes> {
    let mut structures = Structures::default();
    add_firmware(&mut structures);
    add_machine(&mut structures, config);
    let at = SMBIOS_TABLES + STRUCTURES_OFFSET;
    vec![
        (SMBIOS_TABLES, anchor_3(&structures, at)),
        (SMBIOS_TABLES + ANCHOR_2_OFFSET, anchor_2(&structures, at)),
        (at, structures.into_bytes()),
    ]
}

/// The files for firmware: anchor and structures.
pub fn files(config: &SmbiosConfig) -> Vec<FirmwareFile> {
    let mut structures = Structures::default();
    add_machine(&mut structures, config);
    vec![
        (ANCHOR_FILE, anchor_2(&structures, 0)),
        (TABLES_FILE, structures.into_bytes()),
    ]
}

/// The 64-bit entry point, version 3.0.
fn anchor_3(structures: &Structures, address: u64) -> Vec<u8> {
    let mut anchor = b"_SM3_\0".to_vec();
    anchor.extend([24, 3, 0, 0, 1, 0]);
    anchor.extend(saturate_dword(structures.len()).to_le_bytes());
    anchor.extend(address.to_le_bytes());
    fix_checksum(&mut anchor, 5, 0);
    anchor
}

/// The 32-bit entry point, version 2.8.
fn anchor_2(structures: &Structures, address: u64) -> Vec<u8> {
    let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
    let mut anchor = b"_SM_\0".to_vec();
    anchor.extend([31, 2, 8]);
    anchor.extend(word(structures.longest()));
    anchor.extend([0; 6]);
    anchor.extend(b"_DMI_\0");
    anchor.extend(word(structures.len()));
    anchor.extend(saturate_dword(address).to_le_bytes());
    anchor.extend(word(structures.count()));
    anchor.push(0x28);
    fix_checksum(&mut anchor, 0x15, 0x10);
    fix_checksum(&mut anchor, 4, 0);
    anchor
}

/// Makes all from `start` on add up to zero by the byte at `at`.
fn fix_checksum(bytes: &mut [u8], at: usize, start: usize) {
    let sum = bytes[start..]
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

fn saturate_dword<T: TryInto<u32>>(value: T) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

/// Structure 0: there is no firmware but the VMM.
fn add_firmware(structures: &mut Structures) {
    const CHARACTERISTICS_UNSUPPORTED: u64 = 1 << 3;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    structures
        .start(0, 0)
        .string(Some(MANUFACTURER))
        .string(Some(VERSION))
        .word(0)
        .string(None)
        .byte(0)
        .qword(CHARACTERISTICS_UNSUPPORTED)
        .bytes(&[0, VIRTUAL_MACHINE])
        // No release numbers of BIOS and embedded controller.
        .bytes(&[0xff; 4])
        .end();
}

fn add_machine(structures: &mut Structures, config: &SmbiosConfig) {
    const POWER_SWITCH: u8 = 6;
    structures
        .start(1, 0x0100)
        .string(Some(MANUFACTURER))
        .string(Some("edgevmm virtual machine"))
        .string(Some(VERSION))
        .string(config.serial)
        .bytes(&config.uuid.to_bytes_le())
        .byte(POWER_SWITCH)
        .string(None)
        .string(None)
        .end();
    add_chassis(structures);
    for socket in 0..config.sockets {
        add_processor(structures, config, socket);
    }
    add_memory(structures, config.ram);
    // System boot information: no error.
    structures.start(32, 0x2000).bytes(&[0; 7]).end();
    structures.start(127, 0x7f00).end();
}

fn add_chassis(structures: &mut Structures) {
    const SAFE: u8 = 3;
    structures
        .start(3, 0x0300)
        .string(Some(MANUFACTURER))
        .byte(OTHER)
        .string(Some(VERSION))
        .string(None)
        .string(None)
        // State at boot of the machine, its power supply and its temperature.
        .bytes(&[SAFE; 3])
        .byte(UNKNOWN)
        .dword(0)
        // Height and power cords unknown, no contained elements.
        .bytes(&[0; 4])
        .end();
}

fn add_processor(structures: &mut Structures, config: &SmbiosConfig, socket: u8) {
    const CENTRAL: u8 = 3;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const SIXTY_FOUR_BIT: u16 = 1 << 2;
    let threads = config.cores.saturating_mul(config.threads);
    structures
        .start(4, 0x0400 + u16::from(socket))
        .string(Some(&format!("CPU {socket}")))
        .byte(CENTRAL)
        .byte(UNKNOWN)
        .string(Some(MANUFACTURER))
        // The guest reads the identification itself by CPUID.
        .qword(0)
        .string(None)
        // Voltage, clocks and speed.
        .byte(0)
        .word(0)
        .word(0)
        .word(0)
        .byte(POPULATED_AND_ENABLED)
        .byte(OTHER)
        .word(NO_HANDLE)
        .word(NO_HANDLE)
        .word(NO_HANDLE)
        .string(None)
        .string(None)
        .string(None)
        .bytes(&[config.cores, config.cores, threads])
        .word(SIXTY_FOUR_BIT)
        .word(u16::from(UNKNOWN))
        .end();
}

/// Structures 16, 17 and 19: one array with one device, mapped around the PCI hole.
fn add_memory(structures: &mut Structures, ram: u64) {
    const SYSTEM_MEMORY: u8 = 3;
    const RAM: u8 = 7;
    const TYPE_OTHER: u16 = 1 << 1;
    /// From here on the extended field in bytes counts.
    const KIB_EXTENDED: u32 = 0x8000_0000;
    const MIB_EXTENDED: u16 = 0x7fff;
    let kib = u32::try_from(ram >> 10)
        .ok()
        .filter(|kib| *kib < KIB_EXTENDED);
    structures
        .start(16, MEMORY_ARRAY)
        .bytes(&[OTHER, SYSTEM_MEMORY, UNKNOWN])
        .dword(kib.unwrap_or(KIB_EXTENDED))
        .word(NO_ERROR_INFORMATION)
        .word(1)
        .qword(if kib.is_some() { 0 } else { ram })
        .end();
    let mib = u16::try_from(ram >> 20)
        .ok()
        .filter(|mib| *mib < MIB_EXTENDED);
    structures
        .start(17, MEMORY_DEVICE)
        .word(MEMORY_ARRAY)
        .word(NO_ERROR_INFORMATION)
        // Total and data width unknown.
        .word(u16::MAX)
        .word(u16::MAX)
        .word(mib.unwrap_or(MIB_EXTENDED))
        .byte(OTHER)
        .byte(0)
        .string(Some("RAM"))
        .string(None)
        .byte(RAM)
        .word(TYPE_OTHER)
        .word(0)
        .string(Some(MANUFACTURER))
        .string(None)
        .string(None)
        .string(None)
        .byte(0)
        .dword(if mib.is_some() {
            0
        } else {
            saturate_dword(ram >> 20)
        })
        // Configured speed and voltages unknown.
        .bytes(&[0; 8])
        .end();
    for (handle, (start, len)) in (0x1300..).zip(ram_ranges(ram)) {
        add_mapping(structures, handle, start, len);
    }
}

fn add_mapping(structures: &mut Structures, handle: u16, start: u64, len: u64) {
    let end = start + len.saturating_sub(1);
    let kib = |address: u64| u32::try_from(address >> 10).ok();
    let mapping = structures.start(19, handle);
    let mapping = match (kib(start), kib(end)) {
        (Some(first), Some(last)) => mapping.dword(first).dword(last),
        _ => mapping.dword(u32::MAX).dword(u32::MAX),
    };
    let extended = kib(end).is_none();
    mapping
        .word(MEMORY_ARRAY)
        .byte(1)
        .qword(if extended { start } else { 0 })
        .qword(if extended { end } else { 0 })
        .end();
}
