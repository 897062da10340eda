//! SeaBIOS: a ROM below 4 GiB and its shadow below 1 MiB.
//!
//! The ROM is the file itself, mapped: its pages are shared with every other machine. SeaBIOS
//! runs from the shadow, which is plain RAM, and copies what of itself is missing there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion, VolatileMemory};

use super::{BootError, Source};
use crate::kvm::regs::Entry;
use crate::layout::{FIRMWARE_END, LEGACY_HOLE_END};

/// Where Debian and Ubuntu put SeaBIOS (package seabios).
pub const DEFAULT_BIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// How much of the image's end is in the legacy hole at power-on.
const SHADOW: usize = 128 << 10;
const SIZES: [u64; 2] = [128 << 10, 256 << 10];

/// A BIOS image.
#[derive(Debug)]
pub struct Firmware {
    rom: Arc<MmapRegion>,
}

impl Firmware {
    /// Opens the image at `path`, or Debian's SeaBIOS.
    ///
    /// # Errors
    /// Fails when there is none or it has an impossible size.
    pub fn open(path: Option<&Path>) -> Result<Firmware, BootError> {
        let path = path.map_or_else(|| PathBuf::from(DEFAULT_BIOS), Path::to_path_buf);
        let image = Source::open_firmware("BIOS image", &path, "seabios")?;
        let len = image.len()?;
        if !SIZES.contains(&len) {
            return Err(BootError::FirmwareSize { path, len });
        }
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let rom = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::new(image.file, 0))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .build()
            .map_err(BootError::MapFirmware)?;
        Ok(Firmware { rom: Arc::new(rom) })
    }

    /// The ROM and its guest-physical address.
    pub fn rom(&self) -> (u64, Arc<MmapRegion>) {
        (FIRMWARE_END - self.rom.size() as u64, Arc::clone(&self.rom))
    }

    pub(super) fn load(&self, memory: &GuestMemory) -> Result<Entry, BootError> {
        let start = self.rom.size() - SHADOW;
        let no_room = |_| BootError::NoRoom("BIOS image");
        let shadow = self
            .rom
            .get_slice(start, SHADOW)
            .map_err(|_| BootError::NoRoom("BIOS image"))?;
        let mut bytes = [0; 4096];
        for offset in (0..SHADOW).step_by(bytes.len()) {
            shadow
                .read_slice(&mut bytes, offset)
                .map_err(|_| BootError::NoRoom("BIOS image"))?;
            let address = LEGACY_HOLE_END - (SHADOW - offset) as u64;
            memory
                .write_slice(&bytes, GuestAddress(address))
                .map_err(no_room)?;
        }
        Ok(Entry::ResetVector)
    }
}
