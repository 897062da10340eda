#![allow(clippy::unwrap_used)]

use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::bus::shared;
use crate::legacy::clock::WallClock;
use crate::legacy::clock::testing::ManualClock;
use crate::platform::DeviceLoop;
use crate::testing::{MockIrq, PATIENCE, TestMachine};

/// 2024-02-29 23:59:50 UTC, a Thursday.
const NOW: u64 = 1_709_251_190;

struct Machine {
    cmos: Cmos,
    clock: Arc<ManualClock>,
    irq: Arc<MockIrq>,
    config: CmosConfig,
}

fn machine() -> Machine {
    let clock = Arc::new(ManualClock::new(Duration::from_secs(NOW)));
    let irq = Arc::<MockIrq>::default();
    let config = CmosConfig {
        clock: clock.clone(),
        irq: irq.clone(),
        machine: CmosMachine {
            low_ram: 0xb000_0000,
            high_ram: 0x9000_0000,
            cpus: 2,
        },
    };
    Machine {
        cmos: Cmos::new(config.clone()).unwrap(),
        clock,
        irq,
        config,
    }
}

fn get(cmos: &mut Cmos, index: u8) -> u8 {
    // With the NMI bit, as SeaBIOS does.
    cmos.write(INDEX, &[index | 0x80]);
    let mut byte = [0xff];
    cmos.read(DATA, &mut byte);
    byte[0]
}

fn set(cmos: &mut Cmos, index: u8, byte: u8) {
    cmos.write(INDEX, &[index | 0x80]);
    cmos.write(DATA, &[byte]);
}

/// Century, year, month, day, hour, minute, second as the registers hold them.
fn time(cmos: &mut Cmos) -> [u8; 7] {
    [0x32, 9, 8, 7, 4, 2, 0].map(|index| get(cmos, index))
}

#[test]
fn shows_utc_in_bcd_and_24_hours() {
    let mut m = machine();
    assert_eq!(
        time(&mut m.cmos),
        [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x50]
    );
    assert_eq!(get(&mut m.cmos, 6), 5, "Thursday");
    m.clock.advance(Duration::from_secs(10));
    assert_eq!(
        time(&mut m.cmos),
        [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]
    );
    assert_eq!(get(&mut m.cmos, REGISTER_D), 0x80);
    assert_eq!(get(&mut m.cmos, REGISTER_A), 0x26);
}

#[test]
fn shows_binary_and_12_hours() {
    let mut m = machine();
    set(&mut m.cmos, REGISTER_B, 0x04);
    assert_eq!(time(&mut m.cmos), [20, 24, 2, 29, 11 | 0x80, 59, 50]);
    m.clock.advance(Duration::from_secs(10));
    assert_eq!(get(&mut m.cmos, 4), 12, "midnight is 12 AM");
}

#[test]
fn update_in_progress_shows_shortly_before_a_second_only() {
    let mut m = machine();
    m.clock.advance(Duration::from_nanos(999_755_999));
    assert_eq!(get(&mut m.cmos, REGISTER_A) & UPDATE_IN_PROGRESS, 0);
    m.clock.advance(Duration::from_nanos(1));
    assert_ne!(get(&mut m.cmos, REGISTER_A) & UPDATE_IN_PROGRESS, 0);
    m.clock.advance(Duration::from_micros(244));
    assert_eq!(get(&mut m.cmos, REGISTER_A) & UPDATE_IN_PROGRESS, 0);
}

#[test]
fn guest_sets_the_time_as_linux_does() {
    let mut m = machine();
    let mode = get(&mut m.cmos, REGISTER_B);
    set(&mut m.cmos, REGISTER_B, mode | MODE_SET);
    m.clock.advance(Duration::from_secs(5));
    assert_eq!(get(&mut m.cmos, 0), 0x50, "stopped");
    let wanted = [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58];
    for (index, byte) in [0x32, 9, 8, 7, 4, 2, 0].into_iter().zip(wanted) {
        set(&mut m.cmos, index, byte);
    }
    set(&mut m.cmos, REGISTER_B, mode);
    assert_eq!(time(&mut m.cmos), wanted);
    m.clock.advance(Duration::from_secs(3));
    assert_eq!(
        time(&mut m.cmos),
        [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01]
    );
}

#[test]
fn guest_sets_the_time_while_it_runs_as_seabios_does() {
    let mut m = machine();
    for (index, byte) in [
        (9, 0x23),
        (8, 0x01),
        (7, 0x31),
        (4, 0x12),
        (2, 0x30),
        (0, 0x15),
    ] {
        set(&mut m.cmos, index, byte);
    }
    assert_eq!(
        time(&mut m.cmos),
        [0x20, 0x23, 0x01, 0x31, 0x12, 0x30, 0x15]
    );
}

