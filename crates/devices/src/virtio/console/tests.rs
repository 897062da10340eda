#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Condvar, Mutex};

use super::{Console, ConsoleConfig, ConsoleState, TerminalSize};
use crate::bus::lock;
use crate::console::{ConsoleInput, ConsoleSink};
use crate::testing::{MockNotifier, PATIENCE, TestLoop, guest_memory};
use crate::virtio::driver::{Driver, RINGS, readable, writable};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice};

const DATA: u64 = 0x20_0000;

#[derive(Debug, Default)]
pub(crate) struct Screen {
    text: Mutex<Vec<u8>>,
    changed: Condvar,
}

impl ConsoleSink for Screen {
    fn write(&self, bytes: &[u8]) {
        lock(&self.text).extend_from_slice(bytes);
        self.changed.notify_all();
    }
}

impl Screen {
    /// Waits for `len` bytes of text, and gives all there is.
    pub(crate) fn wait(&self, len: usize) -> Vec<u8> {
        let text = lock(&self.text);
        let (text, _) = self
            .changed
            .wait_timeout_while(text, PATIENCE, |text| text.len() < len)
            .unwrap();
        text.clone()
    }
}

struct Rig {
    console: Console,
    screen: Arc<Screen>,
    input: Arc<ConsoleInput>,
    notifier: Arc<MockNotifier>,
    rx: Driver,
    tx: Driver,
}

fn rig() -> Rig {
    let screen = Arc::<Screen>::default();
    let input = Arc::new(ConsoleInput::new().unwrap());
    let config = ConsoleConfig {
        sink: screen.clone(),
        input: input.clone(),
        size: TerminalSize {
            columns: 80,
            rows: 25,
        },
    };
    let memory = guest_memory(4 << 20);
    let mut rig = Rig {
        console: Console::new(config, Arc::new(TestLoop::new())),
        screen,
        input,
        notifier: Arc::default(),
        rx: Driver::new(&memory, 0x1000, 64),
        tx: Driver::new(&memory, 0x1000 + RINGS, 64),
    };
    let queue = |driver: &Driver, index| ActiveQueue {
        index,
        queue: driver.queue(true),
        kick: driver.kick.clone(),
    };
    let activation = Activation {
        memory,
        features: rig.console.features(),
        queues: vec![queue(&rig.rx, 0), queue(&rig.tx, 1)],
        notifier: rig.notifier.clone(),
    };
    rig.console.activate(activation).unwrap();
    rig
}

#[test]
fn output_reaches_the_sink_in_order() {
    let mut rig = rig();
    let text: Vec<u8> = (0..3000_u32).map(|i| b'a' + (i % 26) as u8).collect();
    rig.tx.write(DATA, &text);
    for i in 0..3 {
        let at = DATA + 1000 * i;
        rig.tx.add(&[readable(at, 1), readable(at + 1, 999)]);
    }
    rig.tx.kick();
    assert_eq!(rig.screen.wait(3000), text);
    for head in [0, 2, 4] {
        assert_eq!(rig.tx.wait_used(), (head, 0));
    }
    rig.notifier.wait_queue(1, 1);
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    let mut rig = rig();
    rig.input.push(b"root\n");
    rig.rx.add(&[writable(DATA, 2), writable(DATA + 0x100, 1)]);
    rig.rx.add(&[writable(DATA + 0x200, 100)]);
    rig.rx.add(&[writable(DATA + 0x300, 100)]);
    rig.rx.kick();
    assert_eq!(rig.rx.wait_used(), (0, 3));
    assert_eq!(rig.rx.wait_used(), (2, 2));
    assert_eq!(rig.rx.read(DATA, 2), b"ro");
    assert_eq!(rig.rx.read(DATA + 0x100, 1), b"o");
    assert_eq!(rig.rx.read(DATA + 0x200, 2), b"t\n");
    assert!(rig.rx.take_used().is_none());
    rig.input.push(b"secret\n");
    assert_eq!(rig.rx.wait_used(), (3, 7));
    assert_eq!(rig.rx.read(DATA + 0x300, 7), b"secret\n");
    assert!(rig.input.is_empty());

    rig.rx.add(&[writable(DATA, 100)]);
    rig.rx.kick();
    let queues = rig.console.deactivate();
    let positions: Vec<_> = queues
        .iter()
        .map(|queue| queue.queue.state())
        .map(|state| (state.next_avail, state.next_used))
        .collect();
    assert_eq!(positions, [(3, 3), (0, 0)]);
}

#[test]
fn a_resize_changes_the_config_space() {
    let mut rig = rig();
    let size = TerminalSize {
        columns: 132,
        rows: 50,
    };
    let resizer = rig.console.resizer();
    assert_eq!(
        rig.notifier.log().config,
        1,
        "there is a size from the start"
    );
    resizer.resize(size);
    resizer.resize(size);
    assert_eq!(rig.notifier.log().config, 2);
    let mut space = [0xff; 14];
    rig.console.read_config(0, &mut space);
    assert_eq!(space, [132, 0, 50, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    rig.console.deactivate();
    let state = DeviceState::Console(ConsoleState { size });
    assert_eq!(rig.console.state(), state);
    resizer.resize(TerminalSize::default());
    assert_eq!(rig.notifier.log().config, 2, "no driver to tell");
    rig.console.restore(&state).unwrap();
    assert_eq!(rig.console.state(), state);
    rig.console.restore(&DeviceState::Rng).unwrap_err();
}

#[test]
fn wrong_directions_stop_the_device() {
    for output in [false, true] {
        let mut rig = rig();
        if output {
            rig.tx.add(&[writable(DATA, 10)]);
            rig.tx.kick();
        } else {
            rig.rx.add(&[readable(DATA, 10)]);
            rig.rx.kick();
        }
        rig.notifier.wait(|log| log.needs_reset.len() == 1);
        rig.input.push(b"x");
        assert_eq!(rig.console.deactivate().len(), 2);
        assert_eq!(rig.rx.used_index(), 0);
    }
}
