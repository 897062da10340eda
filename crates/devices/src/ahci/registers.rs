//! The registers of one port (AHCI 1.3.1, 3.3), which vCPUs and the port's thread share.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::drive::DriveState;
use super::fis::{BSY, DRQ, TaskFile};
use super::interrupts::Interrupts;
use crate::GuestMemory;
use crate::bus::lock;
use crate::state::{StateError, ensure};

/// Offsets of a port's registers.
pub mod offset {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// PxIS: a register FIS came.
pub const IS_REGISTERS: u32 = 1 << 0;
/// PxIS: a PIO setup FIS came.
pub const IS_PIO_SETUP: u32 = 1 << 1;
/// PxIS: a set device bits FIS came.
pub const IS_DEVICE_BITS: u32 = 1 << 3;
/// PxIS: a part of memory that asked for it was used.
pub const IS_PROCESSED: u32 = 1 << 5;
/// PxIS: the connection changed; shows [`SERR_EXCHANGED`].
const IS_CONNECT: u32 = 1 << 6;
/// PxIS: a drive had more data than its command had memory.
pub const IS_OVERFLOW: u32 = 1 << 24;
/// PxIS: a structure is not in memory.
pub const IS_HOST_FATAL: u32 = 1 << 29;
/// PxIS: a command has failed.
pub const IS_TASK_FILE: u32 = 1 << 30;
/// PxIS bits that there are.
const IS_BITS: u32 = 0xfdc0_00ff;

/// PxCMD: commands are taken.
pub const CMD_START: u32 = 1 << 0;
/// PxCMD: spun up and powered, always.
const CMD_POWERED: u32 = 3 << 1;
/// PxCMD: clears BSY and DRQ.
const CMD_OVERRIDE: u32 = 1 << 3;
/// PxCMD: received FISes are written to memory.
const CMD_RECEIVE: u32 = 1 << 4;
/// PxCMD: the command that was begun last, from this bit on.
const CMD_CURRENT_SHIFT: u32 = 8;
const CMD_RECEIVING: u32 = 1 << 14;
const CMD_RUNNING: u32 = 1 << 15;
/// PxCMD: the driver's note that the drive is ATAPI.
const CMD_ATAPI: u32 = 1 << 24;
/// PxCMD bits that are plain storage.
const CMD_STORED: u32 = CMD_RECEIVE | CMD_ATAPI;

/// PxSCTL: what to do about the link.
const DETECT: u32 = 0xf;
const DETECT_RESET: u32 = 1;
const DETECT_OFF: u32 = 4;
/// PxSCTL bits that are plain storage: detection, speed and power management.
const SCTL_BITS: u32 = 0xfff;
/// PxSSTS of a drive: present, 3 Gb/s, active.
const LINK_UP: u32 = 0x123;
/// PxSERR: a drive announced itself.
const SERR_EXCHANGED: u32 = 1 << 26;
/// PxSERR bits that there are.
const SERR_BITS: u32 = 0x07ff_0f03;

/// PxTFD where there is no drive.
const NO_DRIVE: u32 = 0x7f;

/// Where FISes go in the memory that receives them.
const PIO_SETUP_AT: u64 = 0x20;
const TO_HOST_AT: u64 = 0x40;
const DEVICE_BITS_AT: u64 = 0x58;

/// State of a port: its registers, and the drive's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// PxCLB and PxCLBU.
    pub command_list: u64,
    /// PxFB and PxFBU.
    pub received_fis: u64,
    /// PxIS, without what other registers show.
    pub interrupts: u32,
    /// PxIE.
    pub enabled: u32,
    /// PxCMD.
    pub command: u32,
    /// PxTFD.
    pub task_file: u32,
    /// PxSIG.
    pub signature: u32,
    /// PxSCTL.
    pub control: u32,
    /// PxSERR.
    pub errors: u32,
    /// PxSACT.
    pub active: u32,
    /// PxCI.
    pub issued: u32,
    /// No command is taken until the driver stops and starts the port.
    pub faulted: bool,
    /// The driver holds the drive in a software reset.
    pub in_reset: bool,
    /// The drive's state; none where there is none.
    pub drive: Option<DriveState>,
}

/// The registers of a port, and the ways of what it posts.
#[derive(Debug)]
pub struct Registers {
    port: usize,
    /// Signature of the drive, if there is one.
    signature: Option<u32>,
    interrupts: Arc<Interrupts>,
    memory: Arc<GuestMemory>,
    state: Mutex<PortState>,
}

