//! The processor: segments, exceptions, the timer that ends a boot that hangs, and the kernel's
//! entry.

use core::arch::asm;
use core::cell::UnsafeCell;

use super::memory;

const CODE: u16 = 0x10;
const TSS: u16 = 0x20;
const TIMER_VECTOR: usize = 0x40;
const GATES: usize = 256;
const INTERRUPT_GATE: u64 = 0x8e;

/// The local APIC's registers.
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_SPURIOUS: u64 = 0xf0;
const LAPIC_TIMER: u64 = 0x320;
const LAPIC_LINT0: u64 = 0x350;
const LAPIC_INITIAL_COUNT: u64 = 0x380;
const LAPIC_DIVIDE: u64 = 0x3e0;
const LAPIC_ENABLED: u32 = 1 << 8;
const LAPIC_MASKED: u32 = 1 << 16;
const DIVIDE_BY_128: u32 = 0b1010;
/// KVM's APIC timer counts nanoseconds; divided by 128 this is a minute.
const DEADLINE: u32 = (60_000_000_000_u64 / 128) as u32;

/// State that the processor reads, and nobody else.
#[repr(C, align(16))]
pub struct ForProcessor<T>(UnsafeCell<T>);

// SAFETY: There is one processor; what writes the content runs once.
unsafe impl<T> Sync for ForProcessor<T> {}

/// A base and a limit, as `lgdt` and `lidt` read them.
#[repr(C, packed(2))]
pub struct TablePointer {
    limit: u16,
    base: u64,
}

// SAFETY: It is never changed, and points to a static.
unsafe impl Sync for TablePointer {}

/// Null, unused, flat 64-bit code, flat data and two for the task state.
static GDT: ForProcessor<[u64; 6]> = ForProcessor(UnsafeCell::new([
    0,
    0,
    0x00af_9a00_0000_ffff,
    0x00cf_9200_0000_ffff,
    0,
    0,
]));

/// What `lgdt` takes. Relocated by the linker, as the entry code needs it before anything runs.
pub static GDT_POINTER: GdtPointer = GdtPointer {
    limit: 6 * 8 - 1,
    base: &GDT,
};

/// [`TablePointer`] with an address that is known when linked.
#[repr(C, packed(2))]
pub struct GdtPointer {
    limit: u16,
    base: *const ForProcessor<[u64; 6]>,
}

// SAFETY: It is never changed, and points to a static.
unsafe impl Sync for GdtPointer {}

static IDT: ForProcessor<[[u64; 2]; GATES]> = ForProcessor(UnsafeCell::new([[0; 2]; GATES]));
/// The task state: nothing but the stack for gates, at its 36th byte.
static TASK: ForProcessor<[u32; 26]> = ForProcessor(UnsafeCell::new([0; 26]));
static GATE_STACK: ForProcessor<[u64; 32]> = ForProcessor(UnsafeCell::new([0; 32]));

// SAFETY: The entry code has both, without arguments; only their addresses are taken.
unsafe extern "C" {
    fn interrupt_failed();
    fn interrupt_late();
}

/// Has every exception end the firmware, and a minute's passing too.
pub fn guard() {
    let failed = interrupt_failed as *const () as u64;
    let late = interrupt_late as *const () as u64;
    // SAFETY: This is the one place that touches the tables, on the one processor, before they are
    // loaded. The stack's end is within its static.
    unsafe {
        let idt = &mut *IDT.0.get();
        for gate in idt.iter_mut() {
            *gate = interrupt_gate(failed);
        }
        idt[TIMER_VECTOR] = interrupt_gate(late);
        let stack = GATE_STACK.0.get().add(1) as u64;
        let task = &mut *TASK.0.get();
        task[9] = stack as u32;
        task[25] = (size_of_val(task) as u32) << 16;
        let base = TASK.0.get() as u64;
        let gdt = &mut *GDT.0.get();
        let limit = size_of_val(task) as u64 - 1;
        gdt[4] = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        gdt[5] = base >> 32;
        let pointer = TablePointer {
            limit: (GATES * 16 - 1) as u16,
            base: IDT.0.get() as u64,
        };
        asm!("lidt [{}]", in(reg) &pointer, options(readonly, nostack));
        asm!("ltr {:x}", in(reg) TSS, options(nostack));
    }
    start_timer();
}

fn interrupt_gate(target: u64) -> [u64; 2] {
    const FIRST_STACK: u64 = 1;
    let low = target & 0xffff | u64::from(CODE) << 16 | FIRST_STACK << 32 | INTERRUPT_GATE << 40;
    [low | (target >> 16 & 0xffff) << 48, target >> 32]
}

fn start_timer() {
    // Old interrupt controllers: everything masked.
    for port in [0x21, 0xa1] {
        super::port::out_byte(port, 0xff);
    }
    let write = |register, value: u32| memory::write(LAPIC + register, value);
    write(LAPIC_LINT0, LAPIC_MASKED);
    write(LAPIC_SPURIOUS, LAPIC_ENABLED | 0xff);
    write(LAPIC_DIVIDE, DIVIDE_BY_128);
    write(LAPIC_TIMER, TIMER_VECTOR as u32);
    write(LAPIC_INITIAL_COUNT, DEADLINE);
    // SAFETY: All gates lead to code that never returns, on a stack of its own.
    unsafe { asm!("sti", options(nomem, nostack)) };
}

/// Ends what [`guard`] has begun.
pub fn unguard() {
    // SAFETY: Nothing waits for an interrupt.
    unsafe { asm!("cli", options(nomem, nostack)) };
    let write = |register, value: u32| memory::write(LAPIC + register, value);
    write(LAPIC_INITIAL_COUNT, 0);
    write(LAPIC_TIMER, LAPIC_MASKED);
    // As it is after a reset of KVM's.
    write(LAPIC_LINT0, 0x700);
    write(LAPIC_SPURIOUS, 0xff);
}

/// Tells the processor that it waits for memory.
pub fn relax() {
    core::hint::spin_loop();
}

/// Halts for ever.
pub fn halt() -> ! {
    loop {
        // SAFETY: With interrupts off, nothing comes after it but a reset.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Enters a kernel that was loaded by the 64-bit boot protocol.
///
/// # Safety
/// `entry` must be the 64-bit entry point of a kernel that is loaded, and `zero_page` its boot
/// parameters.
pub unsafe fn enter(entry: u64, zero_page: u64) -> ! {
    // SAFETY: The caller's promise; segments and page tables are what the protocol asks for.
    unsafe {
        asm!(
            "xor ebp, ebp",
            "xor edi, edi",
            "xor ebx, ebx",
            "jmp rax",
            in("rax") entry,
            in("rsi") zero_page,
            options(noreturn),
        )
    }
}
