//! A Linux kernel of the user's: ELF by its PVH entry, bzImage by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst of Linux).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use edgevmm_devices::GuestMemory;
use linux_loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{self, BzImage, KernelLoader, KernelLoaderResult};
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::pvh::{self, StartInfo, Tables};
use super::{BootError, Source, write_obj};
use crate::kvm::regs::Entry;
use crate::layout::{LEGACY_HOLE_END, LOW_RAM_END};
use crate::tables::e820::E820Type;

const BOOT_PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line. Linux takes 2 KiB.
const COMMAND_LINE_MAX: usize = 4096;

/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: keep the protected-mode code where it was loaded high.
const LOADED_HIGH: u8 = 1;
/// The first version of the boot protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x20c;
/// `xloadflags`: the kernel has the 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// The entries that the zero page has room for.
const ZERO_PAGE_E820: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Elf,
    BzImage,
}

/// A kernel with its initial RAM disk and command line.
#[derive(Debug)]
pub struct Kernel {
    kernel: Source,
    kind: Kind,
    initrd: Option<Source>,
    command_line: String,
    tables: Tables,
}

impl Kernel {
    /// Opens a kernel and its initial RAM disk.
    ///
    /// # Errors
    /// Fails when a file can't be read, the kernel is of no known kind, or the command line is
    /// too long.
    pub fn open(
        kernel: &Path,
        initrd: Option<&Path>,
        command_line: String,
        tables: Tables,
    ) -> Result<Kernel, BootError> {
        let mut kernel = Source::open("kernel", kernel)?;
        let kind = kind(&mut kernel.file).map_err(|e| kernel.error(e))?;
        let kind = kind.ok_or_else(|| BootError::UnknownKernel(kernel.path.clone()))?;
        let initrd = initrd
            .map(|path| Source::open("initial RAM disk", path))
            .transpose()?;
        if command_line.len() >= COMMAND_LINE_MAX {
            let len = command_line.len();
            return Err(BootError::CommandLine {
                len,
                max: COMMAND_LINE_MAX - 1,
            });
        }
        Ok(Kernel {
            kernel,
            kind,
            initrd,
            command_line,
            tables,
        })
    }