impl Registers {
    pub fn new(
        port: usize,
        signature: Option<u32>,
        interrupts: Arc<Interrupts>,
        memory: Arc<GuestMemory>,
    ) -> Self {
        Self {
            port,
            signature,
            interrupts,
            memory,
            state: Mutex::new(PortState::new(signature)),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, PortState> {
        lock(&self.state)
    }

    /// Reads a register other than PxCMD's neighbours that don't exist, which read as zero.
    pub fn read(&self, register: u64) -> u32 {
        let state = self.lock();
        let low = |wide: u64| (wide & 0xffff_ffff) as u32;
        match register {
            offset::CLB => low(state.command_list),
            offset::CLBU => low(state.command_list >> 32),
            offset::FB => low(state.received_fis),
            offset::FBU => low(state.received_fis >> 32),
            offset::IS => state.interrupts(),
            offset::IE => state.enabled,
            offset::CMD => state.command(),
            offset::TFD => state.task_file,
            offset::SIG => state.signature,
            offset::SSTS => self.link(&state),
            offset::SCTL => state.control,
            offset::SERR => state.errors,
            offset::SACT => state.active,
            offset::CI => state.issued,
            _ => 0,
        }
    }

    fn link(&self, state: &PortState) -> u32 {
        match (state.control & DETECT, self.signature) {
            (DETECT_OFF, _) => DETECT_OFF,
            (DETECT_RESET, _) | (_, None) => 0,
            _ => LINK_UP,
        }
    }

    /// Writes a register that has no effect beyond itself.
    pub fn write(&self, register: u64, value: u32) {
        let mut state = self.lock();
        let low = |wide: u64| wide & !0xffff_ffff | u64::from(value);
        let high = |wide: u64| wide & 0xffff_ffff | u64::from(value) << 32;
        match register {
            offset::CLB => state.command_list = low(state.command_list) & !0x3ff,
            offset::CLBU => state.command_list = high(state.command_list),
            offset::FB => state.received_fis = low(state.received_fis) & !0xff,
            offset::FBU => state.received_fis = high(state.received_fis),
            offset::IS => state.interrupts &= !value,
            offset::IE => state.enabled = value & IS_BITS,
            offset::SERR => state.errors &= !value,
            offset::SACT if state.command & CMD_START != 0 => state.active |= value,
            offset::CI if state.command & CMD_START != 0 => state.issued |= value,
            _ => {}
        }
        if matches!(register, offset::IS | offset::IE) {
            self.raise(&state);
        }
    }

    /// Writes PxCMD but for its start bit. Returns whether commands are to be taken.
    pub fn write_command(&self, value: u32) -> bool {
        let mut state = self.lock();
        state.command = state.command & !CMD_STORED | value & CMD_STORED;
        if value & CMD_OVERRIDE != 0 {
            state.task_file &= !u32::from(BSY | DRQ);
        }
        value & CMD_START != 0
    }

    /// Whether commands are to be taken, and there is a link to a drive.
    pub fn may_run(&self) -> bool {
        let state = self.lock();
        state.is_started() && self.link(&state) == LINK_UP
    }

    /// Notes that commands are taken from now on.
    pub fn start(&self) {
        self.lock().command |= CMD_START;
    }

    /// Notes that none is taken any more, and forgets those that were issued. The port's thread is
    /// gone by now.
    pub fn stop(&self) {
        self.lock().stop();
    }

    /// Writes PxSCTL. The port is stopped by now if [`Registers::unlinks`] said so.
    pub fn write_control(&self, value: u32) {
        let mut state = self.lock();
        let before = state.control & DETECT;
        state.control = value & SCTL_BITS;
        let after = state.control & DETECT;
        if before == after || self.signature.is_none() {
            return;
        }
        if after == 0 {
            state.link_up(self.signature);
            state.errors |= SERR_EXCHANGED;
            self.post_signature(&mut state);
            self.raise(&state);
        } else {
            state.signature = u32::MAX;
            state.task_file = NO_DRIVE;
        }
    }

    /// Whether a value of PxSCTL takes the link down.
    pub fn unlinks(value: u32) -> bool {
        value & DETECT != 0
    }

    /// Returns to the state after power-on, but keeps the addresses if it is only the adapter that
    /// is reset (10.4.3).
    pub fn reset(&self, keep_addresses: bool) {
        let mut state = self.lock();
        let addresses = (state.command_list, state.received_fis);
        *state = PortState::new(self.signature);
        if keep_addresses {
            (state.command_list, state.received_fis) = addresses;
        }
    }

    /// Tells that the drive was reset.
    pub fn post_signature(&self, state: &mut PortState) {
        let Some(signature) = self.signature else {
            return;
        };
        state.signature = signature;
        let registers = TaskFile::signature(signature);
        // Nobody asked for it, so it comes without an interrupt.
        self.post(state, registers, TO_HOST_AT, &registers.to_host(), 0);
    }

    /// Tells of a command that is done or has failed.
    pub fn post_registers(&self, state: &mut PortState, registers: TaskFile) {
        let fis = registers.to_host();
        self.post(state, registers, TO_HOST_AT, &fis, IS_REGISTERS);
    }

    /// Tells of a command that is done with its last data.
    pub fn post_pio_setup(&self, state: &mut PortState, registers: TaskFile) {
        let fis = registers.pio_setup();
        self.post(state, registers, PIO_SETUP_AT, &fis, IS_PIO_SETUP);
    }

    /// Tells of queued commands.
    pub fn post_device_bits(&self, state: &mut PortState, fis: &[u8; 8]) {
        state.task_file = u32::from(u16::from_le_bytes([fis[2], fis[3]]));
        self.receive(state, DEVICE_BITS_AT, fis);
        self.interrupt(state, IS_DEVICE_BITS);
    }

    fn post(&self, state: &mut PortState, registers: TaskFile, at: u64, fis: &[u8], cause: u32) {
        state.task_file = u32::from(u16::from_le_bytes([registers.status, registers.error]));
        self.receive(state, at, fis);
        let failed = if registers.is_error() {
            IS_TASK_FILE
        } else {
            0
        };
        self.interrupt(state, cause | failed);
    }

    fn receive(&self, state: &PortState, at: u64, fis: &[u8]) {
        if state.command & CMD_RECEIVE != 0
            && let Some(address) = state.received_fis.checked_add(at)
        {
            // Where there is no memory nobody looks.
            let _ = self.memory.write_slice(fis, GuestAddress(address));
        }
    }

    /// Sets bits of PxIS.
    pub fn interrupt(&self, state: &mut PortState, causes: u32) {
        state.interrupts |= causes;
        if causes & state.enabled != 0 {
            self.interrupts.raise(self.port);
        }
    }

    /// Raises the interrupt that the registers ask for, if any.
    pub fn raise(&self, state: &PortState) {
        if state.interrupts() & state.enabled != 0 {
            self.interrupts.raise(self.port);
        }
    }

    /// Takes up a saved state, but for the drive's.
    ///
    /// # Errors
    /// Refuses what no driver could have set.
    pub fn restore(&self, saved: &PortState) -> Result<(), StateError> {
        let addresses = saved.command_list & 0x3ff == 0 && saved.received_fis & 0xff == 0;
        ensure(addresses, "address of a SATA port", saved.command_list)?;
        let bits = CMD_POWERED | CMD_START | CMD_STORED | 0x1f << CMD_CURRENT_SHIFT;
        let command = saved.command;
        let possible = command & !bits == 0 && command & CMD_POWERED == CMD_POWERED;
        ensure(possible, "command register of a SATA port", command)?;
        let idle = command & CMD_START != 0 || saved.issued | saved.active == 0;
        ensure(idle, "commands of a stopped SATA port", saved.issued)?;
        let shown = saved.interrupts | saved.enabled;
        ensure(shown & !IS_BITS == 0, "interrupts of a SATA port", shown)?;
        ensure(
            saved.errors & !SERR_BITS == 0,
            "errors of a SATA port",
            saved.errors,
        )?;
        ensure(
            saved.control & !SCTL_BITS == 0,
            "control of a SATA port",
            saved.control,
        )?;
        let registers = saved.task_file;
        ensure(registers <= 0xffff, "registers of a SATA drive", registers)?;
        let signature = saved.signature;
        let known = signature == u32::MAX || self.signature == Some(signature);
        ensure(known, "signature of a SATA drive", signature)?;
        *self.lock() = PortState {
            drive: None,
            ..saved.clone()
        };
        Ok(())
    }
}

impl PortState {
    /// After power-on, with a drive of this signature or none.
    fn new(signature: Option<u32>) -> Self {
        let mut state = Self {
            command_list: 0,
            received_fis: 0,
            interrupts: 0,
            enabled: 0,
            command: CMD_POWERED,
            task_file: NO_DRIVE,
            signature: u32::MAX,
            control: 0,
            errors: 0,
            active: 0,
            issued: 0,
            faulted: false,
            in_reset: false,
            drive: None,
        };
        state.link_up(signature);
        state
    }

    fn link_up(&mut self, signature: Option<u32>) {
        let Some(signature) = signature else {
            return;
        };
        let registers = TaskFile::signature(signature);
        self.signature = signature;
        self.task_file = u32::from(u16::from_le_bytes([registers.status, registers.error]));
        self.in_reset = false;
    }

    fn stop(&mut self) {
        self.command &= !(CMD_START | 0x1f << CMD_CURRENT_SHIFT);
        self.issued = 0;
        self.active = 0;
        self.faulted = false;
    }

    /// Notes that these commands are done.
    pub fn take_back(&mut self, commands: u32) {
        self.issued &= !commands;
        self.active &= !commands;
    }

    /// Whether commands are taken.
    pub fn is_started(&self) -> bool {
        self.command & CMD_START != 0
    }

    /// PxIS.
    fn interrupts(&self) -> u32 {
        let connect = if self.errors & SERR_EXCHANGED != 0 {
            IS_CONNECT
        } else {
            0
        };
        self.interrupts & !IS_CONNECT | connect
    }

    /// PxCMD.
    fn command(&self) -> u32 {
        let mut command = self.command;
        if command & CMD_RECEIVE != 0 {
            command |= CMD_RECEIVING;
        }
        if command & CMD_START != 0 {
            command |= CMD_RUNNING;
        }
        command
    }

    /// Notes which command was begun last.
    pub fn set_current(&mut self, slot: usize) {
        let slot = u32::try_from(slot & 0x1f).unwrap_or(0);
        self.command = self.command & !(0x1f << CMD_CURRENT_SHIFT) | slot << CMD_CURRENT_SHIFT;
    }

    /// Notes that the drive is busy with a reset.
    pub fn set_busy(&mut self) {
        self.task_file = u32::from(BSY);
    }
}
