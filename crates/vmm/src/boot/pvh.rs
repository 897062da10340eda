//! PVH: an ELF file that starts in 32-bit protected mode with a description of the machine
//! (xen.git docs/misc/pvh.pandoc). Kernels have such an entry, and so has firmware for virtual
//! machines.

use edgevmm_devices::GuestMemory;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{self, Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::{BootError, Source, write, write_obj};
use crate::kvm::regs::Entry;
use crate::layout::LEGACY_HOLE_END;
use crate::tables::PlacedBytes;
use crate::tables::e820::E820Entry;

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// What the machine's tables are to whoever finds them in memory.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// The memory map.
    pub memory_map: Vec<E820Entry>,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
    /// ACPI and SMBIOS tables.
    pub tables: Vec<PlacedBytes>,
}

impl Tables {
    /// Puts the tables where they belong.
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<(), BootError> {
        (self.tables.iter())
            .try_for_each(|(at, bytes)| write(memory, *at, bytes, "set of firmware tables"))
    }
}

/// An ELF file in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Its PVH entry.
    pub entry: u64,
    /// Where it ends.
    pub end: u64,
}

/// Loads an ELF file above the first MiB; `None` when it has no PVH entry.
pub(super) fn load(
    source: &mut Source,
    memory: &GuestMemory,
) -> Result<Option<Loaded>, loader::Error> {
    let above = Some(GuestAddress(LEGACY_HOLE_END));
    // The loader finds its way in the file by itself.
    let loaded = Elf::load(memory, None, &mut source.file, above)?;
    Ok(match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(Loaded {
            entry: entry.0,
            end: loaded.kernel_end,
        }),
        _ => None,
    })
}

/// Whether the file ends too early, or doesn't fit into guest memory.
pub(super) fn is_too_long(error: &loader::Error) -> bool {
    matches!(
        error,
        loader::Error::Elf(loader::elf::Error::ReadKernelImage)
            | loader::Error::Bzimage(
                loader::bzimage::Error::Underflow
                    | loader::bzimage::Error::ReadBzImageCompressedKernel,
            )
            | loader::Error::MemoryOverflow
    )
}

/// What is started beside its tables.
#[derive(Debug, Default)]
pub(super) struct StartInfo {
    /// Address of the command line.
    pub command_line: Option<u64>,
    /// Address and length of the one module: the initial RAM disk.
    pub module: Option<(u64, u64)>,
}

impl StartInfo {
    /// Writes the description and tells how to start what was loaded.
    pub(super) fn enter(
        &self,
        loaded: &Loaded,
        tables: &Tables,
        memory: &GuestMemory,
    ) -> Result<Entry, BootError> {
        let mut info = hvm_start_info {
            magic: MAGIC,
            version: VERSION,
            cmdline_paddr: self.command_line.unwrap_or(0),
            rsdp_paddr: tables.rsdp,
            memmap_paddr: MEMORY_MAP,
            memmap_entries: u32::try_from(tables.memory_map.len()).unwrap_or(0),
            ..Default::default()
        };
        if let Some((paddr, size)) = self.module {
            let module = hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            };
            write_obj(memory, MODULE_LIST, module)?;
            info.modlist_paddr = MODULE_LIST;
            info.nr_modules = 1;
        }
        for (index, entry) in (0..).zip(&tables.memory_map) {
            let entry = hvm_memmap_table_entry {
                addr: entry.address,
                size: entry.len,
                type_: entry.kind as u32,
                reserved: 0,
            };
            let at = MEMORY_MAP + index * size_of_val(&entry) as u64;
            write_obj(memory, at, entry)?;
        }
        write_obj(memory, START_INFO, info)?;
        Ok(Entry::Pvh {
            entry: loaded.entry,
            start_info: START_INFO,
        })
    }
}
