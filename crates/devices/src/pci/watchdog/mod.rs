//! The watchdog timer of Intel's 6300ESB I/O controller hub (document 300641, chapter 15), which
//! drivers of every system know and libvirt calls `i6300esb`.
//!
//! Two stages count down one after the other; when the second ends, the machine's owner has said
//! what to do. Registers are written after unlocking each write. Left out: the interrupt at the end
//! of the first stage, free-running mode, and the output pin but for the bit that disables it.
//!
//! The time stands still while the machine is paused. The timer runs on the shared device thread,
//! and only while the guest has it enabled. That thread may take the watchdog's lock, as nobody
//! waits for the thread while holding it.

#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::config_space::{ConfigSpace, ConfigSpaceBuilder, ConfigSpaceState, Identity};
use super::{DecodedBars, PciError, PciFunction, PciSlot};
use crate::bus::{Shared, lock};
use crate::legacy::clock::Clock;
use crate::platform::{MachineControl, MachineRequest};
use crate::state::{StateError, ensure};

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x08_8000,
    revision: 0,
};

/// Length of the registers' BAR in bytes.
pub const BAR_LEN: u32 = 16;

/// Configuration space: interrupt type, prescaler, disabled output.
const CONFIG: u16 = 0x60;
const CONFIG_FAST: u8 = 1 << 2;
const CONFIG_NO_OUTPUT: u8 = 1 << 5;
/// Configuration space: lock, enable, free-running mode.
const CONTROL: u16 = 0x68;
const CONTROL_LOCK: u8 = 1 << 0;
const CONTROL_ENABLE: u8 = 1 << 1;
const CONTROL_FREE_RUNNING: u8 = 1 << 2;
const CONTROL_BITS: u8 = CONTROL_LOCK | CONTROL_ENABLE | CONTROL_FREE_RUNNING;

/// Registers.
const TIMER1: u64 = 0x00;
const TIMER2: u64 = 0x04;
const RELOAD: u64 = 0x0c;
/// What is written to the last to allow one more write.
const UNLOCK: [u16; 2] = [0x80, 0x86];
const RELOAD_NOW: u16 = 1 << 8;
const TIMED_OUT: u16 = 1 << 9;

/// Counters have 20 bits.
const COUNT_MAX: u32 = 0xf_ffff;
/// A count in periods of the 33 MHz bus clock, as a power of two: of about a millisecond, and of
/// about a microsecond.
const SLOW_SHIFT: u32 = 15;
const FAST_SHIFT: u32 = 5;
const BUS_HERTZ: u64 = 33_000_000;

/// What a [`Watchdog`] is connected to.
#[derive(Debug)]
pub struct WatchdogConfig {
    /// Its place on the bus.
    pub slot: PciSlot,
    /// Where its registers are at power-on; the firmware places them when absent.
    pub bar_address: Option<u32>,
    /// Where it tells that it has run out.
    pub control: Arc<dyn MachineControl>,
    /// A clock that is never set.
    pub clock: Arc<dyn Clock>,
}

/// State of a [`Watchdog`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    config_space: ConfigSpaceState,
    timers: [u32; 2],
    config: u8,
    control: u8,
    /// How many of the words that unlock a write have come.
    unlocked: u8,
    timed_out: bool,
    /// Time until it runs out, if it runs.
    left: Option<Duration>,
}

/// The watchdog.
#[derive(Debug)]
pub struct Watchdog {
    config_space: ConfigSpace,
    platform: Arc<dyn MachineControl>,
    clock: Arc<dyn Clock>,
    timer: TimerFd,
    timers: [u32; 2],
    config: u8,
    control: u8,
    unlocked: u8,
    timed_out: bool,
    countdown: Countdown,
}

/// The time until it runs out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Countdown {
    Off,
    Until(Duration),
    /// The machine is paused.
    Held(Duration),
}

impl Watchdog {
    /// A watchdog that sleeps.
    ///
    /// # Errors
    /// There are no more files to be had, or its registers can't be at that address.
    pub fn new(config: WatchdogConfig) -> Result<Self, PciError> {
        let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
        builder.memory_bar(0, BAR_LEN, config.bar_address.unwrap_or(0))?;
        builder.writable(register(CONFIG), 0xff);
        builder.writable(register(CONTROL), CONTROL_BITS.into());
        Ok(Self {
            config_space: builder.build(config.slot),
            platform: config.control,
            clock: config.clock,
            timer: TimerFd::new().map_err(|error| PciError::Timer(error.into()))?,
            timers: [COUNT_MAX; 2],
            config: 0,
            control: 0,
            unlocked: 0,
            timed_out: false,
            countdown: Countdown::Off,
        })
    }

    /// The handler to put on the device thread, which brings the end of the time.
    pub fn handler(watchdog: &Shared<Self>) -> WatchdogTimer {
        WatchdogTimer {
            fd: lock(watchdog).timer.as_raw_fd(),
            watchdog: Arc::clone(watchdog),
        }
    }

    /// Has the time stand still.
    pub fn hold(&mut self) {
        if let Countdown::Until(end) = self.countdown {
            let left = end.saturating_sub(self.clock.now());
            self.set(Countdown::Held(left));
        }
    }

    /// Lets the time go on.
    pub fn release(&mut self) {
        if let Countdown::Held(left) = self.countdown {
            self.set(Countdown::Until(self.clock.now() + left));
        }
    }

    /// The state to go on from.
    pub fn state(&self) -> WatchdogState {
        WatchdogState {
            config_space: self.config_space.state(),
            timers: self.timers,
            config: self.config,
            control: self.control,
            unlocked: self.unlocked,
            timed_out: self.timed_out,
            left: match self.countdown {
                Countdown::Off => None,
                Countdown::Until(end) => Some(end.saturating_sub(self.clock.now())),
                Countdown::Held(left) => Some(left),
            },
        }
    }

