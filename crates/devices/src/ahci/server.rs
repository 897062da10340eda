//! Serving the commands of one port.
//!
//! Queued commands are done side by side; any other is done alone. What is done is told as soon as
//! it is, but of the queue all that ends within a moment is told at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use edgevmm_block::BlockError;
use edgevmm_block::engine::{Ending, Operation, Request};
use vmm_sys_util::eventfd::EventFd;

use super::command::{Fetched, MAX_PIECES, SLOTS};
use super::drive::{Action, Drive, Protocol, SCRATCH_LEN};
use super::fis::{self, ABORTED, READY, TaskFile};
use super::registers::{IS_HOST_FATAL, IS_OVERFLOW, IS_PROCESSED, IS_TASK_FILE, Registers};
use crate::GuestMemory;
use crate::disk::jobs::{Jobs, Next};
use crate::virtio::buffers::Buffers;

/// Commands that are begun before a look at those that have ended.
const BATCH: usize = 64;

/// A queued command that is done may wait this long for others, to be told of together.
const GATHER: Duration = Duration::from_micros(30);

/// Control register: the drive is reset.
const SOFT_RESET: u8 = 1 << 2;

/// A command that was begun.
#[derive(Debug)]
struct Slot {
    command: Fetched,
    fis: fis::Command,
    buffers: Buffers,
    protocol: Protocol,
    /// A piece of its memory asks for an interrupt.
    processed: bool,
    /// Of a TRIM: the next entry, and whether it is made durable.
    trim: Option<(usize, bool)>,
}

/// Serves one port.
#[derive(Debug)]
pub struct Server {
    // Goes first: it waits for requests that use the slots' memory.
    jobs: Jobs,
    drive: Arc<Drive>,
    registers: Arc<Registers>,
    memory: Arc<GuestMemory>,
    halt: Arc<AtomicBool>,
    slots: Vec<Slot>,
    /// Commands that were begun and have not ended, a bit each.
    begun: u32,
    /// Whether those are queued.
    queued: bool,
    /// Queued commands that have ended and were not told.
    done: u32,
    done_since: Option<Instant>,
    /// Where to look first for the next command.
    turn: usize,
    /// Data of a command that is not queued.
    scratch: [u8; SCRATCH_LEN],
}

impl Server {
    /// A server for the calling thread, to be woken by `wake` when something has changed, and to
    /// end when `halt` is set.
    ///
    /// # Errors
    /// There are no more files to be had.
    pub fn new(
        drive: Arc<Drive>,
        registers: Arc<Registers>,
        memory: Arc<GuestMemory>,
        wake: &EventFd,
        halt: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let jobs = Jobs::new(drive.terms(&memory), &[wake], Arc::clone(&halt))?;
        let slot = || Slot {
            command: Fetched::default(),
            fis: fis::Command::default(),
            buffers: Buffers::growing(Arc::clone(&memory), MAX_PIECES),
            protocol: Protocol::Plain,
            processed: false,
            trim: None,
        };
        Ok(Self {
            jobs,
            slots: std::iter::repeat_with(slot).take(SLOTS).collect(),
            drive,
            registers,
            memory,
            halt,
            begun: 0,
            queued: false,
            done: 0,
            done_since: None,
            turn: 0,
            scratch: [0; SCRATCH_LEN],
        })
    }

    /// Serves until it is halted, and returns when nothing is in flight. Commands that were begun
    /// and not done are still issued.
    pub fn run(mut self) {
        while !self.halted() {
            while let Some((slot, ending)) = self.jobs.ended() {
                self.end(slot, ending);
            }
            self.tell();
            for slot in self.jobs.take_retries() {
                self.begun &= !bit(slot);
            }
            let next = self.take();
            self.tell();
            if let Err(error) = self.jobs.wait(next) {
                let device = self.drive.name();
                tracing::error!(device, %error, "Cannot wait for disk requests; the port stops");
                break;
            }
        }
        self.drain();
    }

    fn halted(&self) -> bool {
        self.halt.load(Ordering::Acquire)
    }

    fn drain(&mut self) {
        while self.jobs.is_busy() {
            if let Some((slot, ending)) = self.jobs.ended() {
                self.end(slot, ending);
            } else if let Err(error) = self.jobs.wait(Next::Event) {
                tracing::error!(%error, "Cannot wait for the last disk requests");
                std::thread::sleep(GATHER);
            }
        }
        self.tell();
    }

    /// Begins what the driver has issued, as far as that may be.
    fn take(&mut self) -> Next {
        for _ in 0..BATCH {
            if self.halted() || !self.jobs.has_room() {
                return Next::Event;
            }
            let Some((slot, list)) = self.next_command() else {
                return Next::Event;
            };
            if let Err(wait) = self.start(slot, list) {
                return wait;
            }
            self.turn = (slot + 1) % SLOTS;
            if self
                .done_since
                .is_some_and(|since| since.elapsed() >= GATHER)
            {
                self.tell();
            }
        }
        Next::Now
    }

