//! The guest: a few instructions with a PVH entry (Xen `docs/misc/pvh.pandoc`), which any KVM runs.

/// Where it is loaded.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// Where its code is in the file.
const CODE: usize = 4096;
const NOTE: usize = 512;

/// `mov $'!', %al; mov $0x3f8, %dx; out %al, (%dx); 1: hlt; jmp 1b`, with interrupts off.
const HALT: &[u8] = &[
    0xb0, b'!', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xfa, 0xf4, 0xeb, 0xfd,
];

/// The ELF file of a guest that writes one byte and halts.
pub fn elf() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for x86-64 with two program headers and no sections.
    halves(&mut file, &[2, 62, 1, 0]);
    words(&mut file, &[LOAD_ADDRESS, 64, 0]);
    halves(&mut file, &[0, 0, 64, 56, 2, 0, 0, 0]);
    let mut note = Vec::new();
    // XEN_ELFNOTE_PHYS32_ENTRY.
    halves(&mut note, &[4, 0, 8, 0, 18, 0]);
    note.extend(b"Xen\0");
    words(&mut note, &[LOAD_ADDRESS]);
    for (kind, flags, offset, address, size) in [
        (1, 7, CODE, LOAD_ADDRESS, 4096),
        (4, 4, NOTE, 0, note.len()),
    ] {
        halves(&mut file, &[kind, 0, flags, 0]);
        let (offset, size) = (offset as u64, size as u64);
        words(&mut file, &[offset, address, address, size, size, 4]);
    }
    file.resize(NOTE, 0);
    file.extend(note);
    file.resize(CODE, 0);
    file.extend(HALT);
    file.resize(CODE + 4096, 0);
    file
}

fn halves(to: &mut Vec<u8>, halves: &[u16]) {
    to.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
}

fn words(to: &mut Vec<u8>, words: &[u64]) {
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}
