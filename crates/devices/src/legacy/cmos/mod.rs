//! Motorola MC146818 real-time clock with 128 bytes of battery-backed memory, ports 0x70/0x71.
//!
//! The clock shows the host's UTC plus an offset that changes when the guest sets the time. BCD
//! and binary, 12 and 24 hours, the century at 0x32, alarm, update and periodic interrupts all
//! work as in the data sheet. Left out: daylight saving, the square-wave output, the divider's
//! stop bits (SET stops the clock's registers) and the NMI mask in the index port (there is no
//! NMI source); alarms on a day or month, which the FADT doesn't announce.
//!
//! Interrupts come from one timer on the shared device thread that runs only while the guest has
//! one enabled and acknowledged, so a guest can't make the host tick faster than it reads.

mod calendar;
mod registers;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use self::calendar::DateTime;
use self::registers::{
    ALARM_HOUR, ALARM_MINUTE, ALARM_SECOND, Cells, FLAG_ALARM, FLAG_IRQ, FLAG_PERIODIC,
    FLAG_UPDATE, MODE_SET, MODE_UPDATE_IRQ, REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D,
    UPDATE_IN_PROGRESS, VALID_RAM_AND_TIME, is_time,
};
use super::clock::Clock;
use crate::bus::{BusDevice, Shared, lock};
use crate::platform::IrqLine;
use crate::state::{StateError, ensure};

/// Length of the port range.
pub const PORT_RANGE: u64 = 2;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Time before an update in which UIP shows, by the data sheet.
const UPDATE_WARNING_NANOS: u32 = 244_000;
/// The host's clock may be stepped, so a far deadline is looked at again after this.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What a [`Cmos`] is connected to.
#[derive(Debug, Clone)]
pub struct CmosConfig {
    /// The host's wall clock.
    pub clock: Arc<dyn Clock>,
    /// Interrupt line 8.
    pub irq: Arc<dyn IrqLine>,
    /// What firmware reads of the machine.
    pub machine: CmosMachine,
}

/// The machine's size as the memory cells tell it to firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CmosMachine {
    /// Bytes of RAM below 4 GiB.
    pub low_ram: u64,
    /// Bytes of RAM from 4 GiB on.
    pub high_ram: u64,
    /// vCPUs at power-on.
    pub cpus: u8,
}

/// State of a [`Cmos`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    index: u8,
    cells: Vec<u8>,
    /// Seconds that the guest's clock is ahead of the host's.
    offset: i64,
    /// Host time up to which events have become flags.
    evaluated: Duration,
}

/// The real-time clock and its memory.
#[derive(Debug)]
pub struct Cmos {
    config: CmosConfig,
    timer: TimerFd,
    index: u8,
    cells: Cells,
    offset: i64,
    evaluated: Duration,
}