    /// A command that may begin now, unless it is of another kind than those under way, and where
    /// the command list is.
    fn next_command(&self) -> Option<(usize, u64)> {
        let state = self.registers.lock();
        if state.faulted || !state.is_started() {
            return None;
        }
        let waiting = state.issued & !self.begun & !self.done;
        let may = if self.begun == 0 || self.queued {
            waiting
        } else {
            0
        };
        let slot = (self.turn..SLOTS)
            .chain(0..self.turn)
            .find(|slot| may & bit(*slot) != 0)?;
        Some((slot, state.command_list))
    }

    /// Begins a command.
    ///
    /// # Errors
    /// What it has to wait for before it may.
    fn start(&mut self, index: usize, list: u64) -> Result<(), Next> {
        let Ok(command) = Fetched::read(&self.memory, list, index) else {
            self.host_error();
            return Ok(());
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let fis = command.fis.unwrap_or_default();
        let known = command.fis.is_some();
        // PxSACT does not tell: SeaBIOS sets it for every command.
        let queued = known && self.drive.is_queued(&fis);
        if self.begun != 0 && !queued {
            return Err(Next::Event);
        }
        slot.command = command;
        slot.fis = fis;
        slot.buffers.clear();
        slot.protocol = if queued {
            Protocol::Queued
        } else {
            Protocol::Plain
        };
        slot.processed = false;
        slot.trim = None;
        if known && !fis.is_command {
            self.control(index, &command, &fis);
            return Ok(());
        }
        let tagged = !queued || usize::from(fis.count >> 3) & 0x1f == index;
        let action = if known && tagged {
            self.drive.command(&fis, &command.packet, &mut self.scratch)
        } else {
            Action::failed(&fis, ABORTED)
        };
        if let Action::Disk { request, .. } = &action {
            self.jobs.admit(request).map_err(Next::After)?;
        }
        self.begun |= bit(index);
        self.queued = queued;
        self.registers.lock().set_current(index);
        match action {
            Action::Done(registers) => self.complete(index, registers),
            Action::Reply { len, protocol } => self.reply(index, len, protocol),
            Action::Disk {
                request,
                durable,
                protocol,
            } => self.begin(index, request, durable, protocol),
            Action::Trim { durable } => self.trim(index, durable),
        }
        Ok(())
    }

    /// Has the command's memory gathered up to `wanted` bytes. Returns how many there are; none if
    /// that has failed, which is told then.
    fn gather(&mut self, index: usize, wanted: u64) -> Option<u64> {
        let slot = self.slots.get_mut(index)?;
        match slot.command.gather(&self.memory, wanted, &mut slot.buffers) {
            Ok(processed) => {
                slot.processed = processed;
                Some(slot.buffers.bytes())
            }
            Err(_) => {
                self.host_error();
                None
            }
        }
    }

    /// Gives the host what the drive has made.
    fn reply(&mut self, index: usize, len: usize, protocol: Protocol) {
        let Some(room) = self.gather(index, len as u64) else {
            return;
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.protocol = protocol;
        let copied = slot
            .buffers
            .copy_in(self.scratch.get(..len).unwrap_or_default());
        slot.command.set_transferred(&self.memory, copied as u64);
        if room < len as u64 {
            let mut state = self.registers.lock();
            self.registers.interrupt(&mut state, IS_OVERFLOW);
        }
        self.succeed(index);
    }

    /// Has the disk do it.
    fn begin(&mut self, index: usize, request: Request, durable: bool, protocol: Protocol) {
        if matches!(request.operation, Operation::Read | Operation::Write) {
            match self.gather(index, request.len) {
                None => return,
                Some(room) if room < request.len => return self.overflow(index),
                Some(_) => {}
            }
        }
        let more = self.next_command().is_some();
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.protocol = protocol;
        let memory = slot.buffers.slices();
        // SAFETY: it is guest memory, which `memory` keeps mapped until the engine is gone.
        let ended = unsafe { self.jobs.begin(index, request, durable, memory, more) };
        if let Some(result) = ended {
            self.take_result(index, &result);
        }
    }

    /// The driver has given a command less memory than it needs.
    fn overflow(&mut self, index: usize) {
        let mut state = self.registers.lock();
        self.registers.interrupt(&mut state, IS_OVERFLOW);
        drop(state);
        if let Some(slot) = self.slots.get(index) {
            let failed = TaskFile::failed(&slot.fis, ABORTED);
            self.complete(index, failed);
        }
    }

    fn trim(&mut self, index: usize, durable: bool) {
        match self.gather(index, SCRATCH_LEN as u64) {
            None => return,
            Some(room) if room < SCRATCH_LEN as u64 => return self.overflow(index),
            Some(_) => {}
        }
        if let Some(slot) = self.slots.get_mut(index) {
            slot.buffers.copy_out(&mut self.scratch);
            slot.command
                .set_transferred(&self.memory, SCRATCH_LEN as u64);
            slot.buffers.clear();
            slot.trim = Some((0, durable));
            self.trim_on(index);
        }
    }

    /// Begins the next range of a TRIM, or ends it.
    fn trim_on(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let Some((next, durable)) = &mut slot.trim else {
            return self.succeed(index);
        };
        let durable = *durable;
        match self.drive.next_trim(&self.scratch, next) {
            Ok(Some(request)) => self.begin(index, request, durable, Protocol::Plain),
            Ok(None) => self.succeed(index),
            Err(error) => {
                let failed = TaskFile::failed(&slot.fis, error);
                self.complete(index, failed);
            }
        }
    }

    /// Takes up how the disk's part of a command has ended.
    fn end(&mut self, index: usize, ending: Ending) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        if let Some(result) = self.jobs.finish(index, ending, slot.buffers.slices()) {
            self.take_result(index, &result);
        }
    }

    fn take_result(&mut self, index: usize, result: &Result<(), BlockError>) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        match result {
            Err(error) => {
                let failed = self.drive.failed(&slot.fis, error);
                self.complete(index, failed);
            }
            Ok(()) if slot.trim.is_some() => self.trim_on(index),
            Ok(()) => {
                if slot.protocol != Protocol::Queued {
                    let bytes = slot.buffers.bytes();
                    slot.command.set_transferred(&self.memory, bytes);
                }
                self.succeed(index);
            }
        }
    }

