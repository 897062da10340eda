//! CD-ROM drives: the commands of MMC-6 that firmware and operating systems use on a disc of one
//! data track, in packets (ATA8-ACS, PACKET).
//!
//! Left out: writing, audio, raw sectors, DVD structures and their copy protection, changers.

use std::sync::Arc;

use edgevmm_block::BlockError;
use edgevmm_block::engine::{Operation, Request};

use super::cd::{CdState, Contents, MediaEvent, MediaHandle, Sense, Tray};
use super::command::PACKET_LEN;
use super::drive::{Action, Protocol, SCRATCH_LEN};
use super::fis::{ABORTED, Command, ERR, READY, TaskFile};
use super::identify;
use super::mmc::{self, BLOCK, Reply};
use crate::state::{StateError, ensure};

/// What a packet drive shows after a reset.
pub const SIGNATURE: u32 = 0xeb14_0101;

/// In the count register: the command has ended.
const ENDED: u16 = 3;
/// Most blocks of one command: what READ (10) can say.
const BLOCKS_MAX: u64 = 0xffff;

const fn sense(key: u8, code: u8, qualifier: u8) -> Sense {
    Sense {
        key,
        code,
        qualifier,
    }
}

const NO_MEDIUM: Sense = sense(2, 0x3a, 1);
const NO_MEDIUM_OPEN: Sense = sense(2, 0x3a, 2);
const UNREADABLE: Sense = sense(3, 0x11, 0);
const UNKNOWN_COMMAND: Sense = sense(5, 0x20, 0);
const OUT_OF_RANGE: Sense = sense(5, 0x21, 0);
const INVALID_FIELD: Sense = sense(5, 0x24, 0);
const NOT_SAVED: Sense = sense(5, 0x39, 0);
const REMOVAL_PREVENTED: Sense = sense(5, 0x53, 2);
const CHANGED: Sense = sense(6, 0x28, 0);

/// SCSI commands.
mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK_10: u8 = 0x2b;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}

/// What a packet asks for.
enum Answer {
    Nothing,
    Data(usize),
    Blocks { first: u64, count: u64 },
}

/// A CD-ROM drive.
#[derive(Debug)]
pub struct CdDrive {
    tray: Arc<Tray>,
    serial: String,
}

impl CdDrive {
    pub fn new(tray: Arc<Tray>, serial: String) -> Self {
        Self { tray, serial }
    }

    pub fn media(&self) -> MediaHandle {
        MediaHandle(Arc::clone(&self.tray))
    }

