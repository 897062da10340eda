#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::{Arc, Condvar, Mutex};

use super::{Ports, PortsState};
use crate::bus::lock;
use crate::channel::{Channel, ChannelWatcher};
use crate::testing::{MockNotifier, PATIENCE, TestLoop, guest_memory};
use crate::virtio::driver::{Driver, RINGS, readable, writable};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice};

const DATA: u64 = 0x20_0000;
/// Where the driver has what it is told.
const TOLD: u64 = 0x30_0000;

/// Lets a test wait for changes.
#[derive(Debug, Default, Clone)]
struct Watch(Arc<(Mutex<u64>, Condvar)>);

impl ChannelWatcher for Watch {
    fn changed(&self) {
        *lock(&self.0.0) += 1;
        self.0.1.notify_all();
    }
}

impl Watch {
    fn until(&self, mut done: impl FnMut() -> bool) {
        let (_changes, timeout) = self
            .0
            .1
            .wait_timeout_while(lock(&self.0.0), PATIENCE, |_| !done())
            .unwrap();
        assert!(!timeout.timed_out());
    }
}

struct Rig {
    ports: Ports,
    agent: Arc<Channel>,
    other: Arc<Channel>,
    watch: Watch,
    notifier: Arc<MockNotifier>,
    /// By index.
    queues: Vec<Driver>,
}

impl Rig {
    fn new() -> Self {
        let watch = Watch::default();
        let channel = |name| Arc::new(Channel::new(name, Box::new(watch.clone())).unwrap());
        let (agent, other) = (channel("org.qemu.guest_agent.0"), channel("b"));
        let channels = vec![agent.clone(), other.clone()];
        let ports = Ports::new(channels, Arc::new(TestLoop::new()));
        let memory = guest_memory(4 << 20);
        let queues = (0..8).map(|index| Driver::new(&memory, 0x1000 + RINGS * index, 64));
        let mut rig = Self {
            ports,
            agent,
            other,
            watch,
            notifier: Arc::default(),
            queues: queues.collect(),
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        let queue = |(driver, index): (&Driver, u16)| ActiveQueue {
            index,
            queue: driver.queue(true),
            kick: driver.kick.clone(),
        };
        let activation = Activation {
            memory: self.queues[0].memory.clone(),
            features: self.ports.features(),
            queues: self.queues.iter().zip(0..).map(queue).collect(),
            notifier: self.notifier.clone(),
        };
        self.ports.activate(activation).unwrap();
    }

    /// Sends a control message.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let control = &mut self.queues[3];
        control.write(DATA, &message);
        let head = control.add(&[readable(DATA, 8)]);
        control.kick();
        assert_eq!(control.wait_used(), (head.into(), 0));
    }

    /// Gives the device room for `count` messages.
    fn listen(&mut self, count: u64) {
        for slot in 0..count {
            self.queues[2].add(&[writable(TOLD + 0x100 * slot, 0x100)]);
        }
        self.queues[2].kick();
    }

    /// The next message, if it is in slot `slot`: port, event, value and name.
    fn told(&mut self, slot: u64) -> (u32, u16, u16, String) {
        let (_, len) = self.queues[2].wait_used();
        let bytes = self.queues[2].read(TOLD + 0x100 * slot, len as usize);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let name = String::from_utf8(bytes[8..].to_vec()).unwrap();
        (u32::from(half(0)), half(4), half(6), name)
    }

    /// Has the guest open the first port.
    fn open(&mut self) {
        self.say(1, 3, 1);
        self.say(1, 6, 1);
        assert!(self.agent.guest().is_some());
    }
}

#[test]
fn a_driver_learns_of_ports_names_and_ends() {
    let mut rig = Rig::new();
    let mut space = [0; 12];
    rig.ports.read_config(0, &mut space);
    assert_eq!(space, [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    rig.agent.set_open(true);
    rig.say(0, 0, 1);
    rig.listen(10);
    assert_eq!(rig.told(0), (1, 1, 1, String::new()));
    assert_eq!(rig.told(1), (2, 1, 1, String::new()));
    rig.say(1, 3, 1);
    rig.say(2, 3, 1);
    assert_eq!(rig.told(2), (1, 7, 1, "org.qemu.guest_agent.0".into()));
    assert_eq!(rig.told(3), (1, 6, 1, String::new()));
    assert_eq!(rig.told(4), (2, 7, 1, "b".into()));
    assert!(
        rig.queues[2].take_used().is_none(),
        "b is closed, as it takes it for"
    );
    rig.other.set_open(true);
    assert_eq!(rig.told(5), (2, 6, 1, String::new()));
    rig.other.set_open(false);
    assert_eq!(rig.told(6), (2, 6, 0, String::new()));
    rig.say(1, 6, 1);
    assert_eq!((rig.agent.guest(), rig.other.guest()), (Some(1), None));
    rig.say(1, 6, 0);
    assert_eq!(rig.agent.guest(), None);
    // Of ports and of a kind that are not there.
    for (port, event) in [(0, 3), (0, 6), (3, 3), (u32::MAX, 6), (1, 99)] {
        rig.say(port, event, 1);
    }
    assert_eq!(rig.notifier.log().needs_reset.len(), 0);
}

#[test]
fn requests_for_messages_do_not_add_up() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        rig.say(0, 0, 1);
        rig.say(1, 3, 1);
    }
    rig.listen(10);
    assert_eq!(rig.told(0).1, 1);
    assert_eq!(rig.told(1).1, 7);
    assert_eq!(rig.told(2), (2, 1, 1, String::new()));
    rig.say(0, 0, 0);
    assert!(rig.queues[2].take_used().is_none());
}

