//! The payload: an interpreter of [`Script`]s in 32-bit machine code, as a PVH kernel or as a BIOS.
//!
//! Both are the same bytes at another address. From the start: a table of the handlers, the GDT,
//! the IDT with a handler for NMIs and nothing else (interrupts stay off), the code, the scripts.

use anyhow::{Result, ensure};

use crate::script::{Kind, Script};

/// Guest-physical range that no device may be told to write to: the payload with its stacks.
pub const RESERVED: std::ops::Range<u32> = 0x10_0000..0x40_0000;

/// Where the second processor starts, a page below 64 KiB.
pub const TRAMPOLINE: u32 = 0x8000;

const STACKS: [u32; 2] = [0x3f_0000, 0x3e_0000];

const GDT: u32 = 0x100;
const GDT_POINTER: u32 = 0x120;
const IDT_POINTER: u32 = 0x128;
const NO_IDT_POINTER: u32 = 0x130;
const IDT: u32 = 0x140;
const CODE: u32 = 0x200;
/// What the second processor begins with, to be copied to [`TRAMPOLINE`].
const TRAMPOLINE_COPY: u32 = 0xd00;
const SCRIPTS: u32 = 0x1000;

/// Flat code and data segments, marked as accessed since a ROM can't be.
const DESCRIPTORS: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE_SELECTOR: u16 = 8;

/// Who starts the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    Kernel,
    Bios,
}

impl Boot {
    const BIOS_LEN: u32 = 256 << 10;

    /// Where the payload is in guest memory.
    const fn base(self) -> u32 {
        match self {
            Self::Kernel => RESERVED.start,
            Self::Bios => u32::MAX - Self::BIOS_LEN + 1,
        }
    }

    /// Where the first script begins.
    pub const fn scripts(self) -> u32 {
        self.base() + SCRIPTS
    }

    /// Most bytes of scripts.
    pub const fn room(self) -> u32 {
        match self {
            Self::Kernel => 0x20_0000,
            // All but the code before and after them.
            Self::Bios => Self::BIOS_LEN - SCRIPTS - 0x1000,
        }
    }

    /// Where the second processor's first instructions are.
    pub const fn trampoline_copy(self) -> u32 {
        self.base() + TRAMPOLINE_COPY
    }
}

/// Machine code at a known address.
struct Code {
    base: u32,
    bytes: Vec<u8>,
}

impl Code {
    fn emit(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn emit32(&mut self, opcode: &[u8], operand: u32) {
        self.emit(opcode);
        self.emit(&operand.to_le_bytes());
    }

    fn here(&self) -> u32 {
        self.base + self.bytes.len() as u32
    }
}

/// The body of a step's handler: operands a, b and c are in EDX, ECX and EBX, ESI must survive.
fn handler(kind: Kind) -> &'static [u8] {
    match kind {
        // mov eax, ecx; out dx, al
        Kind::Out8 => b"\x89\xc8\xee",
        Kind::Out16 => b"\x89\xc8\x66\xef",
        Kind::Out32 => b"\x89\xc8\xef",
        // in al, dx
        Kind::In8 => b"\xec",
        Kind::In16 => b"\x66\xed",
        Kind::In32 => b"\xed",
        // mov [edx], cl
        Kind::Write8 => b"\x88\x0a",
        Kind::Write16 => b"\x66\x89\x0a",
        Kind::Write32 => b"\x89\x0a",
        // mov al, [edx]
        Kind::Read8 => b"\x8a\x02",
        Kind::Read16 => b"\x66\x8b\x02",
        Kind::Read32 => b"\x8b\x02",
        // 1: mov [edx], cx; dec ebx; jnz 1b
        Kind::Storm => b"\x66\x89\x0a\x4b\x75\xfa",
        // mov edi, edx; mov eax, ecx; mov ecx, ebx; rep stosd
        Kind::Fill => b"\x89\xd7\x89\xc8\x89\xd9\xf3\xab",
        // push esi; mov edi, edx; mov esi, ecx; mov ecx, ebx; rep movsd; pop esi
        Kind::Copy => b"\x56\x89\xd7\x89\xce\x89\xd9\xf3\xa5\x5e",
        // push esi; mov esi, ecx; mov ecx, ebx; rep outsb; pop esi
        Kind::OutString => b"\x56\x89\xce\x89\xd9\xf3\x6e\x5e",
        // mov edi, ecx; mov ecx, ebx; rep insb
        Kind::InString => b"\x89\xcf\x89\xd9\xf3\x6c",
        // 1: dec edx; jnz 1b
        Kind::Spin => b"\x4a\x75\xfd",
        // 1: cmp [edx], ecx; jne 1b
        Kind::Until32 => b"\x39\x0a\x75\xfc",
        // 1: in al, dx; test al, cl; jz 1b
        Kind::UntilPort => b"\xec\x84\xc8\x74\xfb",
        // lock add [edx], ecx
        Kind::Add32 => b"\xf0\x01\x0a",
        // mov esi, edx
        Kind::Jump => b"\x89\xd6",
        // cmp [edx], ecx; jne 1f; mov esi, ebx; 1:
        Kind::JumpIf => b"\x39\x0a\x75\x02\x89\xde",
        Kind::JumpUnless => b"\x39\x0a\x74\x02\x89\xde",
        // ud2, behind the lidt that `interpreter` emits
        Kind::Crash => b"\x0f\x0b",
    }
}