#[test]
fn memory_cells_tell_firmware_the_machine() {
    let mut m = machine();
    let word = |cmos: &mut Cmos, low| u16::from_le_bytes([get(cmos, low), get(cmos, low + 1)]);
    assert_eq!(word(&mut m.cmos, 0x15), 640);
    assert_eq!(word(&mut m.cmos, 0x30), u16::MAX);
    // As SeaBIOS computes them.
    let low = u64::from(word(&mut m.cmos, 0x34)) * 0x1_0000 + 0x100_0000;
    assert_eq!(low, 0xb000_0000);
    let high = u64::from(word(&mut m.cmos, 0x5b)) | u64::from(get(&mut m.cmos, 0x5d)) << 16;
    assert_eq!(high * 0x1_0000, 0x9000_0000);
    assert_eq!(get(&mut m.cmos, 0x5f), 1);
    let boot = u16::from(get(&mut m.cmos, 0x3d)) | u16::from(get(&mut m.cmos, 0x38) & 0xf0) << 4;
    assert_eq!(boot, 0x432, "disk, CD, network");
    set(&mut m.cmos, 0x0f, 0x0a);
    assert_eq!(get(&mut m.cmos, 0x0f), 0x0a);
}

#[test]
fn alarm_fires_at_its_second_and_is_acknowledged() {
    let mut m = machine();
    for (index, byte) in [
        (ALARM_HOUR, 0x00),
        (ALARM_MINUTE, 0x00),
        (ALARM_SECOND, 0x05),
    ] {
        set(&mut m.cmos, index, byte);
    }
    set(&mut m.cmos, REGISTER_B, 0x22);
    assert!(m.cmos.timer.is_armed().unwrap());
    m.clock.advance(Duration::from_secs(14));
    m.cmos.tick();
    assert!(!m.irq.level());
    m.clock.advance(Duration::from_secs(1));
    m.cmos.tick();
    assert!(m.irq.level());
    assert!(!m.cmos.timer.is_armed().unwrap(), "not before it is read");
    assert_eq!(
        get(&mut m.cmos, REGISTER_C),
        FLAG_IRQ | FLAG_ALARM | FLAG_UPDATE | FLAG_PERIODIC
    );
    assert!(!m.irq.level());
    assert_eq!(get(&mut m.cmos, REGISTER_C), 0);
    assert!(m.cmos.timer.is_armed().unwrap());
}

#[test]
fn alarm_wildcards_and_impossible_alarms() {
    let mut m = machine();
    let next = |m: &mut Machine, hour, minute, second| {
        set(&mut m.cmos, ALARM_HOUR, hour);
        set(&mut m.cmos, ALARM_MINUTE, minute);
        set(&mut m.cmos, ALARM_SECOND, second);
        m.cmos
            .cells
            .next_alarm(NOW.cast_signed())
            .map(|at| at - NOW.cast_signed())
    };
    assert_eq!(next(&mut m, 0xff, 0xff, 0xff), Some(1));
    assert_eq!(next(&mut m, 0xff, 0xff, 0x49), Some(59));
    assert_eq!(next(&mut m, 0xc0, 0x58, 0x00), Some(58 * 60 + 10));
    assert_eq!(next(&mut m, 0x23, 0x59, 0x50), Some(86_400));
    assert_eq!(next(&mut m, 0x25, 0x00, 0x00), None);
    assert_eq!(next(&mut m, 0x00, 0x60, 0x00), None);
}

#[test]
fn flags_rise_without_interrupts_enabled() {
    let mut m = machine();
    get(&mut m.cmos, REGISTER_C);
    m.clock.advance(Duration::from_millis(1));
    assert_eq!(get(&mut m.cmos, REGISTER_C), FLAG_PERIODIC);
    m.clock.advance(Duration::from_secs(1));
    assert_eq!(get(&mut m.cmos, REGISTER_C), FLAG_PERIODIC | FLAG_UPDATE);
    assert!(!m.irq.level());
    assert!(!m.cmos.timer.is_armed().unwrap());
}

#[test]
fn set_stops_updates_and_their_interrupt() {
    let mut m = machine();
    set(&mut m.cmos, REGISTER_B, 0x12);
    assert!(m.cmos.timer.is_armed().unwrap());
    set(&mut m.cmos, REGISTER_B, 0x92);
    assert_eq!(get(&mut m.cmos, REGISTER_B), 0x82);
    assert!(!m.cmos.timer.is_armed().unwrap());
}

#[test]
fn reset_keeps_time_and_memory_but_no_interrupt() {
    let mut m = machine();
    set(&mut m.cmos, 9, 0x30);
    set(&mut m.cmos, 0x40, 0x55);
    set(&mut m.cmos, REGISTER_B, 0x12);
    m.clock.advance(Duration::from_secs(1));
    m.cmos.tick();
    assert!(m.irq.level());
    m.cmos.reset();
    assert!(!m.irq.level());
    assert_eq!(get(&mut m.cmos, REGISTER_B), 0x02);
    assert_eq!(get(&mut m.cmos, 9), 0x30);
    assert_eq!(get(&mut m.cmos, 0x40), 0x55);
}