    fn succeed(&mut self, index: usize) {
        if let Some(slot) = self.slots.get(index) {
            self.complete(index, self.drive.good(&slot.fis));
        }
    }

    /// Ends a command.
    fn complete(&mut self, index: usize, registers: TaskFile) {
        self.begun &= !bit(index);
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let (protocol, processed) = (slot.protocol, slot.processed);
        if registers.is_error() {
            return self.fail(index, registers);
        }
        if protocol == Protocol::Queued {
            self.done |= bit(index);
            self.done_since.get_or_insert_with(Instant::now);
        }
        let mut state = self.registers.lock();
        if state.faulted {
            return;
        }
        if processed {
            self.registers.interrupt(&mut state, IS_PROCESSED);
        }
        match protocol {
            Protocol::Queued => {}
            Protocol::Plain => {
                state.take_back(bit(index));
                self.registers.post_registers(&mut state, registers);
            }
            Protocol::PioIn => {
                state.take_back(bit(index));
                self.registers.post_pio_setup(&mut state, registers);
            }
        }
    }

    /// Ends a command with an error. The driver has to stop and start the port after it.
    fn fail(&mut self, index: usize, registers: TaskFile) {
        self.tell();
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let mut state = self.registers.lock();
        if std::mem::replace(&mut state.faulted, true) {
            return;
        }
        if slot.protocol == Protocol::Queued {
            self.drive.note_queued_error(&slot.fis, registers.error);
            let fis = fis::set_device_bits(registers.status, registers.error, 0);
            self.registers.post_device_bits(&mut state, &fis);
            self.registers.interrupt(&mut state, IS_TASK_FILE);
        } else {
            self.registers.post_registers(&mut state, registers);
        }
    }

    /// A structure of the driver's is not in memory.
    fn host_error(&mut self) {
        self.tell();
        let mut state = self.registers.lock();
        state.faulted = true;
        self.registers.interrupt(&mut state, IS_HOST_FATAL);
    }

    /// The driver writes the control register, which is about resets.
    fn control(&self, index: usize, command: &Fetched, fis: &fis::Command) {
        let mut state = self.registers.lock();
        state.take_back(bit(index));
        if fis.control & SOFT_RESET != 0 {
            state.in_reset = true;
            if !command.clear_busy {
                state.set_busy();
            }
        } else if std::mem::take(&mut state.in_reset) {
            self.registers.post_signature(&mut state);
        }
    }

    /// Tells the driver of the queued commands that are done.
    fn tell(&mut self) {
        self.done_since = None;
        let done = std::mem::take(&mut self.done);
        if done == 0 {
            return;
        }
        let mut state = self.registers.lock();
        if !state.faulted {
            state.take_back(done);
            let fis = fis::set_device_bits(READY, 0, done);
            self.registers.post_device_bits(&mut state, &fis);
        }
    }
}

/// The bit of a command in PxCI and PxSACT.
fn bit(slot: usize) -> u32 {
    u32::try_from(slot)
        .ok()
        .and_then(|slot| 1_u32.checked_shl(slot))
        .unwrap_or(0)
}
