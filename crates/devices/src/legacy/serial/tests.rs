#![allow(clippy::unwrap_used)]

use std::sync::Mutex;
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::bus::shared;
use crate::platform::DeviceLoop;
use crate::testing::{MockIrq, PATIENCE, TestMachine};

const MODEM_STATUS: u8 = 6;
const SCRATCH: u8 = 7;
const ENABLE_TRANSMITTED: u8 = 1 << 1;
const TRANSMITTED: u8 = 1 << 1;

#[derive(Debug, Default)]
struct Screen(Mutex<Vec<u8>>);

impl ConsoleSink for Screen {
    fn write(&self, bytes: &[u8]) {
        lock(&self.0).extend(bytes);
    }
}

struct Machine {
    serial: Serial,
    irq: Arc<MockIrq>,
    screen: Arc<Screen>,
    input: Arc<ConsoleInput>,
}

fn machine() -> Machine {
    let irq = Arc::<MockIrq>::default();
    let screen = Arc::<Screen>::default();
    let input = Arc::new(ConsoleInput::new().unwrap());
    let config = SerialConfig {
        irq: irq.clone(),
        sink: screen.clone(),
        input: input.clone(),
    };
    Machine {
        serial: Serial::new(config),
        irq,
        screen,
        input,
    }
}

fn inb(serial: &mut Serial, register: u8) -> u8 {
    let mut byte = [0xff];
    serial.read(register.into(), &mut byte);
    byte[0]
}

fn outb(serial: &mut Serial, register: u8, byte: u8) {
    serial.write(register.into(), &[byte]);
}

fn drain(serial: &mut Serial, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < most && inb(serial, LINE_STATUS) & DATA_READY != 0 {
        bytes.push(inb(serial, DATA));
    }
    bytes
}

#[test]
fn output_reaches_the_sink_and_the_transmitter_interrupts() {
    let mut m = machine();
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_TRANSMITTED);
    assert_eq!(m.irq.rises(), 1, "empty at once");
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0x0f, TRANSMITTED);
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0x0f, NO_INTERRUPT);
    for byte in b"hi\n" {
        outb(&mut m.serial, DATA, *byte);
    }
    assert_eq!(*lock(&m.screen.0), b"hi\n");
    assert_eq!(m.irq.rises(), 2, "one for a burst");
    assert_ne!(inb(&mut m.serial, LINE_STATUS) & 0x20, 0);
}

#[test]
fn a_paste_larger_than_the_fifo_arrives_whole() {
    let mut m = machine();
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    let paste: Vec<u8> = (0..1000_u16).map(|n| n.to_le_bytes()[0]).collect();
    assert_eq!(m.input.push(&paste), paste.len());
    m.serial.receive();
    assert_eq!(m.irq.rises(), 1);
    assert_eq!(m.serial.uart.fifo_capacity(), 0);
    assert_eq!(drain(&mut m.serial, usize::MAX), paste);
    assert!(m.input.is_empty());
    assert_eq!(inb(&mut m.serial, DATA), 0, "nothing left");
}

/// A driver reads a limited number of bytes per interrupt and leaves when IIR says "none".
#[test]
fn a_driver_that_reads_in_parts_is_told_again() {
    let mut m = machine();
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    m.input.push(&[b'x'; 300]);
    m.serial.receive();
    let mut got = 0;
    for _ in 0..100 {
        if inb(&mut m.serial, INTERRUPT_ID) & NO_INTERRUPT != 0 {
            break;
        }
        got += drain(&mut m.serial, 10).len();
    }
    assert_eq!(got, 300);
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0x0f, NO_INTERRUPT);
}

#[test]
fn input_before_the_driver_interrupts_when_it_enables() {
    let mut m = machine();
    m.input.push(b"root\n");
    m.serial.receive();
    assert_eq!(m.irq.rises(), 0);
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    assert_eq!(m.irq.rises(), 1);
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0x0f, RECEIVED);
}

/// The tests by which Linux tells that there is a 16550A: scratch, loopback, FIFO bits.
#[test]
fn probing_finds_a_16550a_and_loses_no_input() {
    let mut m = machine();
    m.input.push(b"ahead");
    outb(&mut m.serial, SCRATCH, 0xa5);
    assert_eq!(inb(&mut m.serial, SCRATCH), 0xa5);
    outb(&mut m.serial, MODEM_CONTROL, LOOPBACK | 0x0a);
    assert_eq!(inb(&mut m.serial, MODEM_STATUS) & 0xf0, 0x90);
    m.serial.receive();
    outb(&mut m.serial, DATA, b'!');
    assert_eq!(drain(&mut m.serial, usize::MAX), b"!");
    assert!(lock(&m.screen.0).is_empty(), "loopback stays inside");
    outb(&mut m.serial, MODEM_CONTROL, 0x0b);
    outb(&mut m.serial, INTERRUPT_ID, 0x01);
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0xc0, 0xc0);
    assert_eq!(drain(&mut m.serial, usize::MAX), b"ahead");
}

