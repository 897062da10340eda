//! Disks: the commands of ATA8-ACS that firmware and operating systems use.
//!
//! Left out: addresses by cylinder, SMART, security, the host protected area, queued TRIM. Modes
//! of power management and of transfer are taken and change nothing.

use std::sync::{Arc, Mutex};

use edgevmm_block::engine::{Operation, Request};
use edgevmm_block::{BlockBackend, BlockError};
use serde::{Deserialize, Serialize};

use super::drive::{Action, Protocol, SCRATCH_LEN};
use super::fis::{ABORTED, Command, ERR, NOT_FOUND, READY, TaskFile, UNCORRECTABLE};
use super::identify;
use crate::bus::lock;
use crate::disk::jobs::FLUSH;
use crate::state::{StateError, ensure};

/// What a drive without special features shows after a reset.
pub const SIGNATURE: u32 = 0x0000_0101;

/// Device register: the address is a sector's number. In a queued write: to be durable.
const BY_SECTOR: u8 = 1 << 6;
const QUEUED_DURABLE: u8 = 1 << 7;

/// READ FPDMA QUEUED.
const READ_QUEUED: u8 = 0x60;
/// WRITE FPDMA QUEUED.
const WRITE_QUEUED: u8 = 0x61;

/// Most sectors of a READ or WRITE MULTIPLE at a time.
pub const MULTIPLE_MAX: u8 = 16;
/// Blocks of ranges that one TRIM may have.
pub const TRIM_BLOCKS: u16 = 1;
/// Bytes of a range of a TRIM.
const TRIM_RANGE: usize = 8;

/// Log pages: the directory, and the errors of queued commands.
const LOG_DIRECTORY: u8 = 0x00;
const LOG_QUEUED_ERROR: u8 = 0x10;
/// In the log: the error was of no queued command.
const NOT_QUEUED: u8 = 1 << 7;

/// What a driver can change of a disk, beside its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtaState {
    /// Writes may stay in the host's cache until they are flushed.
    pub write_cache: bool,
    /// Only noted.
    pub look_ahead: bool,
    /// Sectors of a READ or WRITE MULTIPLE at a time; 0 for none. Only noted.
    pub multiple: u8,
    /// The last error of a queued command.
    pub queued_error: Option<QueuedError>,
}

impl Default for AtaState {
    fn default() -> Self {
        Self {
            write_cache: true,
            look_ahead: true,
            multiple: MULTIPLE_MAX,
            queued_error: None,
        }
    }
}

/// An error of a queued command, as the log page tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedError {
    /// The command's tag.
    pub tag: u8,
    /// Error register.
    pub error: u8,
    /// First sector of the command.
    pub lba: u64,
}

/// A disk.
#[derive(Debug)]
pub struct AtaDisk {
    backend: Arc<dyn BlockBackend>,
    serial: String,
    state: Mutex<AtaState>,
}

impl AtaDisk {
    pub fn new(backend: Arc<dyn BlockBackend>, serial: String) -> Self {
        Self {
            backend,
            serial,
            state: Mutex::default(),
        }
    }