    pub(super) fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        self.tables.write(memory)?;
        let mut line = self.command_line.clone().into_bytes();
        line.push(0);
        super::write(memory, COMMAND_LINE, &line, "kernel command line")?;
        match self.kind {
            Kind::Elf => self.load_elf(memory),
            Kind::BzImage => self.load_bzimage(memory),
        }
    }

    fn load_elf(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        let loaded = pvh::load(&mut self.kernel, memory);
        let loaded = loaded.map_err(|error| self.refusal(&error))?;
        let loaded = loaded.ok_or_else(|| BootError::UnknownKernel(self.kernel.path.clone()))?;
        let module = self.load_initrd(memory, loaded.end, LOW_RAM_END)?;
        let info = StartInfo {
            command_line: Some(COMMAND_LINE),
            module,
        };
        info.enter(&loaded, &self.tables, memory)
    }

    fn load_bzimage(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        let loaded = self.load_image(memory)?;
        let unknown = || BootError::UnknownKernel(self.kernel.path.clone());
        let header: setup_header = loaded.setup_header.ok_or_else(unknown)?;
        // Before this version the flags are something else.
        if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(unknown());
        }
        let max = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
        if self.command_line.len() > max {
            return Err(BootError::CommandLine {
                len: self.command_line.len(),
                max,
            });
        }
        // The kernel unpacks itself over `init_size` bytes from its preferred address on.
        let unpacked = header
            .pref_address
            .saturating_add(u64::from(header.init_size));
        let floor = loaded.kernel_end.max(unpacked);
        let ceiling = u64::from(header.initrd_addr_max)
            .saturating_add(1)
            .min(LOW_RAM_END);
        let initrd = self.load_initrd(memory, floor, ceiling)?;

        let mut params = boot_params {
            hdr: header,
            ..Default::default()
        };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.loadflags |= LOADED_HIGH;
        params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).unwrap_or(0);
        params.acpi_rsdp_addr = self.tables.rsdp;
        if let Some((address, len)) = initrd {
            let narrow =
                |value| u32::try_from(value).map_err(|_| BootError::NoRoom("initial RAM disk"));
            params.hdr.ramdisk_image = narrow(address)?;
            params.hdr.ramdisk_size = narrow(len)?;
        }
        let count = self.tables.memory_map.len().min(ZERO_PAGE_E820);
        params.e820_entries = u8::try_from(count).unwrap_or(0);
        for (slot, entry) in params.e820_table.iter_mut().zip(&self.tables.memory_map) {
            slot.addr = entry.address;
            slot.size = entry.len;
            slot.r#type = entry.kind as u32;
        }
        write_obj(memory, BOOT_PARAMS, params)?;
        let entry = loaded.kernel_load.0 + ENTRY_64;
        Ok(Entry::Linux64 {
            entry,
            boot_params: BOOT_PARAMS,
        })
    }

    fn load_image(&mut self, memory: &GuestMemory) -> Result<KernelLoaderResult, BootError> {
        let above = Some(GuestAddress(LEGACY_HOLE_END));
        self.kernel.rewind()?;
        BzImage::load(memory, above, &mut self.kernel.file, above)
            .map_err(|error| self.refusal(&error))
    }

    /// What the loader's error means. It says no more than which step failed.
    fn refusal(&self, error: &loader::Error) -> BootError {
        tracing::debug!(%error, "The kernel can't be loaded");
        let path = self.kernel.path.clone();
        if pvh::is_too_long(error) {
            BootError::KernelTooLong(path)
        } else {
            BootError::UnknownKernel(path)
        }
    }

    /// Puts the initial RAM disk as high as it goes in `floor..ceiling`. Gives (address, bytes).
    fn load_initrd(
        &mut self,
        memory: &GuestMemory,
        floor: u64,
        ceiling: u64,
    ) -> Result<Option<(u64, u64)>, BootError> {
        const PAGE: u64 = 4096;
        let Some(initrd) = &mut self.initrd else {
            return Ok(None);
        };
        let no_room = BootError::NoRoom("initial RAM disk");
        let len = initrd.file.metadata().map_err(|e| initrd.error(e))?.len();
        let low_end = memory
            .iter()
            .map(vm_memory::GuestMemoryRegion::last_addr)
            .map(|last| last.0 + 1)
            .filter(|end| *end <= LOW_RAM_END)
            .max()
            .unwrap_or(0);
        let end = self
            .tables
            .memory_map
            .iter()
            .filter(|e| e.kind == E820Type::Ram);
        let end = end
            .map(|e| e.address + e.len)
            .filter(|end| *end <= low_end)
            .max()
            .unwrap_or(0);
        let start = end
            .min(ceiling)
            .checked_sub(len)
            .map(|start| start / PAGE * PAGE);
        let Some(start) = start.filter(|start| *start >= floor) else {
            return Err(no_room);
        };
        let Ok(bytes) = usize::try_from(len) else {
            return Err(no_room);
        };
        let Ok(mut target) = memory.get_slice(GuestAddress(start), bytes) else {
            return Err(no_room);
        };
        initrd.rewind()?;
        initrd
            .file
            .read_exact_volatile(&mut target)
            .map_err(|e| initrd.error(io::Error::other(e)))?;
        Ok(Some((start, len)))
    }
}

/// Tells an ELF file from a bzImage by their magic numbers.
fn kind(file: &mut File) -> io::Result<Option<Kind>> {
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(0x206).read_to_end(&mut head)?;
    Ok(if head.starts_with(b"\x7fELF") {
        Some(Kind::Elf)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        Some(Kind::BzImage)
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;
    use std::path::PathBuf;

    use tempfile::NamedTempFile;

    use super::*;

    fn load(image: &[u8]) -> (PathBuf, BootError) {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(image).unwrap();
        let tables = Tables::default();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let kernel = Kernel::open(file.path(), None, String::new(), tables);
        let error = kernel.and_then(|mut kernel| kernel.load(&memory));
        (file.path().to_path_buf(), error.unwrap_err())
    }

    /// An ELF file of one segment of `len` bytes for 1 MiB.
    fn elf(len: u64) -> Vec<u8> {
        let mut image = vec![0; 120];
        image[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        let fields: [(usize, u64); 6] = [
            (24, 0x10_0000),
            (32, 64),
            (52, 64 | 56 << 16 | 1 << 32),
            (64, 1),
            (88, 0x10_0000),
            (96, len),
        ];
        for (at, value) in fields {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        image
    }

    #[test]
    fn a_kernel_that_can_not_be_loaded_is_refused_once_and_by_name() {
        let mut setup_only = vec![0; 0x400];
        setup_only[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        setup_only[0x211] = LOADED_HIGH;
        let whole = elf(0);
        for (image, expected) in [
            (elf(121), "is cut short or does not fit"),
            (elf(4 << 20), "is cut short or does not fit"),
            (setup_only, "is cut short or does not fit"),
            (whole[..30].to_vec(), "is no kernel that can be started"),
            (whole, "is no kernel that can be started"),
            (vec![0x7f; 1000], "is no kernel that can be started"),
        ] {
            let (path, error) = load(&image);
            let text = error.to_string();
            assert!(text.contains(expected), "{text}");
            assert_eq!(text.matches(path.to_str().unwrap()).count(), 1, "{text}");
            assert!(std::error::Error::source(&error).is_none());
        }
    }
}