const KINDS: [Kind; Kind::COUNT] = [
    Kind::Out8,
    Kind::Out16,
    Kind::Out32,
    Kind::In8,
    Kind::In16,
    Kind::In32,
    Kind::Write8,
    Kind::Write16,
    Kind::Write32,
    Kind::Read8,
    Kind::Read16,
    Kind::Read32,
    Kind::Storm,
    Kind::Fill,
    Kind::Copy,
    Kind::OutString,
    Kind::InString,
    Kind::Spin,
    Kind::Until32,
    Kind::UntilPort,
    Kind::Add32,
    Kind::Jump,
    Kind::JumpIf,
    Kind::JumpUnless,
    Kind::Crash,
];

/// Addresses of the code's parts.
struct Entries {
    handlers: Vec<u32>,
    nmi: u32,
    /// Where the processors begin with this GDT.
    processors: [u32; 2],
    /// Where a kernel begins.
    kernel: u32,
}

/// The interpreter: fetches a step, jumps to its handler, and so on.
fn interpreter(base: u32, scripts: [u32; 2]) -> (Code, Entries) {
    let bytes = Vec::new();
    let mut code = Code {
        base: base + CODE,
        bytes,
    };
    let next = code.here();
    // mov eax, [esi]; mov edx, [esi+4]; mov ecx, [esi+8]; mov ebx, [esi+12]; add esi, 16
    code.emit(b"\x8b\x06\x8b\x56\x04\x8b\x4e\x08\x8b\x5e\x0c\x83\xc6\x10");
    // jmp [eax*4 + handlers]
    code.emit32(b"\xff\x24\x85", base);
    let jump_next = |code: &mut Code| {
        let from = code.here() + 5;
        code.emit32(b"\xe9", next.wrapping_sub(from));
    };
    let mut handlers = Vec::new();
    for kind in KINDS {
        handlers.push(code.here());
        if kind == Kind::Crash {
            // mov eax, [edx]; lidt [no_idt]
            code.emit32(b"\x8b\x02\x0f\x01\x1d", base + NO_IDT_POINTER);
        }
        code.emit(handler(kind));
        jump_next(&mut code);
    }
    let nmi = code.here();
    // As IRET, which KVM's emulator lacks, but for further NMIs: push [esp+8]; popf; ret 8
    code.emit(b"\xff\x74\x24\x08\x9d\xc2\x08\0");
    let mut processors = [0; 2];
    for ((entry, script), stack) in processors.iter_mut().zip(scripts).zip(STACKS) {
        *entry = code.here();
        // mov eax, 16; mov ds, es, fs, gs, ss
        code.emit(b"\xb8\x10\0\0\0\x8e\xd8\x8e\xc0\x8e\xe0\x8e\xe8\x8e\xd0");
        code.emit32(b"\xbc", stack); // mov esp
        code.emit32(b"\x0f\x01\x1d", base + IDT_POINTER); // lidt
        code.emit32(b"\xbe", script); // mov esi
        jump_next(&mut code);
    }
    // A kernel's GDT is the loader's: cli; lgdt [gdt]; jmp code:processors[0]
    let kernel = code.here();
    code.emit32(b"\xfa\x0f\x01\x15", base + GDT_POINTER);
    code.emit32(b"\xea", processors[0]);
    code.emit(&CODE_SELECTOR.to_le_bytes());
    let entries = Entries {
        handlers,
        nmi,
        processors,
        kernel,
    };
    (code, entries)
}