#[test]
fn the_divisor_latch_hides_data_and_enable() {
    let mut m = machine();
    m.input.push(b"k");
    m.serial.receive();
    outb(&mut m.serial, LINE_CONTROL, DIVISOR_LATCH | 3);
    outb(&mut m.serial, DATA, 1);
    outb(&mut m.serial, INTERRUPT_ENABLE, 0);
    assert_eq!(inb(&mut m.serial, DATA), 1);
    assert_eq!(inb(&mut m.serial, INTERRUPT_ID) & 0x0f, NO_INTERRUPT);
    outb(&mut m.serial, LINE_CONTROL, 3);
    assert_eq!(drain(&mut m.serial, usize::MAX), b"k");
    assert!(lock(&m.screen.0).is_empty());
}

#[test]
fn typed_bytes_arrive_from_the_device_thread() {
    let machine = TestMachine::new();
    let Machine {
        mut serial,
        irq,
        input,
        ..
    } = self::machine();
    outb(&mut serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    input.push(b"early ");
    let serial = shared(serial);
    let handler = Box::new(Serial::handler(&serial));
    machine.device_loop.add(handler).unwrap();
    input.push(b"and late");
    let start = Instant::now();
    let mut got = Vec::new();
    while got != b"early and late" {
        assert!(start.elapsed() < PATIENCE, "only {got:?}");
        got.extend(drain(&mut lock(&serial), usize::MAX));
        std::thread::yield_now();
    }
    assert!(irq.rises() > 0);
}

#[test]
fn state_restores_with_unread_bytes_and_interrupt() {
    let mut m = machine();
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    outb(&mut m.serial, SCRATCH, 9);
    m.input.push(b"abc");
    m.serial.receive();
    inb(&mut m.serial, DATA);
    let json = serde_json::to_string(&m.serial.state()).unwrap();
    let state: SerialState = serde_json::from_str(&json).unwrap();
    let mut restored = Serial::new(m.serial.config.clone());
    restored.restore(&state).unwrap();
    assert_eq!(restored.state(), state);
    assert_eq!(inb(&mut restored, SCRATCH), 9);
    assert_eq!(drain(&mut restored, usize::MAX), b"bc");
    for received in [65, 0] {
        let state = SerialState {
            received: vec![0; received],
            ..state.clone()
        };
        restored.restore(&state).unwrap_err();
    }
    m.serial.reset();
    assert_eq!(drain(&mut m.serial, usize::MAX), b"");
    assert_eq!(inb(&mut m.serial, SCRATCH), 0);
}

#[test]
fn a_restored_port_takes_input_that_waits() {
    let mut m = machine();
    outb(&mut m.serial, INTERRUPT_ENABLE, ENABLE_RECEIVED);
    let state = m.serial.state();
    let rises = m.irq.rises();
    m.input.push(b"typed");
    let mut restored = Serial::new(m.serial.config.clone());
    restored.restore(&state).unwrap();
    assert_eq!(m.irq.rises(), rises + 1);
    assert_eq!(drain(&mut restored, usize::MAX), b"typed");
}

#[test]
fn input_beyond_the_fifo_survives_a_reset() {
    let mut m = machine();
    m.input.push(&[b'x'; FIFO]);
    m.input.push(b"later");
    m.serial.receive();
    m.serial.reset();
    assert_eq!(drain(&mut m.serial, usize::MAX), b"later");
}

fn registers() -> impl Strategy<Value = SerialState> {
    let received = proptest::collection::vec(any::<u8>(), 0..=FIFO);
    (any::<[u8; 9]>(), received).prop_map(|(r, received)| SerialState {
        divisor: [r[0], r[1]],
        interrupt_enable: r[2],
        interrupt_id: r[3],
        line_control: r[4],
        line_status: r[5] & !DATA_READY | u8::from(!received.is_empty()),
        modem_control: r[6],
        modem_status: r[7],
        scratch: r[8],
        received,
    })
}

proptest! {
    #[test]
    fn any_saved_port_is_survived(state in registers(), accesses in any::<[(u8, u8); 16]>()) {
        let mut m = machine();
        m.serial.restore(&state).unwrap();
        m.input.push(&[b'x'; 100]);
        for (register, byte) in accesses {
            m.serial.receive();
            inb(&mut m.serial, register % 8);
            outb(&mut m.serial, register % 8, byte);
        }
        prop_assert!(m.serial.state().received.len() <= FIFO);
    }

    #[test]
    fn any_access_is_survived(
        steps in proptest::collection::vec((0u64..9, any::<bool>(), any::<u8>(), 1usize..5), 0..300)
    ) {
        let mut m = machine();
        for (offset, write, byte, len) in steps {
            if write {
                m.serial.write(offset, &vec![byte; len]);
            } else {
                m.serial.read(offset, &mut vec![0xff; len]);
            }
            m.input.push(&[byte]);
            m.serial.receive();
        }
        prop_assert!(m.serial.state().received.len() <= FIFO);
    }
}
