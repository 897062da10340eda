//! Many requests at a time.

use std::time::{Duration, Instant};

use super::*;

/// Begins a read of `sectors` sectors from `sector` in slot `slot`.
fn begin(driver: &mut Driver, slot: u64, sector: u64, sectors: u64) -> u16 {
    let header = HEADER + 0x20 * slot;
    driver.write(header, &[0; 8]);
    driver.write(header + 8, &sector.to_le_bytes());
    let data = DATA + 0x2000 * slot;
    driver.add(&[
        readable(header, 16),
        writable(data, 512 * sectors as u32),
        writable(header + 16, 1),
    ])
}

#[test]
fn a_full_queue_is_done_in_any_order_and_told_of_together() {
    for (aio, direct) in [
        (Aio::Auto, false),
        (Aio::Auto, true),
        (Aio::Threads, false),
        (Aio::Threads, true),
    ] {
        let options = |options: &mut DiskOptions| options.direct = direct;
        let mut rig = Rig::configured(options, |disk, _| disk, |config| config.aio = aio);
        rig.activate(1, u64::MAX);
        let expected = rig.on_disk(0, DISK as usize);
        let driver = rig.driver();
        let mut slots = std::collections::BTreeMap::new();
        // Three descriptors each.
        for slot in 0..85_u64 {
            let sector = slot * 7919 % (DISK / 512 - 8);
            slots.insert(begin(driver, slot, sector, 8), (slot, sector));
        }
        driver.kick();
        for _ in 0..85 {
            let (head, len) = driver.wait_used();
            assert_eq!(len, 4097);
            let (slot, sector) = slots.remove(&(head as u16)).unwrap();
            let read = driver.read(DATA + 0x2000 * slot, 4096);
            assert_eq!(read, expected[sector as usize * 512..][..4096]);
        }
        rig.block.deactivate();
        let interrupts = rig.notifier.log().queues[&0];
        assert!(interrupts <= 85, "{interrupts}");
    }
}

#[test]
fn a_device_that_is_stopped_has_no_request_in_flight() {
    for _ in 0..20 {
        let direct = |options: &mut DiskOptions| options.direct = true;
        let mut rig = Rig::with(1, u64::MAX, direct);
        let driver = rig.driver();
        for slot in 0..85 {
            begin(driver, slot, 8 * slot, 8);
        }
        driver.kick();
        let queues = rig.block.deactivate();
        // What was begun is told, and the rest is still there for the next device.
        let state = queues[0].queue.state();
        assert_eq!(state.next_avail, state.next_used);
        assert_eq!(rig.driver().used_index(), state.next_used);
        assert!(rig.block.state().kept.is_empty());
        rig.driver().write(DATA, &[0xee; 0x1000]);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(rig.driver().read(DATA, 0x1000), [0xee; 0x1000]);
        rig.serve(queues, u64::MAX);
        for _ in 0..85 {
            rig.driver().wait_used();
        }
    }
}

#[test]
fn limits_hold_for_all_queues_together() {
    let limit = |config: &mut BlockConfig| {
        config.queues = 2;
        config.rate_limits.requests.total = Some(Rate {
            per_second: 100,
            burst: Some(4),
        });
    };
    let mut rig = Rig::configured(|_| (), |disk, _| disk, limit);
    rig.activate(2, u64::MAX);
    let start = Instant::now();
    for driver in &mut rig.drivers {
        for slot in 0..12 {
            begin(driver, slot, slot, 1);
        }
        driver.kick();
    }
    for driver in &mut rig.drivers {
        for _ in 0..12 {
            driver.wait_used();
        }
    }
    // Four at once, and twenty at a hundred a second.
    assert!(start.elapsed() >= Duration::from_millis(195));
    // One who is not limited need not wait.
    let flush = Instant::now();
    rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert!(flush.elapsed() < Duration::from_secs(5));
}