/// From real mode with a code segment at a multiple of 64 KiB or at `offset`'s page to `target`.
/// `offset` is that of these bytes in the segment.
fn from_real_mode(offset: u16, base: u32, target: u32) -> Vec<u8> {
    let mut code = Vec::new();
    let pointer = offset + 24;
    code.extend(b"\xfa\x66\x2e\x0f\x01\x16"); // cli; o32 lgdt cs:[pointer]
    code.extend(pointer.to_le_bytes());
    code.extend(b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"); // mov eax, cr0; or al, 1; mov cr0, eax
    code.extend(b"\x66\xea"); // o32 jmp code:target
    code.extend(target.to_le_bytes());
    code.extend(CODE_SELECTOR.to_le_bytes());
    code.extend(pointer_to(base + GDT, 24));
    code
}

/// What LGDT and LIDT take.
fn pointer_to(address: u32, len: u16) -> Vec<u8> {
    let mut pointer = (len.saturating_sub(1)).to_le_bytes().to_vec();
    pointer.extend(address.to_le_bytes());
    pointer
}

fn put(image: &mut [u8], offset: u32, bytes: &[u8]) {
    let offset = offset as usize;
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// The payload's bytes, and where its first processor enters it in 32-bit mode. The scripts are those of the two
/// processors and follow each other from [`Boot::scripts`] on.
fn payload(boot: Boot, scripts: [&Script; 2]) -> Result<(Vec<u8>, u32)> {
    let base = boot.base();
    let [first, second] = scripts.map(Script::bytes);
    let len = first.len() + second.len();
    ensure!(
        len <= boot.room() as usize,
        "{len} bytes of scripts are too many"
    );
    let second_start = boot.scripts() + first.len() as u32;
    let (code, entries) = interpreter(base, [boot.scripts(), second_start]);

    let mut image = vec![0; SCRIPTS as usize + len];
    for (index, address) in (0..).zip(&entries.handlers) {
        put(&mut image, index * 4, &address.to_le_bytes());
    }
    for (index, descriptor) in (0..).zip(DESCRIPTORS) {
        put(&mut image, GDT + index * 8, &descriptor.to_le_bytes());
    }
    put(&mut image, GDT_POINTER, &pointer_to(base + GDT, 24));
    put(&mut image, IDT_POINTER, &pointer_to(base + IDT, 24));
    put(&mut image, NO_IDT_POINTER, &pointer_to(0, 0));
    let [a, b, c, d] = entries.nmi.to_le_bytes();
    let gate = [a, b, CODE_SELECTOR as u8, 0, 0, 0x8e, c, d];
    put(&mut image, IDT + 2 * 8, &gate);
    ensure!(CODE as usize + code.bytes.len() <= TRAMPOLINE_COPY as usize);
    put(&mut image, CODE, &code.bytes);
    let trampoline = from_real_mode(0, base, entries.processors[1]);
    put(&mut image, TRAMPOLINE_COPY, &trampoline);
    put(&mut image, SCRIPTS, &first);
    put(&mut image, SCRIPTS + first.len() as u32, &second);
    Ok(match boot {
        Boot::Kernel => (image, entries.kernel),
        Boot::Bios => (image, entries.processors[0]),
    })
}

/// A file for `edgevmm run --kernel` or `--bios`.
pub fn build(boot: Boot, scripts: [&Script; 2]) -> Result<Vec<u8>> {
    let (mut image, entry) = payload(boot, scripts)?;
    match boot {
        Boot::Kernel => Ok(elf(&image, entry)),
        Boot::Bios => {
            const STUB: u16 = 0xff00;
            image.resize(Boot::BIOS_LEN as usize, 0);
            let end = Boot::BIOS_LEN;
            let stub = from_real_mode(STUB, boot.base(), entry);
            put(&mut image, end - 0x100, &stub);
            // The reset vector, 16 bytes before the end: jmp STUB.
            let [low, high] = STUB.wrapping_sub(0xfff3).to_le_bytes();
            put(&mut image, end - 16, &[0xe9, low, high]);
            Ok(image)
        }
    }
}

/// An ELF file with the image as its one segment and the note of a PVH entry point.
fn elf(image: &[u8], entry: u32) -> Vec<u8> {
    const NOTE: u64 = 0x100;
    const DATA: u64 = 0x1000;
    let mut file = Vec::new();
    // 64-bit, little endian, executable, x86-64, two program headers.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    file.extend(u64::from(entry).to_le_bytes());
    file.extend([64, 0_u64].map(u64::to_le_bytes).concat());
    file.extend(
        [0_u16, 0, 64, 56, 2, 64, 0, 0]
            .map(u16::to_le_bytes)
            .concat(),
    );
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        file.extend([kind, flags].map(u32::to_le_bytes).concat());
        let fields = [offset, address, address, len, len, 1];
        file.extend(fields.map(u64::to_le_bytes).concat());
    };
    header(1, 7, DATA, Boot::Kernel.base().into(), image.len() as u64);
    header(4, 4, NOTE, 0, 20);
    file.resize(NOTE as usize, 0);
    file.extend([4, 4, 18_u32].map(u32::to_le_bytes).concat());
    file.extend(b"Xen\0");
    file.extend(entry.to_le_bytes());
    file.resize(DATA as usize, 0);
    file.extend(image);
    file
}
