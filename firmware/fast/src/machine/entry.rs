//! The way in: from PVH's 32-bit protected mode to Rust, in long mode with 4 GiB identity-mapped.
//!
//! The segments are those that Linux wants at its 64-bit entry point.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_entry

    .section .text.entry, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    mov esi, ebx
    lea esp, [{stack} + {stack_len}]
    // Memory is as the guest before left it, where a reset has started us.
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd

    mov eax, offset {tables} + 0x1000 + 3
    mov dword ptr [{tables}], eax
    mov ecx, 4
    mov edi, offset {tables} + 0x1000
    mov eax, offset {tables} + 0x2000 + 3
2:  mov dword ptr [edi], eax
    add eax, 0x1000
    add edi, 8
    dec ecx
    jnz 2b
    // 2048 pages of 2 MiB: present, writable, large.
    mov ecx, 2048
    mov edi, offset {tables} + 0x2000
    mov eax, 0x83
3:  mov dword ptr [edi], eax
    add eax, 0x200000
    add edi, 8
    dec ecx
    jnz 3b

    // PAE, and SSE for whatever the compiler makes use of it for.
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset {tables}
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb
    or eax, 0x80000003
    mov cr0, eax
    lgdt [{gdt_pointer}]
    push 0x10
    mov eax, offset pvh_long
    push eax
    retf

    .code64
pvh_long:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [{stack} + {stack_len}]
    mov edi, esi
    call {start}
    ud2

    // Where every interrupt and exception ends, on a stack of its own. Nothing returns.
    .balign 16
    .global interrupt_failed
interrupt_failed:
    cld
    lea rsp, [{fault_stack} + {fault_stack_len}]
    call {failed}
    ud2
    .balign 16
    .global interrupt_late
interrupt_late:
    cld
    lea rsp, [{fault_stack} + {fault_stack_len}]
    call {late}
    ud2
    "#,
    tables = sym TABLES,
    gdt_pointer = sym super::cpu::GDT_POINTER,
    stack = sym STACK,
    stack_len = const STACK_LEN,
    fault_stack = sym FAULT_STACK,
    fault_stack_len = const FAULT_STACK_LEN,
    start = sym crate::start,
    failed = sym crate::failed,
    late = sym crate::late,
);

const STACK_LEN: usize = 256 << 10;
const FAULT_STACK_LEN: usize = 16 << 10;

/// Memory that only the code above touches, in whole pages.
#[repr(C, align(4096))]
struct Pages<const LEN: usize>(core::cell::UnsafeCell<[u8; LEN]>);

// SAFETY: There is one processor, and no reference to the content is ever made.
unsafe impl<const LEN: usize> Sync for Pages<LEN> {}

impl<const LEN: usize> Pages<LEN> {
    const fn new() -> Self {
        Self(core::cell::UnsafeCell::new([0; LEN]))
    }
}

/// Page tables: the top, its first entry's, and one for each GiB.
static TABLES: Pages<0x6000> = Pages::new();
static STACK: Pages<STACK_LEN> = Pages::new();
static FAULT_STACK: Pages<FAULT_STACK_LEN> = Pages::new();
