#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::bus::shared;
use crate::legacy::clock::MonotonicClock;
use crate::legacy::clock::testing::ManualClock;
use crate::pci::PciHost;
use crate::platform::DeviceLoop;
use crate::testing::{MockControl, PATIENCE, TestLoop};

const SECOND: Duration = Duration::from_secs(1);
/// A second in counts of the slow prescaler, a bit more.
const COUNTS: u32 = 1008;

struct Rig {
    host: PciHost,
    control: Arc<MockControl>,
    clock: Arc<ManualClock>,
    watchdog: Watchdog,
}

fn watchdog(
    host: &PciHost,
    slot: u8,
    control: &Arc<MockControl>,
    clock: Arc<dyn Clock>,
) -> Watchdog {
    Watchdog::new(WatchdogConfig {
        slot: host.slot(slot).unwrap(),
        bar_address: Some(0xc000_0000),
        control: control.clone(),
        clock,
    })
    .unwrap()
}

impl Rig {
    fn new() -> Self {
        let host = PciHost::new(0xc000_0000..0xd000_0000).unwrap();
        let control = Arc::<MockControl>::default();
        let clock = Arc::new(ManualClock::new(100 * SECOND));
        let watchdog = watchdog(&host, 3, &control, clock.clone());
        Self {
            host,
            control,
            clock,
            watchdog,
        }
    }

    /// Writes a register as drivers do.
    fn write(&mut self, offset: u64, value: u32) {
        unlock(&mut self.watchdog);
        self.watchdog.bar_write(0, offset, &value.to_le_bytes());
    }

    /// Starts with two stages of about a second.
    fn start(&mut self) {
        self.write(TIMER1, COUNTS);
        self.write(TIMER2, COUNTS);
        self.watchdog.config_write(CONTROL, &[CONTROL_ENABLE]);
    }

    fn ping(&mut self) {
        unlock(&mut self.watchdog);
        let word = RELOAD_NOW.to_le_bytes();
        self.watchdog.bar_write(0, RELOAD, &word);
    }

    /// Lets the time pass; whether the machine's owner has heard of an end.
    fn pass(&mut self, time: Duration) -> bool {
        let before = self.control.requests().len();
        self.clock.advance(time);
        self.watchdog.look();
        self.control.requests().len() > before
    }

    fn timed_out(&mut self) -> bool {
        let mut word = [0; 2];
        self.watchdog.bar_read(0, RELOAD, &mut word);
        u16::from_le_bytes(word) & TIMED_OUT != 0
    }
}

fn unlock(watchdog: &mut Watchdog) {
    for word in UNLOCK {
        watchdog.bar_write(0, RELOAD, &word.to_le_bytes());
    }
}

#[test]
fn it_runs_out_after_both_stages_unless_it_is_called() {
    let mut rig = Rig::new();
    assert!(!rig.pass(1000 * SECOND), "asleep");
    rig.start();
    for _ in 0..5 {
        assert!(!rig.pass(SECOND * 19 / 10));
        rig.ping();
    }
    assert!(!rig.pass(SECOND * 19 / 10));
    assert!(!rig.timed_out());
    assert!(rig.pass(SECOND / 5));
    assert_eq!(rig.control.requests(), [MachineRequest::WatchdogExpired]);
    assert!(rig.timed_out());
    assert!(!rig.pass(1000 * SECOND), "once");
    // The next driver learns of it after the reset.
    rig.watchdog.reset();
    assert!(rig.timed_out());
    rig.write(RELOAD, u32::from(TIMED_OUT));
    assert!(!rig.timed_out());
    assert!(!rig.pass(1000 * SECOND), "asleep again");
}

#[test]
fn writes_count_only_when_unlocked() {
    let mut rig = Rig::new();
    rig.start();
    assert!(!rig.pass(SECOND * 19 / 10));
    rig.watchdog.bar_write(0, RELOAD, &RELOAD_NOW.to_le_bytes());
    rig.watchdog.bar_write(0, RELOAD, &UNLOCK[1].to_le_bytes());
    rig.watchdog.bar_write(0, RELOAD, &RELOAD_NOW.to_le_bytes());
    unlock(&mut rig.watchdog);
    rig.watchdog.bar_write(0, 0x08, &[1, 0]);
    rig.watchdog.bar_write(0, RELOAD, &RELOAD_NOW.to_le_bytes());
    assert!(rig.pass(SECOND / 5));
}

