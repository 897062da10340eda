//! Registers of a vCPU at the three kinds of entry: reset vector, PVH and 64-bit Linux.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use edgevmm_devices::GuestMemory;

/// Where the boot vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Where every x86 begins: real mode at the top of the first 4 GiB.
    ResetVector,
    /// PVH: 32-bit protected mode, paging off, `start_info` in EBX.
    Pvh {
        /// Entry point.
        entry: u64,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// The 64-bit Linux boot protocol: long mode, first GiB identity-mapped, `boot_params` in RSI.
    Linux64 {
        /// Entry point.
        entry: u64,
        /// Guest-physical address of the zero page.
        boot_params: u64,
    },
}

const GDT: u64 = 0x500;
const PAGE_TABLES: u64 = 0x9000;
const STACK: u64 = 0x8ff0;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Flat segments as the Linux boot protocol numbers them: code at 0x10, data at 0x18, and a TSS.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x008f_8b00_0000_ffff;

/// Sets `sregs` and `regs` (which hold the state after power-on) up for `entry`, and writes what
/// they point to into guest memory.
///
/// # Errors
/// Fails when guest memory has no room for the tables.
pub fn setup(
    memory: &GuestMemory,
    entry: Entry,
    sregs: &mut kvm_sregs,
    regs: &mut kvm_regs,
) -> Result<(), vm_memory::GuestMemoryError> {
    let code = match entry {
        Entry::ResetVector => return Ok(()),
        Entry::Pvh { .. } => CODE32,
        Entry::Linux64 { .. } => CODE64,
    };
    let gdt = [0, 0, code, DATA, TSS];
    for (slot, descriptor) in gdt.into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(GDT + slot as u64 * 8))?;
    }
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(code, 2);
    let data = segment(DATA, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS, 4);
    sregs.cr0 = CR0_PE | CR0_ET;
    regs.rflags = 2;
    match entry {
        Entry::ResetVector => {}
        Entry::Pvh { entry, start_info } => {
            regs.rip = entry;
            regs.rbx = start_info;
        }
        Entry::Linux64 { entry, boot_params } => {
            write_page_tables(memory)?;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            regs.rip = entry;
            regs.rsi = boot_params;
            regs.rsp = STACK;
            regs.rbp = STACK;
        }
    }
    Ok(())
}

/// Identity map of the first GiB with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let directory_pointers = PAGE_TABLES + 0x1000;
    let directory = PAGE_TABLES + 0x2000;
    memory.write_obj(
        directory_pointers | PRESENT_WRITABLE,
        GuestAddress(PAGE_TABLES),
    )?;
    memory.write_obj(
        directory | PRESENT_WRITABLE,
        GuestAddress(directory_pointers),
    )?;
    for page in 0..512_u64 {
        let entry = page << 21 | LARGE | PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(directory + page * 8))?;
    }
    Ok(())
}

/// The hidden part of a segment register that holds descriptor number `index`.
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let field = |shift: u32, bits: u32| {
        u8::try_from(descriptor >> shift & ((1 << bits) - 1)).unwrap_or_default()
    };
    let limit = u32::try_from(descriptor & 0xffff | descriptor >> 32 & 0xf_0000).unwrap_or(0);
    let granular = field(55, 1) == 1;
    kvm_segment {
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: field(40, 4),
        s: field(44, 1),
        dpl: field(45, 2),
        present: field(47, 1),
        avl: field(52, 1),
        l: field(53, 1),
        db: field(54, 1),
        g: field(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn segments_carry_their_descriptor() {
        let code = segment(CODE64, 2);
        assert_eq!((code.selector, code.limit, code.base), (0x10, u32::MAX, 0));
        assert_eq!(
            (code.l, code.db, code.g, code.present, code.s, code.type_),
            (1, 0, 1, 1, 1, 0xb)
        );
        let code = segment(CODE32, 2);
        assert_eq!((code.l, code.db), (0, 1));
    }

    #[test]
    fn linux_starts_in_long_mode_with_its_first_gigabyte_mapped() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        let entry = Entry::Linux64 {
            entry: 0x100_0200,
            boot_params: 0x7000,
        };
        setup(&memory, entry, &mut sregs, &mut regs).unwrap();
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, 0x7000));
        let pml4: u64 = memory.read_obj(GuestAddress(sregs.cr3)).unwrap();
        let pdpt: u64 = memory.read_obj(GuestAddress(pml4 & !0xfff)).unwrap();
        let last: u64 = memory
            .read_obj(GuestAddress((pdpt & !0xfff) + 511 * 8))
            .unwrap();
        assert_eq!(last & !0xfff, (1 << 30) - (2 << 20));
    }

    #[test]
    fn no_memory_no_entry() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let entry = Entry::Linux64 {
            entry: 0,
            boot_params: 0,
        };
        setup(
            &memory,
            entry,
            &mut kvm_sregs::default(),
            &mut kvm_regs::default(),
        )
        .unwrap_err();
    }
}
