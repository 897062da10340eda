//! The smallest guest there is: an ELF kernel with a PVH entry (Xen `docs/misc/pvh.pandoc`) that
//! writes a line of one letter to the serial port and then powers off or halts. What its start takes is the
//! VMM's own work.

/// The size of the file, and where its one segment begins.
const FILE_SIZE: usize = 8192;
const SEGMENT_OFFSET: usize = 4096;
const NOTE_OFFSET: usize = 512;

/// Where the segment is loaded, and where it starts to run.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// The first byte that the payload writes to the serial port.
pub const FIRST_BYTE: u8 = b'!';

/// 32-bit code, as the PVH entry is: `mov $0x3f8, %dx; mov $'!', %al; out %al, (%dx)`, and the line's
/// end in the same way.
const WRITE_LINE: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xb0, FIRST_BYTE, 0xee, 0xb0, b'\n', 0xee,
];

/// `mov $0x604, %dx; mov $0x2000, %ax; out %ax, (%dx)`: SLP_EN with the sleep type of S5 in the
/// ACPI PM1a control register, where edgevmm and q35 have it.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef];

/// `cli; 1: hlt; jmp 1b`.
const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// What the payload does after its byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Powers the machine off, or halts where that does nothing.
    PowerOff,
    /// Halts for ever.
    Halt,
}

/// The payload's ELF file.
#[must_use]
pub fn elf(then: Then) -> Vec<u8> {
    let mut file = header();
    file.extend(program_header(1, 7, SEGMENT_OFFSET, LOAD_ADDRESS, 4096));
    let note = pvh_note();
    file.extend(program_header(4, 4, NOTE_OFFSET, 0, note.len()));
    file.resize(NOTE_OFFSET, 0);
    file.extend(note);
    file.resize(SEGMENT_OFFSET, 0);
    file.extend(WRITE_LINE);
    if then == Then::PowerOff {
        file.extend(POWER_OFF);
    }
    file.extend(HALT);
    file.resize(FILE_SIZE, 0);
    file
}

/// An ELF64 header for x86-64, executable, with two program headers behind it and no sections.
fn header() -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    for half in [2_u16, 62] {
        header.extend(half.to_le_bytes());
    }
    header.extend(1_u32.to_le_bytes());
    for word in [LOAD_ADDRESS, 64, 0] {
        header.extend(word.to_le_bytes());
    }
    header.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        header.extend(half.to_le_bytes());
    }
    header
}

fn program_header(kind: u32, flags: u32, offset: usize, address: u64, size: usize) -> Vec<u8> {
    let mut header = Vec::new();
    for word in [kind, flags] {
        header.extend(word.to_le_bytes());
    }
    let (offset, size, align) = (offset as u64, size as u64, 4_u64);
    for word in [offset, address, address, size, size, align] {
        header.extend(word.to_le_bytes());
    }
    header
}

/// The note `XEN_ELFNOTE_PHYS32_ENTRY`.
fn pvh_note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    note
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use object::Endianness;
    use object::elf::{FileHeader64, NoteType, PT_LOAD, PT_NOTE};
    use object::read::elf::{FileHeader, ProgramHeader};

    #[test]
    fn an_elf_reader_finds_code_and_entry() {
        let file = elf(Then::PowerOff);
        assert_eq!(file.len(), FILE_SIZE);
        let header = FileHeader64::<Endianness>::parse(&*file).unwrap();
        let endian = header.endian().unwrap();
        let [load, note] = header.program_headers(endian, &*file).unwrap() else {
            panic!("not two program headers");
        };
        assert_eq!(load.p_type(endian), PT_LOAD);
        assert_eq!(load.p_paddr(endian), LOAD_ADDRESS);
        assert!(load.data(endian, &*file).unwrap().starts_with(WRITE_LINE));
        assert_eq!(note.p_type(endian), PT_NOTE);
        let mut notes = note.notes(endian, &*file).unwrap().unwrap();
        let entry = notes.next().unwrap().unwrap();
        assert_eq!(
            (entry.name(), entry.n_type(endian)),
            (&b"Xen"[..], NoteType(18))
        );
        assert_eq!(entry.desc(), LOAD_ADDRESS.to_le_bytes());
    }

    #[test]
    fn only_one_of_the_two_powers_off() {
        let has = |then| {
            elf(then)
                .windows(POWER_OFF.len())
                .any(|code| code == POWER_OFF)
        };
        assert!(has(Then::PowerOff));
        assert!(!has(Then::Halt));
    }
}