#[test]
fn the_fast_prescaler_counts_microseconds() {
    let mut rig = Rig::new();
    rig.watchdog.config_write(CONFIG, &[CONFIG_FAST, 0]);
    rig.start();
    assert!(!rig.pass(Duration::from_micros(1900)));
    assert!(rig.pass(Duration::from_micros(100)));
}

#[test]
fn it_is_stopped_but_not_when_locked() {
    let mut rig = Rig::new();
    rig.start();
    rig.watchdog.config_write(CONTROL, &[0]);
    assert!(!rig.pass(10 * SECOND));
    let locked = CONTROL_ENABLE | CONTROL_LOCK;
    rig.watchdog.config_write(CONTROL, &[locked]);
    rig.watchdog.config_write(CONTROL, &[0]);
    let mut shown = [0];
    rig.host
        .config_read(3 << 15 | u64::from(CONTROL), &mut shown);
    assert_eq!(shown, [locked]);
    assert!(rig.pass(10 * SECOND));
}

#[test]
fn without_its_output_it_only_remembers() {
    let mut rig = Rig::new();
    rig.watchdog.config_write(CONFIG, &[CONFIG_NO_OUTPUT, 0]);
    rig.start();
    assert!(!rig.pass(10 * SECOND));
    assert!(rig.timed_out());
}

#[test]
fn the_time_of_a_pause_does_not_count() {
    let mut rig = Rig::new();
    rig.start();
    assert!(!rig.pass(SECOND));
    rig.watchdog.hold();
    assert!(!rig.pass(1000 * SECOND));
    rig.watchdog.release();
    assert!(!rig.pass(SECOND * 9 / 10));
    assert!(rig.pass(SECOND / 5));
}

#[test]
fn the_timer_brings_the_end() {
    let mut rig = Rig::new();
    let clock = Arc::new(MonotonicClock::default());
    rig.watchdog = watchdog(&rig.host, 4, &rig.control, clock);
    rig.watchdog.config_write(CONFIG, &[CONFIG_FAST, 0]);
    let watchdog = shared(rig.watchdog);
    let device_loop = TestLoop::new();
    device_loop
        .add(Box::new(Watchdog::handler(&watchdog)))
        .unwrap();
    lock(&watchdog).config_write(CONTROL, &[CONTROL_ENABLE]);
    let start = Instant::now();
    while rig.control.requests().is_empty() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    // Twice the longest count.
    assert!(start.elapsed() >= 2 * duration(COUNT_MAX, FAST_SHIFT));
}

proptest! {
    #[test]
    fn any_access_is_borne(accesses: Vec<(bool, u16, u64, u32, u8)>) {
        let mut rig = Rig::new();
        for (config, place, offset, value, len) in accesses {
            let bytes = value.to_le_bytes();
            let len = usize::from(len % 4) + 1;
            let data = &bytes[..len];
            if config {
                rig.watchdog.config_write((place % 4096) & !3, data);
            } else {
                rig.watchdog.bar_write(0, offset % 16, data);
                rig.watchdog.bar_read(0, offset % 16, &mut [0; 4][..len]);
            }
            rig.pass(Duration::from_micros(value.into()));
        }
    }

    #[test]
    fn state_survives(counts in [0..=COUNT_MAX, 0..=COUNT_MAX], run: bool, time in 0_u32..3) {
        let mut rig = Rig::new();
        rig.write(TIMER1, counts[0]);
        rig.write(TIMER2, counts[1]);
        rig.watchdog.config_write(CONTROL, &[u8::from(run) * CONTROL_ENABLE]);
        rig.pass(time * SECOND);
        rig.watchdog.hold();
        let state = rig.watchdog.state();
        let json = serde_json::to_string(&state).unwrap();
        let mut other = Rig::new();
        other.watchdog.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        prop_assert_eq!(other.watchdog.state(), state);
    }
}

#[test]
fn impossible_states_are_refused() {
    let mut rig = Rig::new();
    let sound = rig.watchdog.state();
    let broken: [fn(&mut WatchdogState); 4] = [
        |state| state.timers[1] = COUNT_MAX + 1,
        |state| state.unlocked = 3,
        |state| state.left = Some(SECOND),
        |state| {
            state.control = CONTROL_ENABLE;
            state.left = Some(Duration::MAX);
        },
    ];
    for change in broken {
        let mut state = sound.clone();
        change(&mut state);
        assert!(rig.watchdog.restore(&state).is_err());
    }
    rig.watchdog.restore(&sound).unwrap();
}
