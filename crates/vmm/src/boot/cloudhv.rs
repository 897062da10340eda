//! UEFI as edk2 builds it for Cloud Hypervisor (OvmfPkg/CloudHv): an ELF file with a PVH entry that
//! takes memory map and tables as a kernel does and needs next to no legacy hardware.
//!
//! Its variables are in RAM and last until the machine ends: it boots by the removable path,
//! `\EFI\BOOT\BOOTX64.EFI`.

use std::path::{Path, PathBuf};

use edgevmm_devices::GuestMemory;

use super::pvh::{self, StartInfo, Tables};
use super::{BootError, Source};
use crate::kvm::regs::Entry;
use crate::tables::e820::E820Type;

/// Where Debian puts it (package cloudhv-efi-x86-64).
pub const DEFAULT_CLOUDHV: &str = "/usr/share/cloudhv-efi-x86-64/CLOUDHV.fd";

/// What it is called in messages.
const WHAT: &str = "UEFI firmware";
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Larger than any: its files have 4 MiB.
const SIZE_MAX: u64 = 16 << 20;
/// Less memory than this and it hangs without a word.
pub const MIN_MEMORY: u64 = 64 << 20;

/// UEFI firmware by PVH.
#[derive(Debug)]
pub struct CloudHv {
    image: Source,
    tables: Tables,
}

impl CloudHv {
    /// Whether a file is such firmware rather than a flash image.
    ///
    /// # Errors
    /// Fails when it can't be read.
    pub fn is_one(path: &Path) -> Result<bool, BootError> {
        let (_, magic) = Source::open(WHAT, path)?.head()?;
        Ok(magic == ELF_MAGIC)
    }

    /// Opens the image at `path`, or Debian's. It finds `tables` in memory.
    ///
    /// # Errors
    /// Fails when there is none, or it can't be one.
    pub fn open(path: Option<&Path>, tables: Tables) -> Result<CloudHv, BootError> {
        let path = path.map_or_else(|| PathBuf::from(DEFAULT_CLOUDHV), Path::to_path_buf);
        let mut image = Source::open_firmware(WHAT, &path, "cloudhv-efi-x86-64")?;
        let (len, magic) = image.head()?;
        if len > SIZE_MAX || magic != ELF_MAGIC {
            return Err(BootError::NotFirmware { what: WHAT, path });
        }
        let ram = (tables.memory_map.iter())
            .filter(|entry| entry.kind == E820Type::Ram)
            .map(|entry| entry.address + entry.len);
        if ram.max().unwrap_or(0) < MIN_MEMORY {
            return Err(BootError::NoRoom(WHAT));
        }
        Ok(CloudHv { image, tables })
    }

    pub(super) fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        self.tables.write(memory)?;
        match pvh::load(&mut self.image, memory) {
            Ok(Some(loaded)) => StartInfo::default().enter(&loaded, &self.tables, memory),
            Ok(None) => Err(self.refused()),
            Err(error) => {
                tracing::debug!(%error, "The firmware can't be loaded");
                Err(self.refused())
            }
        }
    }

    fn refused(&self) -> BootError {
        BootError::NotFirmware {
            what: WHAT,
            path: self.image.path.clone(),
        }
    }
}