#[test]
fn bytes_go_both_ways() {
    let mut rig = Rig::new();
    rig.agent.set_open(true);
    rig.open();
    rig.queues[5].write(DATA, b"hello");
    rig.queues[5].add(&[readable(DATA, 2), readable(DATA + 2, 3)]);
    rig.queues[5].kick();
    assert_eq!(rig.queues[5].wait_used(), (0, 0));
    let mut buffer = [0; 8];
    assert_eq!(rig.agent.pop(&mut buffer), 5);
    assert_eq!(&buffer[..5], b"hello");

    assert_eq!(rig.agent.push(b"answer"), 6);
    rig.queues[4].add(&[writable(DATA, 4)]);
    rig.queues[4].add(&[writable(DATA + 4, 4)]);
    rig.queues[4].kick();
    assert_eq!(rig.queues[4].wait_used(), (0, 4));
    assert_eq!(rig.queues[4].wait_used(), (1, 2));
    assert_eq!(rig.queues[4].read(DATA, 6), b"answer");
}

#[test]
fn nobody_holds_the_guest_back_but_a_slow_reader() {
    let mut rig = Rig::new();
    rig.open();
    let len = Channel::CAPACITY as u32 + 10;
    let text: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    rig.queues[5].write(DATA, &text);
    rig.queues[5].add(&[readable(DATA, len)]);
    rig.queues[5].kick();
    assert_eq!(rig.queues[5].wait_used(), (0, 0), "nobody listens");

    rig.agent.set_open(true);
    rig.queues[5].add(&[readable(DATA, 100), readable(DATA + 100, len - 100)]);
    rig.queues[5].kick();
    let mut heard: Vec<u8> = Vec::new();
    let mut buffer = [0; 5000];
    let agent = rig.agent.clone();
    rig.watch.until(|| {
        let count = agent.pop(&mut buffer);
        heard.extend(&buffer[..count]);
        count > 0
    });
    assert!(rig.queues[5].used_index() < 2 || heard.len() >= 10);
    while heard.len() < text.len() {
        let count = rig.agent.pop(&mut buffer);
        heard.extend(&buffer[..count]);
        std::thread::yield_now();
    }
    assert!(heard == text, "nothing is lost or comes twice");
    assert_eq!(rig.queues[5].wait_used(), (1, 0));

    // The host leaves while the guest waits for it.
    rig.queues[5].add(&[readable(DATA, len)]);
    rig.queues[5].kick();
    let agent = rig.agent.clone();
    rig.watch.until(|| agent.pop(&mut buffer[..1]) > 0);
    rig.agent.set_open(false);
    assert_eq!(rig.queues[5].wait_used(), (3, 0));
}

#[test]
fn without_multiport_the_console_prints_to_nobody() {
    let mut rig = Rig::new();
    rig.queues[1].add(&[readable(DATA, 100)]);
    rig.queues[1].kick();
    assert_eq!(rig.queues[1].wait_used(), (0, 0));
}

#[test]
fn another_device_goes_on_where_one_was() {
    let mut rig = Rig::new();
    rig.agent.set_open(true);
    rig.say(0, 0, 1);
    rig.open();
    // Half of a chain waits in the guest, and messages for room.
    let len = Channel::CAPACITY as u32 + 10;
    rig.queues[5].write(DATA, &vec![1; len as usize]);
    rig.queues[5].add(&[readable(DATA, len)]);
    rig.queues[5].kick();
    let first = rig.agent.clone();
    rig.watch.until(|| first.pop(&mut [0; 1]) > 0);
    let queues = rig.ports.deactivate();
    let indices: Vec<_> = queues.iter().map(|queue| queue.index).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5, 6, 7]);
    let state = rig.ports.state();
    let text = serde_json::to_string(&state).unwrap();
    let state: DeviceState = serde_json::from_str(&text).unwrap();

    let mut next = Rig::new();
    next.ports.deactivate();
    next.agent.set_open(true);
    next.ports.restore(&state).unwrap();
    assert_eq!(next.ports.state(), state);
    assert_eq!((next.agent.guest(), next.other.guest()), (Some(1), None));
    next.queues[5].write(DATA, &vec![1; len as usize]);
    next.queues[5].add(&[readable(DATA, len)]);
    next.activate();
    assert_eq!(next.queues[5].wait_used(), (0, 0));
    let mut rest = [0; 100];
    assert!(
        (9..=10).contains(&next.agent.pop(&mut rest)),
        "only what was not read before"
    );
    next.listen(10);
    let events: Vec<_> = (0..4).map(|slot| next.told(slot)).collect();
    let events: Vec<_> = events.iter().map(|told| (told.0, told.1)).collect();
    assert_eq!(events, [(1, 1), (1, 7), (1, 6), (2, 1)]);

    next.ports.deactivate();
    next.ports.reset();
    assert_eq!(next.agent.guest(), None);
    next.ports.restore(&DeviceState::Rng).unwrap_err();
    let few = PortsState { ports: Vec::new() };
    next.ports.restore(&DeviceState::Ports(few)).unwrap_err();
}

#[test]
fn broken_rules_stop_the_device() {
    for (queue, buffer) in [
        (3, writable(DATA, 8)),
        (3, readable(DATA, 7)),
        (2, writable(DATA, 7)),
        (2, readable(DATA, 8)),
        (5, writable(DATA, 8)),
        (4, readable(DATA, 8)),
        (5, readable(u64::MAX - 16, 8)),
    ] {
        let mut rig = Rig::new();
        rig.say(0, 0, 1);
        rig.queues[queue].add(&[buffer]);
        rig.queues[queue].kick();
        rig.notifier.wait(|log| log.needs_reset.len() == 1);
        assert_eq!(rig.ports.deactivate().len(), 8, "{queue}");
    }
}