    pub fn state(&self) -> CdState {
        self.tray.lock().state.clone()
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses what can't be.
    pub fn restore(&self, saved: &CdState) -> Result<(), StateError> {
        ensure(saved.sense.key < 16, "sense key", saved.sense.key)?;
        self.tray.lock().state = saved.clone();
        Ok(())
    }

    /// Returns to the state after power-on. The tray stays as it is: an installer that ejects its
    /// disc before it restarts the machine does not want to start again.
    pub fn power_on(&self) {
        let mut contents = self.tray.lock();
        contents.state.locked = false;
        contents.state.sense = Sense::default();
    }

    pub fn command(
        &self,
        fis: &Command,
        packet: &[u8; PACKET_LEN],
        scratch: &mut [u8; SCRATCH_LEN],
    ) -> Action {
        match fis.command {
            0xa0 => self.packet(fis, packet, scratch),
            // IDENTIFY PACKET DEVICE.
            0xa1 => {
                identify::cdrom(&self.serial).write_to(scratch);
                Action::reply(SCRATCH_LEN, Protocol::PioIn)
            }
            // DEVICE RESET, EXECUTE DEVICE DIAGNOSTIC.
            0x08 | 0x90 => Action::Done(TaskFile::signature(SIGNATURE)),
            // IDENTIFY DEVICE, READ SECTORS: here a driver that has not asked learns what it has.
            0x20 | 0xec => Action::Done(TaskFile {
                status: READY | ERR,
                error: ABORTED,
                ..TaskFile::signature(SIGNATURE)
            }),
            // SET FEATURES as far as it is about transfer modes.
            0xef if matches!(fis.features & 0xff, 0x03 | 0x66 | 0xcc) => {
                Action::Done(TaskFile::good(fis))
            }
            // CHECK POWER MODE: active.
            0xe5 => Action::Done(TaskFile {
                count: 0xff,
                ..TaskFile::good(fis)
            }),
            // STANDBY, IDLE, SLEEP, also IMMEDIATE.
            0xe0..=0xe3 | 0xe6 => Action::Done(TaskFile::good(fis)),
            _ => Action::failed(fis, ABORTED),
        }
    }

    fn packet(
        &self,
        fis: &Command,
        packet: &[u8; PACKET_LEN],
        scratch: &mut [u8; SCRATCH_LEN],
    ) -> Action {
        let mut contents = self.tray.lock();
        match answer(&mut contents, packet, Reply::new(scratch)) {
            Ok(Answer::Nothing) => Action::Done(good(fis)),
            Ok(Answer::Data(len)) => Action::reply(len, Protocol::Plain),
            Ok(Answer::Blocks { first, count }) => Action::Disk {
                request: Request {
                    operation: Operation::Read,
                    offset: first * BLOCK,
                    len: count * BLOCK,
                },
                durable: false,
                protocol: Protocol::Plain,
            },
            Err(sense) => {
                contents.state.sense = sense;
                Action::Done(check_condition(fis, sense))
            }
        }
    }

    /// The registers of a read that failed.
    pub fn failed(&self, fis: &Command, _error: &BlockError) -> TaskFile {
        let mut contents = self.tray.lock();
        let sense = ready(&contents).err().unwrap_or(UNREADABLE);
        contents.state.sense = sense;
        check_condition(fis, sense)
    }
}

/// The registers of a command that went well.
pub fn good(fis: &Command) -> TaskFile {
    let registers = TaskFile::good(fis);
    if fis.command == 0xa0 {
        TaskFile {
            count: ENDED,
            ..registers
        }
    } else {
        registers
    }
}

/// The registers of a packet command that failed.
fn check_condition(fis: &Command, sense: Sense) -> TaskFile {
    let aborted = if sense.key == INVALID_FIELD.key {
        ABORTED
    } else {
        0
    };
    TaskFile {
        status: READY | ERR,
        error: sense.key << 4 | aborted,
        ..good(fis)
    }
}

/// Fails unless there is a medium that can be read.
fn ready(contents: &Contents) -> Result<u64, Sense> {
    match contents.readable() {
        // Of the last block a part may be missing.
        Some(medium) => Ok(medium.size().div_ceil(BLOCK)),
        None if contents.state.open => Err(NO_MEDIUM_OPEN),
        None => Err(NO_MEDIUM),
    }
}

fn answer(
    contents: &mut Contents,
    packet: &[u8; PACKET_LEN],
    mut reply: Reply<'_>,
) -> Result<Answer, Sense> {
    let [command, b1, b2, b3, b4, b5, b6, b7, b8, b9, ..] = *packet;
    let allocated = usize::from(u16::from_be_bytes([b7, b8]));
    if command == op::REQUEST_SENSE {
        let pending = std::mem::take(&mut contents.state.changed);
        let sense = std::mem::take(&mut contents.state.sense);
        let untold = pending && sense == Sense::default();
        mmc::sense(&mut reply, if untold { CHANGED } else { sense });
        contents.state.changed = pending && !untold;
        return Ok(Answer::Data(reply.len(b4.into())));
    }
    contents.state.sense = Sense::default();
    let told_anyway = [op::INQUIRY, op::GET_CONFIGURATION, op::GET_EVENT_STATUS];
    if !told_anyway.contains(&command) && std::mem::take(&mut contents.state.changed) {
        return Err(CHANGED);
    }
    match command {
        op::TEST_UNIT_READY | op::SEEK_10 => ready(contents).map(|_| Answer::Nothing),
        op::INQUIRY => {
            mmc::inquiry(&mut reply, b1 & 1 != 0, b2).ok_or(INVALID_FIELD)?;
            let allocated = u16::from_be_bytes([b3, b4]);
            Ok(Answer::Data(reply.len(allocated.into())))
        }
        op::START_STOP_UNIT => start_stop(contents, b4),
        op::PREVENT_ALLOW => {
            contents.state.locked = b4 & 1 != 0;
            Ok(Answer::Nothing)
        }
        op::READ_CAPACITY => {
            mmc::capacity(&mut reply, ready(contents)?);
            Ok(Answer::Data(reply.len(usize::MAX)))
        }
        op::READ_10 => {
            let count = u16::from_be_bytes([b7, b8]);
            blocks(contents, [b2, b3, b4, b5], count.into())
        }
        op::READ_12 => {
            let count = u32::from_be_bytes([b6, b7, b8, b9]);
            blocks(contents, [b2, b3, b4, b5], count.into())
        }
        op::READ_CD => {
            let count = u32::from_be_bytes([0, b6, b7, b8]);
            // The user's data of sectors, and nothing around it.
            match b9 & 0xf8 {
                0x00 => ready(contents).map(|_| Answer::Nothing),
                0x10 => blocks(contents, [b2, b3, b4, b5], count.into()),
                _ => Err(INVALID_FIELD),
            }
        }
        op::READ_TOC => {
            // Older drivers have the format in the last byte.
            let format = if b2 & 0xf == 0 { b9 >> 6 } else { b2 & 0xf };
            let end = ready(contents)?;
            mmc::toc(&mut reply, format, b1 & 2 != 0, b6, end).ok_or(INVALID_FIELD)?;
            Ok(Answer::Data(reply.len(allocated)))
        }
        op::READ_DISC_INFORMATION => {
            ready(contents)?;
            mmc::disc_information(&mut reply);
            Ok(Answer::Data(reply.len(allocated)))
        }
        op::GET_CONFIGURATION => {
            let first = u16::from_be_bytes([b2, b3]);
            mmc::configuration(&mut reply, b1 & 3, first, ready(contents).ok());
            Ok(Answer::Data(reply.len(allocated)))
        }
        op::GET_EVENT_STATUS => {
            event_status(contents, b1, b4, &mut reply)?;
            Ok(Answer::Data(reply.len(allocated)))
        }
        op::MODE_SENSE_10 => {
            // Saved values there are none.
            if b2 >> 6 == 3 {
                return Err(NOT_SAVED);
            }
            let medium = ready(contents).map_err(|_| contents.state.open);
            let locked = contents.state.locked;
            mmc::mode_pages(&mut reply, b2, medium, locked).ok_or(INVALID_FIELD)?;
            Ok(Answer::Data(reply.len(allocated)))
        }
        op::SET_CD_SPEED => Ok(Answer::Nothing),
        op::MECHANISM_STATUS => {
            mmc::mechanism(&mut reply, contents.state.open);
            Ok(Answer::Data(
                reply.len(usize::from(u16::from_be_bytes([b8, b9]))),
            ))
        }
        _ => Err(UNKNOWN_COMMAND),
    }
}

fn blocks(contents: &Contents, first: [u8; 4], count: u64) -> Result<Answer, Sense> {
    let end = ready(contents)?;
    let first = u64::from(u32::from_be_bytes(first));
    if count > BLOCKS_MAX {
        Err(INVALID_FIELD)
    } else if first + count > end {
        Err(OUT_OF_RANGE)
    } else if count == 0 {
        Ok(Answer::Nothing)
    } else {
        Ok(Answer::Blocks { first, count })
    }
}

fn start_stop(contents: &mut Contents, flags: u8) -> Result<Answer, Sense> {
    let (start, load_or_eject, power) = (flags & 1 != 0, flags & 2 != 0, flags >> 4);
    // What is about power conditions changes nothing.
    if power == 0 && load_or_eject {
        if !start && contents.state.locked {
            return Err(REMOVAL_PREVENTED);
        }
        contents.move_tray(!start);
    }
    Ok(Answer::Nothing)
}

fn event_status(
    contents: &mut Contents,
    flags: u8,
    classes: u8,
    reply: &mut Reply<'_>,
) -> Result<(), Sense> {
    const MEDIA: u8 = 1 << 4;
    // Nothing is told but when asked.
    if flags & 1 == 0 {
        return Err(INVALID_FIELD);
    }
    if classes & MEDIA == 0 {
        reply.put(&[0, 2, 0x80, MEDIA]);
        return Ok(());
    }
    let event = match std::mem::take(&mut contents.state.event) {
        MediaEvent::None => 0,
        MediaEvent::EjectRequest => 1,
        MediaEvent::New => 2,
        MediaEvent::Removal => 3,
    };
    let present = contents.readable().is_some();
    let status = u8::from(contents.state.open) | u8::from(present) << 1;
    reply.put(&[0, 6, 4, MEDIA, event, status, 0, 0]);
    Ok(())
}
