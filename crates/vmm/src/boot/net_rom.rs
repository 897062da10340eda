//! The option ROM by which SeaBIOS boots from the network: iPXE's for virtio, handed over through
//! fw_cfg under the name by which SeaBIOS looks for the ROM of a PCI function.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::{BootError, Source};

/// Where distributions put iPXE's ROM: Debian and Ubuntu (package ipxe-qemu), and QEMU itself.
const DEFAULT_ROMS: [&str; 2] = [
    "/usr/lib/ipxe/qemu/pxe-virtio.rom",
    "/usr/share/qemu/pxe-virtio.rom",
];

/// The fw_cfg file of it: for vendor 1af4 and the modern network device 1041.
pub const FILE: &str = "pci1af4,1041.rom";

/// What all option ROMs of a machine have room for.
const LONGEST: u64 = 256 << 10;

/// What an option ROM begins with.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

const WHAT: &str = "network boot ROM";

/// Reads the ROM at `path`, or iPXE's.
///
/// # Errors
/// Fails when there is none, or it is something else.
pub fn read(path: Option<&Path>) -> Result<Vec<u8>, BootError> {
    let path = path.map_or_else(default_rom, Path::to_path_buf);
    let rom = Source::open_firmware(WHAT, &path, "ipxe-qemu")?;
    let mut bytes = Vec::new();
    let read = (&rom.file).take(LONGEST + 1).read_to_end(&mut bytes);
    read.map_err(|error| rom.error(error))?;
    if bytes.starts_with(&SIGNATURE) && bytes.len() as u64 <= LONGEST {
        Ok(bytes)
    } else {
        Err(BootError::NotNetRom(path))
    }
}

fn default_rom() -> PathBuf {
    let [first, second] = DEFAULT_ROMS.map(PathBuf::from);
    if !first.exists() && second.exists() {
        second
    } else {
        first
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;

    #[test]
    fn what_is_no_rom_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rom");
        let long = [&SIGNATURE[..], &[0; LONGEST as usize]].concat();
        for bytes in [&b""[..], b"\x7fELF", &long] {
            std::fs::write(&file, bytes).unwrap();
            let error = read(Some(&file)).unwrap_err().to_string();
            assert!(error.contains("is no option ROM"), "{error}");
        }
        let longest = long.get(..LONGEST as usize).unwrap();
        std::fs::write(&file, longest).unwrap();
        assert_eq!(read(Some(&file)).unwrap(), longest);
        std::fs::remove_file(&file).unwrap();
        let error = read(Some(&file)).unwrap_err().to_string();
        assert!(error.contains("apt install ipxe-qemu"), "{error}");
    }
}