    pub fn state(&self) -> AtaState {
        lock(&self.state).clone()
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses what no driver could have set.
    pub fn restore(&self, saved: &AtaState) -> Result<(), StateError> {
        let multiple = saved.multiple;
        ensure(
            is_multiple(multiple),
            "sectors of a multiple transfer",
            multiple,
        )?;
        let tag = saved.queued_error.map_or(0, |error| error.tag);
        ensure(tag < 32, "tag of a failed command", tag)?;
        *lock(&self.state) = saved.clone();
        Ok(())
    }

    /// Returns to the state after power-on.
    pub fn power_on(&self) {
        *lock(&self.state) = AtaState::default();
    }

    /// Does what needs no disk, or tells what the disk is to do. Data for the host goes into
    /// `scratch`.
    pub fn command(&self, fis: &Command, scratch: &mut [u8; SCRATCH_LEN]) -> Action {
        match fis.command {
            0x20 | 0x21 | 0xc4 => self.transfer(fis, Operation::Read, short(fis), Protocol::PioIn),
            0x24 | 0x29 => self.transfer(fis, Operation::Read, Some(long(fis)), Protocol::PioIn),
            0xc8 | 0xc9 => self.transfer(fis, Operation::Read, short(fis), Protocol::Plain),
            0x25 => self.transfer(fis, Operation::Read, Some(long(fis)), Protocol::Plain),
            0x30 | 0x31 | 0xc5 | 0xca | 0xcb => {
                self.transfer(fis, Operation::Write, short(fis), Protocol::Plain)
            }
            0x34 | 0x35 | 0x39 | 0x3d | 0xce => {
                self.transfer(fis, Operation::Write, Some(long(fis)), Protocol::Plain)
            }
            // READ and WRITE FPDMA QUEUED.
            READ_QUEUED => self.transfer(fis, Operation::Read, queue(fis), Protocol::Queued),
            WRITE_QUEUED => self.transfer(fis, Operation::Write, queue(fis), Protocol::Queued),
            // READ VERIFY, with addresses of both kinds.
            0x40 | 0x41 => self.verify(fis, short(fis)),
            0x42 => self.verify(fis, Some(long(fis))),
            // DATA SET MANAGEMENT.
            0x06 => self.trim(fis),
            // FLUSH CACHE, also EXT.
            0xe7 | 0xea => Action::Disk {
                request: FLUSH,
                durable: false,
                protocol: Protocol::Plain,
            },
            // IDENTIFY DEVICE.
            0xec => {
                let state = lock(&self.state);
                identify::disk(&*self.backend, &self.serial, &state).write_to(scratch);
                Action::reply(SCRATCH_LEN, Protocol::PioIn)
            }
            // READ LOG EXT, READ LOG DMA EXT.
            0x2f => self.read_log(fis, scratch, Protocol::PioIn),
            0x47 => self.read_log(fis, scratch, Protocol::Plain),
            // EXECUTE DEVICE DIAGNOSTIC.
            0x90 => Action::Done(TaskFile::signature(SIGNATURE)),
            // SET MULTIPLE MODE, SET FEATURES.
            0xc6 => self.set_multiple(fis),
            0xef => self.set_features(fis),
            // CHECK POWER MODE: active.
            0xe5 => Action::Done(TaskFile {
                count: 0xff,
                ..TaskFile::good(fis)
            }),
            // RECALIBRATE, SEEK, INITIALIZE DEVICE PARAMETERS, and STANDBY, IDLE, SLEEP, also
            // IMMEDIATE.
            0x10..=0x1f | 0x70 | 0x91 | 0xe0..=0xe3 | 0xe6 => Action::Done(TaskFile::good(fis)),
            _ => Action::failed(fis, ABORTED),
        }
    }

    fn transfer(
        &self,
        fis: &Command,
        operation: Operation,
        range: Option<(u64, u64)>,
        protocol: Protocol,
    ) -> Action {
        if operation == Operation::Write && self.backend.read_only() {
            return Action::failed(fis, ABORTED);
        }
        let durable = match fis.command {
            0x3d | 0xce => true,
            WRITE_QUEUED => fis.device & QUEUED_DURABLE != 0,
            _ => false,
        };
        match self.range(range) {
            Err(error) => Action::failed(fis, error),
            Ok((offset, len)) => Action::Disk {
                durable: operation == Operation::Write && (durable || !self.state().write_cache),
                request: Request {
                    operation,
                    offset,
                    len,
                },
                protocol,
            },
        }
    }

    /// Offset and length in bytes of a range of sectors that is on the disk, or the error.
    fn range(&self, range: Option<(u64, u64)>) -> Result<(u64, u64), u8> {
        let (sector, count) = range.ok_or(ABORTED)?;
        let end = sector.checked_add(count).ok_or(NOT_FOUND)?;
        let len = identify::sector_len(&*self.backend);
        if end > self.backend.size() / len {
            return Err(NOT_FOUND);
        }
        Ok((sector * len, count * len))
    }

    fn verify(&self, fis: &Command, range: Option<(u64, u64)>) -> Action {
        match self.range(range) {
            Err(error) => Action::failed(fis, error),
            Ok(_) => Action::Done(TaskFile::good(fis)),
        }
    }

    fn trim(&self, fis: &Command) -> Action {
        let wanted = fis.features & 0xff == 1 && (1..=TRIM_BLOCKS).contains(&fis.count);
        if !wanted || self.backend.read_only() || self.backend.limits().discard_granularity == 0 {
            return Action::failed(fis, ABORTED);
        }
        Action::Trim {
            durable: !self.state().write_cache,
        }
    }

    /// The next range of a TRIM whose payload is `ranges`, from entry `next` on, which is moved
    /// past it. Entries that follow each other on the disk are one range.
    ///
    /// # Errors
    /// A range is not on the disk.
    pub fn next_trim(
        &self,
        ranges: &[u8; SCRATCH_LEN],
        next: &mut usize,
    ) -> Result<Option<Request>, u8> {
        let mut found: Option<(u64, u64)> = None;
        let entries = ranges.chunks_exact(TRIM_RANGE).skip(*next);
        for entry in entries {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            let (sector, count) = (entry & 0xffff_ffff_ffff, entry >> 48);
            let (offset, len) = self.range(Some((sector, count)))?;
            match found {
                Some((start, so_far)) if len > 0 && start + so_far != offset => break,
                Some((start, so_far)) => found = Some((start, so_far + len)),
                None if len > 0 => found = Some((offset, len)),
                None => {}
            }
            *next += 1;
        }
        Ok(found.map(|(offset, len)| Request {
            operation: Operation::Discard,
            offset,
            len,
        }))
    }

    fn read_log(
        &self,
        fis: &Command,
        scratch: &mut [u8; SCRATCH_LEN],
        protocol: Protocol,
    ) -> Action {
        let [log, page, ..] = fis.lba.to_le_bytes();
        if fis.count != 1 || page != 0 {
            return Action::failed(fis, ABORTED);
        }
        scratch.fill(0);
        match log {
            LOG_DIRECTORY => {
                // The version, and how many pages each log has.
                scratch[0] = 1;
                scratch[2 * usize::from(LOG_QUEUED_ERROR)] = 1;
            }
            LOG_QUEUED_ERROR => self.log_queued_error(scratch),
            _ => return Action::failed(fis, ABORTED),
        }
        Action::reply(SCRATCH_LEN, protocol)
    }

    fn log_queued_error(&self, page: &mut [u8; SCRATCH_LEN]) {
        let Some(error) = lock(&self.state).queued_error.take() else {
            page[0] = NOT_QUEUED;
            identify::seal(page, 0);
            return;
        };
        let registers = TaskFile {
            status: READY | ERR,
            error: error.error,
            lba: error.lba,
            count: 0,
            device: BY_SECTOR,
        };
        page[..14].copy_from_slice(&registers.to_host()[..14]);
        page[0] = error.tag;
        page[1] = 0;
        identify::seal(page, 0);
    }

    fn set_multiple(&self, fis: &Command) -> Action {
        let [count, _] = fis.count.to_le_bytes();
        if !is_multiple(count) {
            return Action::failed(fis, ABORTED);
        }
        lock(&self.state).multiple = count;
        Action::Done(TaskFile::good(fis))
    }

    fn set_features(&self, fis: &Command) -> Action {
        let mut state = lock(&self.state);
        let [feature, _] = fis.features.to_le_bytes();
        match feature {
            // The write cache, on and off.
            0x02 => state.write_cache = true,
            0x82 => {
                state.write_cache = false;
                // What is in it becomes durable first.
                return Action::Disk {
                    request: FLUSH,
                    durable: false,
                    protocol: Protocol::Plain,
                };
            }
            0xaa => state.look_ahead = true,
            0x55 => state.look_ahead = false,
            // The transfer mode; whether defaults come back with a reset.
            0x03 | 0x66 | 0xcc => {}
            _ => return Action::failed(fis, ABORTED),
        }
        Action::Done(TaskFile::good(fis))
    }

    /// The error register for what the host failed.
    pub fn failed(&self, fis: &Command, error: &BlockError) -> u8 {
        match (error, fis.command) {
            (BlockError::OutOfRange { .. }, _) => NOT_FOUND,
            (_, 0x20..=0x2f | READ_QUEUED | 0xc4 | 0xc8 | 0xc9) => UNCORRECTABLE,
            _ => ABORTED,
        }
    }

    /// Notes an error of a queued command in the log.
    pub fn note_queued_error(&self, fis: &Command, error: u8) {
        let [low, _] = fis.count.to_le_bytes();
        lock(&self.state).queued_error = Some(QueuedError {
            tag: low >> 3,
            error,
            lba: fis.lba,
        });
    }
}

fn is_multiple(count: u8) -> bool {
    count == 0 || count.is_power_of_two() && count <= MULTIPLE_MAX
}

/// Sector and number of sectors of a command of 28 bits; none if it is by cylinder.
fn short(fis: &Command) -> Option<(u64, u64)> {
    let [count, _] = fis.count.to_le_bytes();
    let count = if count == 0 { 256 } else { u64::from(count) };
    let sector = fis.lba & 0x00ff_ffff | u64::from(fis.device & 0xf) << 24;
    (fis.device & BY_SECTOR != 0).then_some((sector, count))
}

/// Whether a command is for the queue.
pub fn is_queued(fis: &Command) -> bool {
    fis.is_command && matches!(fis.command, READ_QUEUED | WRITE_QUEUED)
}

/// Sector and number of sectors of a queued command.
fn queue(fis: &Command) -> Option<(u64, u64)> {
    Some((fis.lba, sectors(fis.features)))
}

/// Sector and number of sectors of a command of 48 bits.
fn long(fis: &Command) -> (u64, u64) {
    (fis.lba, sectors(fis.count))
}

fn sectors(count: u16) -> u64 {
    if count == 0 { 65536 } else { count.into() }
}
