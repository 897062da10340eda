//! What the boot vCPU finds in memory: a kernel of the user's, or the firmware.
//!
//! Loading is repeated at every reset of the machine, as power-on would.

pub mod cloudhv;
pub mod fast;
pub mod firmware;
pub mod kernel;
pub mod net_rom;
pub mod ovmf;
pub mod partitions;
mod plan;
pub mod pvh;
mod source;

use std::io;
use std::path::PathBuf;

use edgevmm_block::BlockError;
use edgevmm_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

pub use plan::{Boot, BootPlan};
use source::Source;

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
    /// The project's own firmware is not installed.
    #[error(
        "There is no fast firmware to boot the disk with, as there is none of {}: packages and \
         `edgevmm install` bring it along, and `cargo build --release --workspace` builds it beside \
         edgevmm; or choose another firmware",
        list(.0)
    )]
    NoFast(Vec<PathBuf>),
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
    /// Firmware is not installed.
    #[error(
        "There is no {what} to boot the disk with: {} is missing; install it with apt install \
         {package}, or choose another by --firmware",
        path.display()
    )]
    NoFirmware {
        /// What kind of firmware.
        what: &'static str,
        /// Where it was expected.
        path: PathBuf,
        /// The package that has it.
        package: &'static str,
    },
    /// A file that is to be firmware is something else.
    #[error(
        "{} is no {what}, or is damaged: install its package again, or choose another by --firmware",
        path.display()
    )]
    NotFirmware {
        /// What kind of firmware.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file of UEFI variables is in use, or can't be made.
    #[error("Can't use the UEFI variables in {}", path.display())]
    Vars {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: BlockError,
    },
    /// The file of UEFI variables can't be written when it is made.
    #[error("Can't make the file of UEFI variables {}", path.display())]
    MakeVars {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file that is to hold UEFI variables holds something else.
    #[error(
        "{} holds no UEFI variables of this firmware, or is damaged: name a file that is not there \
         yet, and it is made",
        .0.display()
    )]
    NotVars(PathBuf),
    /// UEFI firmware that keeps no variables is to keep some.
    #[error(
        "{} keeps no variables: leave out --uefi-vars, or give OVMF's code with --uefi",
        .0.display()
    )]
    KeepsNoVars(PathBuf),
    /// A file that is to be an option ROM is something else.
    #[error(
        "{} is no option ROM of at most 256 KiB: give --net-rom iPXE's for virtio \
         (pxe-virtio.rom), or leave it out",
        .0.display()
    )]
    NotNetRom(PathBuf),
    /// UEFI firmware that has an order of its own is to boot from a network.
    #[error(
        "{} boots from no network: leave out `bootindex` of the interface, or give OVMF's code with --uefi",
        .0.display()
    )]
    NoNetBoot(PathBuf),
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

fn list(paths: &[PathBuf]) -> String {
    let paths = paths.iter().map(|path| path.display().to_string());
    paths.collect::<Vec<_>>().join(", ")
}

fn write(
    memory: &GuestMemory,
    address: u64,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| BootError::NoRoom(what))
}

fn write_obj<T: vm_memory::ByteValued>(
    memory: &GuestMemory,
    address: u64,
    value: T,
) -> Result<(), BootError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(|_| BootError::NoRoom("set of boot parameters"))
}