impl Cmos {
    /// A clock that shows the host's time.
    ///
    /// # Errors
    /// Fails when the process may open no more files.
    pub fn new(config: CmosConfig) -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            index: 0,
            cells: Cells::new(config.machine),
            offset: 0,
            evaluated: config.clock.now(),
            config,
        })
    }

    /// Takes up a saved state: the clock went on with the host's clock meanwhile.
    ///
    /// # Errors
    /// Refuses a state that no chip gets into.
    pub fn restore(&mut self, state: &CmosState) -> Result<(), StateError> {
        ensure(state.index <= 0x7f, "CMOS index", state.index)?;
        let cells = Cells::restore(&state.cells);
        let number = state.cells.len();
        self.cells = cells.ok_or(StateError::Impossible {
            what: "number of CMOS cells",
            saved: number as u64,
        })?;
        self.index = state.index;
        self.offset = state.offset;
        self.evaluated = state.evaluated;
        let waits = self.cells.has_flag(FLAG_IRQ);
        self.config.irq.set_level(waits);
        self.tick();
        Ok(())
    }

    /// The state to go on from.
    pub fn state(&self) -> CmosState {
        CmosState {
            index: self.index,
            cells: self.cells.to_vec(),
            offset: self.offset,
            evaluated: self.evaluated,
        }
    }

    /// Disables and drops interrupts, as the chip's reset pin does. Time and memory stay.
    pub fn reset(&mut self) {
        self.index = 0;
        self.cells.reset();
        self.config.irq.set_level(false);
        self.arm();
    }

    /// The handler to put on the device thread, which brings the clock's interrupts.
    pub fn handler(cmos: &Shared<Self>) -> CmosTimer {
        CmosTimer {
            fd: lock(cmos).timer.as_raw_fd(),
            cmos: Arc::clone(cmos),
        }
    }

    /// Turns what has happened until now into flags and an interrupt, and waits for the next.
    fn tick(&mut self) {
        let now = self.config.clock.now();
        self.evaluate(now);
        self.raise();
        self.arm();
    }

    fn rtc_seconds(&self, host: Duration) -> i64 {
        let host = i64::try_from(host.as_secs()).unwrap_or(i64::MAX);
        host.saturating_add(self.offset)
    }

    fn evaluate(&mut self, now: Duration) {
        let last = std::mem::replace(&mut self.evaluated, now);
        if now <= last {
            return;
        }
        let mut flags = 0;
        if !self.cells.has_mode(MODE_SET) {
            let (from, to) = (self.rtc_seconds(last), self.rtc_seconds(now));
            if to > from {
                flags |= FLAG_UPDATE;
            }
            if self.cells.next_alarm(from).is_some_and(|alarm| alarm <= to) {
                flags |= FLAG_ALARM;
            }
        }
        if let Some(period) = self.cells.period_nanos()
            && now.as_nanos() / period != last.as_nanos() / period
        {
            flags |= FLAG_PERIODIC;
        }
        self.cells.add_flags(flags);
    }

    /// Interrupts the guest when an enabled flag is up.
    fn raise(&mut self) {
        if self.cells.pending_enabled() {
            self.cells.add_flags(FLAG_IRQ);
            self.config.irq.set_level(true);
        }
    }

    /// Sets the timer for the next interrupt. Also takes back an expiry nobody has seen yet.
    fn arm(&mut self) {
        let now = self.config.clock.now();
        let result = match self.deadline(now) {
            // A timer set to zero would be off.
            Some(at) => {
                let wait = at
                    .saturating_sub(now)
                    .clamp(Duration::from_nanos(1), LONGEST_WAIT);
                self.timer.reset(wait, None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "The clock chip's timer can't be set");
        }
    }

    /// Host time of the next interrupt; `None` while none is enabled or one is unacknowledged.
    fn deadline(&self, now: Duration) -> Option<Duration> {
        if self.cells.has_flag(FLAG_IRQ) {
            return None;
        }
        let enabled = self.cells.enabled_interrupts();
        let running = !self.cells.has_mode(MODE_SET);
        let mut deadlines = [None; 3];
        if enabled & FLAG_UPDATE != 0 && running {
            deadlines[0] = now.as_secs().checked_add(1).map(Duration::from_secs);
        }
        if enabled & FLAG_ALARM != 0 && running {
            deadlines[1] = self
                .cells
                .next_alarm(self.rtc_seconds(now))
                .and_then(|at| u64::try_from(at.saturating_sub(self.offset)).ok())
                .map(Duration::from_secs);
        }
        if enabled & FLAG_PERIODIC != 0 {
            deadlines[2] = self.cells.period_nanos().map(|period| {
                let left = period - now.as_nanos() % period;
                now.saturating_add(Duration::from_nanos(
                    u64::try_from(left).unwrap_or(u64::MAX),
                ))
            });
        }
        deadlines.into_iter().flatten().min()
    }

    fn shown(&self) -> DateTime {
        DateTime::from_unix(self.rtc_seconds(self.config.clock.now()))
    }

    fn update_in_progress(&self) -> bool {
        let nanos = self.config.clock.now().subsec_nanos();
        !self.cells.has_mode(MODE_SET) && nanos >= 1_000_000_000 - UPDATE_WARNING_NANOS
    }

    fn read_cell(&mut self) -> u8 {
        match self.index {
            index if is_time(index) => {
                if !self.cells.has_mode(MODE_SET) {
                    let shown = self.shown();
                    self.cells.show(shown);
                }
                self.cells.get(index)
            }
            REGISTER_A if self.update_in_progress() => {
                self.cells.get(REGISTER_A) | UPDATE_IN_PROGRESS
            }
            REGISTER_C => {
                self.evaluate(self.config.clock.now());
                self.raise();
                let flags = self.cells.take_flags();
                self.config.irq.set_level(false);
                self.arm();
                flags
            }
            REGISTER_D => VALID_RAM_AND_TIME,
            index => self.cells.get(index),
        }
    }

    fn write_cell(&mut self, byte: u8) {
        match self.index {
            index if is_time(index) => {
                if self.cells.has_mode(MODE_SET) {
                    self.cells.set(index, byte);
                } else {
                    let shown = self.shown();
                    self.cells.show(shown);
                    self.cells.set(index, byte);
                    self.adopt_time();
                }
            }
            index @ (ALARM_SECOND | ALARM_MINUTE | ALARM_HOUR) => {
                self.evaluate(self.config.clock.now());
                self.cells.set(index, byte);
                self.arm();
            }
            REGISTER_A => {
                self.evaluate(self.config.clock.now());
                self.cells.set(REGISTER_A, byte & !UPDATE_IN_PROGRESS);
                self.arm();
            }
            REGISTER_B => self.write_mode(byte),
            REGISTER_C | REGISTER_D => {}
            index => self.cells.set(index, byte),
        }
    }

    fn write_mode(&mut self, mut mode: u8) {
        self.evaluate(self.config.clock.now());
        let was_set = self.cells.has_mode(MODE_SET);
        let is_set = mode & MODE_SET != 0;
        if is_set {
            mode &= !MODE_UPDATE_IRQ;
        }
        if is_set && !was_set {
            let shown = self.shown();
            self.cells.show(shown);
        }
        self.cells.set(REGISTER_B, mode);
        if was_set && !is_set {
            self.adopt_time();
        }
        self.raise();
        self.arm();
    }

    /// Makes the registers' time the guest's time from now on.
    fn adopt_time(&mut self) {
        let now = self.config.clock.now();
        self.evaluate(now);
        let host = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        self.offset = self.cells.time().to_unix().saturating_sub(host);
        self.arm();
    }
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index port can't be read.
        if let (DATA, [byte]) = (offset, data) {
            *byte = self.read_cell();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (INDEX, [byte]) => self.index = byte & 0x7f,
            (DATA, [byte]) => self.write_cell(*byte),
            _ => {}
        }
    }
}

/// Brings a [`Cmos`]' interrupts from the device thread.
#[derive(Debug)]
pub struct CmosTimer {
    cmos: Shared<Cmos>,
    /// The timer, which lives as long as `cmos`.
    fd: RawFd,
}

/// Its descriptor only wakes the handler; re-arming under the lock takes the expiry back, so a
/// vCPU that re-arms between wake-up and lock leaves nothing to wait for.
impl MutEventSubscriber for CmosTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        lock(&self.cmos).tick();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.fd, EventSet::IN)) {
            tracing::error!(%error, "The clock chip's interrupts can't be served");
        }
    }
}
