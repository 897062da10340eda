//! SATA: an AHCI 1.3.1 host bus adapter as a PCI function, with disks (ATA8-ACS) and CD-ROM drives
//! (MMC over PACKET) on its ports.
//!
//! The adapter looks like an ICH9's in AHCI mode: six ports, 32 commands each, native command
//! queuing, 64-bit addresses, one MSI or interrupt pin A. Each port that its driver has started has
//! a thread, which takes the commands, does them between disk and guest memory and posts their
//! results. Left out: the legacy IDE registers, port multipliers, enclosure management, command
//! completion coalescing, power management of links (the states are taken and ignored), hot plug
//! of disks, and asynchronous notification.
//!
//! Everything in guest memory is read once and checked: a structure outside of memory is a fatal
//! host bus error, a command that makes no sense is aborted. After either the port takes no more
//! commands until its driver stops and starts it (6.2).
//!
//! # Locks
//! The function's lock, taken by vCPUs; inside it a port's registers, which the port's thread takes
//! as well, or a drive's state; innermost the interrupts. A vCPU that stops a port waits for its
//! thread, and holds nothing that the thread takes.

mod ata;
mod atapi;
mod cd;
mod command;
mod drive;
mod fis;
mod hba;
mod identify;
mod interrupts;
mod mmc;
mod port;
mod registers;
mod server;
mod worker;

#[cfg(test)]
mod tests;

pub use ata::{AtaState, QueuedError};
pub use cd::{CdState, MediaError, MediaEvent, MediaHandle, Sense};
pub use drive::{Drive, DriveConfig, DriveState};
pub use hba::{Ahci, AhciConfig, AhciState};
pub use registers::PortState;

/// Ports of an adapter.
pub const PORTS: usize = 6;
