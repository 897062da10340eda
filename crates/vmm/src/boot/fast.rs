//! The project's own firmware (firmware/fast): finds the Linux that a disk would boot, in the
//! guest, and starts it.
//!
//! It is an ELF file with a PVH entry, takes memory map and tables as a kernel does and hands them
//! on. Its command line tells where devices are. What it decides it says at its port.

use std::path::{Path, PathBuf};

use edgevmm_devices::GuestMemory;

use super::pvh::{self, StartInfo, Tables};
use super::{BootError, Source, write};
use crate::kvm::regs::Entry;
use crate::layout::{BOOT_PORT, ECAM_BASE, PCI_WINDOW_BASE};

/// Its file's name.
const FILE: &str = "edgevmm-fast";
/// Where packages put it.
const DIRECTORY: &str = "/usr/lib/edgevmm";
/// What it is called in messages.
const WHAT: &str = "fast firmware";
/// Larger than it will ever be.
const SIZE_MAX: u64 = 4 << 20;
/// Where it finds its command line; it puts the kernel's there too.
const COMMAND_LINE: u64 = 0x2_0000;

/// The firmware.
#[derive(Debug)]
pub struct Fast {
    image: Source,
    tables: Tables,
    boot_slots: Vec<u8>,
}

impl Fast {
    /// Opens the firmware of this installation. It finds `tables` in memory and hands them on.
    ///
    /// # Errors
    /// Fails when there is none, or it can't be one.
    pub fn open(tables: Tables) -> Result<Fast, BootError> {
        let program = std::env::current_exe().unwrap_or_default();
        let path = find(&program).map_err(BootError::NoFast)?;
        Self::open_at(&path, tables)
    }

    fn open_at(path: &Path, tables: Tables) -> Result<Fast, BootError> {
        let mut image = Source::open(WHAT, path)?;
        let (len, magic) = image.head::<4>()?;
        if len > SIZE_MAX || magic != *b"\x7fELF" {
            let path = image.path;
            return Err(BootError::NotFirmware { what: WHAT, path });
        }
        Ok(Fast {
            image,
            tables,
            boot_slots: Vec::new(),
        })
    }

    /// Has it boot from the disks in these PCI slots.
    pub fn set_boot_slots(&mut self, slots: &[u8]) {
        self.boot_slots = slots.to_vec();
    }

    pub(super) fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        self.tables.write(memory)?;
        let line = self.command_line() + "\0";
        write(memory, COMMAND_LINE, line.as_bytes(), WHAT)?;
        let loaded = pvh::load(&mut self.image, memory).map_err(|error| {
            tracing::debug!(%error, "The firmware can't be loaded");
            if pvh::is_too_long(&error) {
                BootError::NoRoom(WHAT)
            } else {
                self.refused()
            }
        })?;
        let info = StartInfo {
            command_line: Some(COMMAND_LINE),
            module: None,
        };
        info.enter(&loaded.ok_or_else(|| self.refused())?, &self.tables, memory)
    }

    fn command_line(&self) -> String {
        let slots: Vec<_> = self.boot_slots.iter().map(u8::to_string).collect();
        let disks = slots.join(",");
        format!("ecam={ECAM_BASE:#x} window={PCI_WINDOW_BASE:#x} disks={disks} port={BOOT_PORT}")
    }

    fn refused(&self) -> BootError {
        BootError::NotFirmware {
            what: WHAT,
            path: self.image.path.clone(),
        }
    }
}

/// The firmware that the VMM's `program` finds.
///
/// # Errors
/// Tells where it was looked for when there is none.
pub fn find(program: &Path) -> Result<PathBuf, Vec<PathBuf>> {
    let places = places(program);
    let found = places.iter().find(|path| path.is_file()).cloned();
    found.ok_or(places)
}

/// Where the firmware of the VMM's `program` may be: beside it, where an installation has it, where a
/// package has it.
#[must_use]
pub fn places(program: &Path) -> Vec<PathBuf> {
    let beside = program.parent().map(|directory| directory.join(FILE));
    let installed = program.parent().and_then(Path::parent);
    let installed = installed.map(|prefix| prefix.join("lib/edgevmm").join(FILE));
    let packaged = Path::new(DIRECTORY).join(FILE);
    beside
        .into_iter()
        .chain(installed)
        .chain([packaged])
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    fn open(content: &[u8]) -> Result<Fast, BootError> {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        Fast::open_at(file.path(), Tables::default())
    }

    #[test]
    fn its_command_line_is_what_it_reads() {
        let mut fast = open(b"\x7fELF").unwrap();
        fast.set_boot_slots(&[3, 1]);
        assert_eq!(
            fast.command_line(),
            "ecam=0xb0000000 window=0xc0000000 disks=3,1 port=1504"
        );
    }

    #[test]
    fn what_is_no_firmware_is_refused_by_name() {
        let error = open(b"#!/bin/sh").unwrap_err().to_string();
        assert!(error.contains("is no fast firmware"), "{error}");
        let memory = GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 2 << 20)]).unwrap();
        let error = open(b"\x7fELF").unwrap().load(&memory).unwrap_err();
        assert!(error.to_string().contains("is no fast firmware"), "{error}");
    }

    #[test]
    fn it_is_found_where_installations_and_packages_have_it() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("bin/edgevmm");
        let [beside, installed, packaged] = &places(&program)[..] else {
            panic!("{:?}", places(&program));
        };
        assert_eq!(packaged, Path::new("/usr/lib/edgevmm/edgevmm-fast"));
        if !packaged.exists() {
            let error = BootError::NoFast(find(&program).unwrap_err()).to_string();
            for place in [beside, installed, packaged] {
                assert!(error.contains(&*place.to_string_lossy()), "{error}");
            }
        }
        for place in [installed, beside] {
            std::fs::create_dir_all(place.parent().unwrap()).unwrap();
            std::fs::write(place, "x").unwrap();
            assert_eq!(find(&program).as_ref(), Ok(place));
        }
    }
}