    /// Takes up a saved state. The time stands still until it is released.
    ///
    /// # Errors
    /// Refuses a state that no watchdog gets into.
    pub fn restore(&mut self, state: &WatchdogState) -> Result<(), StateError> {
        for count in state.timers {
            ensure(count <= COUNT_MAX, "watchdog count", count)?;
        }
        ensure(state.unlocked <= 2, "watchdog lock", state.unlocked)?;
        let longest = 2 * duration(COUNT_MAX, SLOW_SHIFT);
        let left = state.left.unwrap_or_default();
        ensure(left <= longest, "watchdog time in seconds", left.as_secs())?;
        let runs = state.control & CONTROL_ENABLE != 0;
        ensure(
            runs || state.left.is_none(),
            "watchdog control",
            state.control,
        )?;
        self.config_space.restore(&state.config_space)?;
        self.timers = state.timers;
        self.config = state.config;
        self.control = state.control;
        self.unlocked = state.unlocked;
        self.timed_out = state.timed_out;
        self.set(state.left.map_or(Countdown::Off, Countdown::Held));
        Ok(())
    }

    fn set(&mut self, countdown: Countdown) {
        self.countdown = countdown;
        let result = match countdown {
            // A timer set to zero would be off.
            Countdown::Until(end) => {
                let left = end.saturating_sub(self.clock.now());
                self.timer.reset(left.max(Duration::from_nanos(1)), None)
            }
            Countdown::Off | Countdown::Held(_) => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "The watchdog's timer can't be set");
        }
    }

    /// Begins anew with both stages.
    fn reload(&mut self) {
        if self.control & CONTROL_ENABLE == 0 {
            return;
        }
        let shift = if self.config & CONFIG_FAST == 0 {
            SLOW_SHIFT
        } else {
            FAST_SHIFT
        };
        let [first, second] = self.timers.map(|count| duration(count, shift));
        self.set(Countdown::Until(self.clock.now() + first + second));
    }

    /// Its time may have run out.
    fn look(&mut self) {
        let Countdown::Until(end) = self.countdown else {
            return;
        };
        if self.clock.now() < end {
            // It was begun anew after the timer had ended.
            self.set(self.countdown);
            return;
        }
        self.set(Countdown::Off);
        self.timed_out = true;
        if self.config & CONFIG_NO_OUTPUT == 0 {
            self.platform.request(MachineRequest::WatchdogExpired);
        }
    }

    fn write_control(&mut self, value: u8) {
        let before = self.control & CONTROL_ENABLE;
        self.control = value & CONTROL_BITS;
        match (before != 0, self.control & CONTROL_ENABLE != 0) {
            (false, true) => self.reload(),
            (true, false) => self.set(Countdown::Off),
            _ => {}
        }
    }

    /// A write to a register that the words before have unlocked.
    fn write_unlocked(&mut self, offset: u64, value: u32) {
        match offset {
            TIMER1 => self.timers[0] = value & COUNT_MAX,
            TIMER2 => self.timers[1] = value & COUNT_MAX,
            RELOAD => {
                if value & u32::from(RELOAD_NOW) != 0 {
                    self.reload();
                }
                if value & u32::from(TIMED_OUT) != 0 {
                    self.timed_out = false;
                }
            }
            _ => {}
        }
    }
}

fn register(offset: u16) -> u8 {
    u8::try_from(offset / 4).unwrap_or(u8::MAX)
}

fn duration(count: u32, shift: u32) -> Duration {
    let ticks = u64::from(count) << shift;
    Duration::from_nanos(ticks * 1_000 / (BUS_HERTZ / 1_000_000))
}

fn number(data: &[u8]) -> Option<u32> {
    let mut bytes = [0; 4];
    bytes.get_mut(..data.len())?.copy_from_slice(data);
    Some(u32::from_le_bytes(bytes))
}

impl PciFunction for Watchdog {
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let locked = self.control & CONTROL_LOCK != 0;
        if locked && register(offset) == register(CONTROL) {
            return;
        }
        self.config_space.write(offset, data);
        for (offset, &byte) in (offset..).zip(data) {
            match offset {
                CONFIG => self.config = byte,
                CONTROL => self.write_control(byte),
                _ => {}
            }
        }
    }

    fn decoded(&self) -> DecodedBars {
        self.config_space.decoded()
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let flags = u16::from(self.timed_out) * TIMED_OUT;
        if offset == RELOAD {
            let bytes = data.iter_mut().zip(flags.to_le_bytes());
            bytes.for_each(|(to, byte)| *to = byte);
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let Some(value) = number(data) else {
            return;
        };
        let word = UNLOCK.get(usize::from(self.unlocked));
        if offset == RELOAD && word.is_some_and(|&word| value == u32::from(word)) {
            self.unlocked += 1;
        } else {
            if usize::from(self.unlocked) == UNLOCK.len() {
                self.write_unlocked(offset, value);
            }
            self.unlocked = 0;
        }
    }

    /// That it has run out is remembered: it is how the next driver learns of it.
    fn reset(&mut self) {
        self.config_space.reset();
        self.timers = [COUNT_MAX; 2];
        self.config = 0;
        self.control = 0;
        self.unlocked = 0;
        self.set(Countdown::Off);
    }
}

/// Brings the end of a watchdog's time.
#[derive(Debug)]
pub struct WatchdogTimer {
    fd: RawFd,
    watchdog: Shared<Watchdog>,
}

impl MutEventSubscriber for WatchdogTimer {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Edges come with every expiry, read or not, so the timer is never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new_raw(self.fd, edge)) {
            tracing::error!(%error, "Cannot poll the watchdog's timer");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        lock(&self.watchdog).look();
    }
}
