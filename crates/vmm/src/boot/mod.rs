//! What the boot vCPU finds in memory: a kernel of the user's, or the firmware.
//!
//! Loading is repeated at every reset of the machine, as power-on would.

pub mod firmware;
pub mod kernel;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use edgevmm_config::FirmwareChoice;
use edgevmm_devices::GuestMemory;

use crate::kvm::regs::Entry;

/// Why the guest can't be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file can't be read.
    #[error("Can't read the {what} {}", path.display())]
    Read {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Firmware that this build is without.
    #[error("This build is without the firmware `{0}`: choose --firmware bios")]
    NotBuiltIn(FirmwareChoice),
    /// The kernel is of no known kind.
    #[error(
        "{} is no kernel that can be started: it must be an x86-64 bzImage (vmlinuz) or an ELF \
         file with a PVH entry (vmlinux)",
        .0.display()
    )]
    UnknownKernel(PathBuf),
    /// The kernel can't be read to its end, or not into guest memory.
    #[error(
        "The kernel {} is cut short or does not fit into the guest's memory: check the file, or \
         give the guest more with --memory",
        .0.display()
    )]
    KernelTooLong(PathBuf),
    /// Things don't fit into guest memory.
    #[error("The {0} does not fit into the guest's memory: give it more with --memory")]
    NoRoom(&'static str),
    /// The command line is too long.
    #[error("The kernel command line has {len} bytes, this kernel takes {max}")]
    CommandLine {
        /// Its length in bytes.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// No BIOS image is installed.
    #[error(
        "There is no firmware to boot the disk with: {} is missing; install it with apt install \
         seabios, or name a BIOS image with --bios",
        .0.display()
    )]
    NoFirmware(PathBuf),
    /// The BIOS image has an impossible size.
    #[error("The BIOS image {} has {len} bytes; 128 KiB and 256 KiB images are known", path.display())]
    FirmwareSize {
        /// Its path.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The firmware's memory can't be mapped.
    #[error("Can't map the BIOS image")]
    MapFirmware(#[source] vm_memory::mmap::MmapRegionError),
}

/// Opens a regular file for reading. A pipe in its place is refused and not waited for.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        Ok(file)
    } else if kind.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ))
    }
}

/// What starts the guest.
#[derive(Debug)]
pub enum Boot {
    /// The firmware finds a disk to boot.
    Firmware(firmware::Firmware),
    /// A kernel, straight.
    Kernel(kernel::Kernel),
}

impl Boot {
    /// Writes to guest memory what a start at power-on needs.
    ///
    /// # Errors
    /// Fails when it does not fit or can't be read.
    pub fn load(&mut self, memory: &GuestMemory) -> Result<Entry, BootError> {
        match self {
            Boot::Firmware(firmware) => firmware.load(memory),
            Boot::Kernel(kernel) => kernel.load(memory),
        }
    }
}