#[test]
fn restore_goes_on_with_time_and_pending_alarm() {
    let mut m = machine();
    set(&mut m.cmos, 9, 0x30);
    set(&mut m.cmos, ALARM_HOUR, 0xff);
    set(&mut m.cmos, ALARM_MINUTE, 0x00);
    set(&mut m.cmos, ALARM_SECOND, 0x00);
    set(&mut m.cmos, REGISTER_B, 0x22);
    let json = serde_json::to_string(&m.cmos.state()).unwrap();
    let state: CmosState = serde_json::from_str(&json).unwrap();
    assert_eq!(state, m.cmos.state());
    m.clock.set(Duration::from_secs(NOW + 20));
    let mut restored = Cmos::new(m.config.clone()).unwrap();
    restored.restore(&state).unwrap();
    assert!(m.irq.level(), "the alarm passed while the machine was away");
    assert_eq!(
        time(&mut restored),
        [0x20, 0x30, 0x03, 0x01, 0x00, 0x00, 0x10]
    );
}

#[test]
fn restore_keeps_the_line_up_until_the_guest_reads_why() {
    let mut m = machine();
    set(&mut m.cmos, REGISTER_B, 0x12);
    m.clock.advance(Duration::from_secs(1));
    m.cmos.tick();
    // Disabling the interrupt does not take back one that is there.
    set(&mut m.cmos, REGISTER_B, 0x02);
    let state = m.cmos.state();
    m.cmos.reset();
    assert!(!m.irq.level());
    let mut restored = Cmos::new(m.config.clone()).unwrap();
    restored.restore(&state).unwrap();
    assert!(m.irq.level());
    assert_ne!(get(&mut restored, REGISTER_C) & FLAG_IRQ, 0);
    assert!(!m.irq.level());
}

#[test]
fn states_that_can_not_be_are_refused() {
    let mut m = machine();
    for cells in [0, 127, 129] {
        let state = CmosState {
            cells: vec![0; cells],
            ..m.cmos.state()
        };
        m.cmos.restore(&state).unwrap_err();
    }
    let state = CmosState {
        index: 0x80,
        ..m.cmos.state()
    };
    m.cmos.restore(&state).unwrap_err();
}

#[test]
fn periodic_interrupt_arrives_from_the_device_thread() {
    let machine = TestMachine::new();
    let irq = Arc::<MockIrq>::default();
    let config = CmosConfig {
        clock: Arc::new(WallClock),
        irq: irq.clone(),
        machine: CmosMachine {
            low_ram: 1 << 30,
            high_ram: 0,
            cpus: 1,
        },
    };
    let cmos = shared(Cmos::new(config).unwrap());
    let handler = Box::new(Cmos::handler(&cmos));
    machine.device_loop.add(handler).unwrap();
    set(&mut lock(&cmos), REGISTER_B, 0x42);
    let start = Instant::now();
    while irq.rises() < 5 {
        assert!(
            start.elapsed() < PATIENCE,
            "only {} interrupts",
            irq.rises()
        );
        if irq.level() {
            let flags = get(&mut lock(&cmos), REGISTER_C);
            assert_eq!(flags & (FLAG_IRQ | FLAG_PERIODIC), FLAG_IRQ | FLAG_PERIODIC);
        }
        std::thread::yield_now();
    }
}

proptest! {
    #[test]
    fn any_access_and_any_clock_is_survived(
        steps in proptest::collection::vec(
            (any::<u8>(), any::<Option<u8>>(), prop_oneof![0u64..5_000_000_000, any::<u64>()]), 0..60)
    ) {
        let mut m = machine();
        for (index, write, nanos) in steps {
            match write {
                Some(byte) => set(&mut m.cmos, index, byte),
                None => {
                    get(&mut m.cmos, index);
                }
            }
            m.clock.set(Duration::from_nanos(nanos));
            m.cmos.tick();
            prop_assert_eq!(m.irq.level(), m.cmos.cells.has_flag(FLAG_IRQ));
        }
    }

    #[test]
    fn any_saved_clock_is_survived(
        cells in proptest::collection::vec(any::<u8>(), 128),
        index in 0u8..0x80,
        offset in any::<i64>(),
        evaluated in (any::<u64>(), 0u32..1_000_000_000),
    ) {
        let mut m = machine();
        let evaluated = Duration::new(evaluated.0, evaluated.1);
        m.cmos.restore(&CmosState { index, cells, offset, evaluated }).unwrap();
        prop_assert_eq!(m.irq.level(), m.cmos.cells.has_flag(FLAG_IRQ));
        for index in 0..0x80 {
            get(&mut m.cmos, index);
        }
        set(&mut m.cmos, REGISTER_B, 0x76);
        m.clock.advance(Duration::from_secs(1));
        m.cmos.tick();
    }
}
