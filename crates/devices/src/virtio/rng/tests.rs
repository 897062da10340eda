#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::Rng;
use crate::testing::{MockNotifier, TestLoop, guest_memory};
use crate::virtio::driver::{Driver, readable, writable};
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

const DATA: u64 = 0x20_0000;

fn start(rng: &mut Rng, notifier: &Arc<MockNotifier>) -> Driver {
    let memory = guest_memory(4 << 20);
    let driver = Driver::new(&memory, 0x1000, 64);
    let queue = ActiveQueue {
        index: 0,
        queue: driver.queue(false),
        kick: driver.kick.clone(),
    };
    rng.activate(Activation {
        memory,
        features: rng.features(),
        queues: vec![queue],
        notifier: notifier.clone(),
    })
    .unwrap();
    driver
}

#[test]
fn buffers_are_filled_with_different_bytes() {
    let notifier = Arc::default();
    let mut rng = Rng::new(Arc::new(TestLoop::new()));
    let mut driver = start(&mut rng, &notifier);
    for _ in 0..10 {
        driver.add(&[writable(DATA, 40), writable(DATA + 100, 24)]);
    }
    driver.kick();
    let mut seen = Vec::new();
    for _ in 0..10 {
        assert_eq!(driver.wait_used().1, 64);
    }
    for address in [DATA, DATA + 16, DATA + 100] {
        seen.push(driver.read(address, 16));
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3);
    assert!(!seen.contains(&vec![0; 16]));
    assert_eq!(driver.read(DATA + 124, 16), [0; 16], "nothing beyond");
    notifier.wait_queue(0, 1);
}

#[test]
fn one_request_gets_so_much_and_no_more() {
    let notifier = Arc::default();
    let mut rng = Rng::new(Arc::new(TestLoop::new()));
    let mut driver = start(&mut rng, &notifier);
    driver.add(&[writable(DATA, 0x9000), writable(DATA, 0x10_0000)]);
    driver.kick();
    assert_eq!(driver.wait_used().1, 0x1_0000);
    let queues = rng.deactivate();
    assert_eq!(queues[0].queue.state().next_used, 1);
}

#[test]
fn a_readable_buffer_stops_the_device() {
    let notifier = Arc::<MockNotifier>::default();
    let mut rng = Rng::new(Arc::new(TestLoop::new()));
    let mut driver = start(&mut rng, &notifier);
    driver.add(&[readable(DATA, 64)]);
    driver.kick();
    notifier.wait(|log| log.needs_reset.len() == 1);
    driver.add(&[writable(DATA, 64)]);
    driver.kick();
    assert_eq!(rng.deactivate().len(), 1);
    assert!(driver.take_used().is_none());
}
