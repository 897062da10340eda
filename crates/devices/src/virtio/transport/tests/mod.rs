//! The transport as drivers, good and bad, see it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod devices;
mod guest;
mod hostile;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bus::lock;
use crate::platform::MsiMessage;
use crate::testing::PATIENCE;
use crate::virtio::{DriverError, Notifier};
use guest::{BAR, FEATURES, Guest, VERSION_1};

const NOTIFY: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;
const NONE: [u64; 0] = [];

/// Waits for another thread.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn notifier(guest: &Guest) -> Arc<dyn Notifier> {
    lock(&guest.log).notifier.clone().unwrap()
}

/// Enables MSI-X with message data 100 + vector in each entry.
fn enable_msix(guest: &Guest) {
    let control = guest.capability(0x11, 0).at + 2;
    guest.config_write(control, &0xc000_u16.to_le_bytes());
    for vector in 0..3 {
        let entry = TABLE + 16 * u64::from(vector);
        guest.write_u32(entry, 0xfee0_0000);
        guest.write_u32(entry + 4, 0);
        guest.write_u32(entry + 8, 100 + vector);
        guest.write_u32(entry + 12, 0);
    }
    guest.config_write(control, &0x8000_u16.to_le_bytes());
}

#[test]
fn the_driver_finds_all_parts_of_the_device() {
    let guest = Guest::new();
    assert_eq!(guest.config_read(0), 0x1042_1af4);
    assert_eq!(guest.config_read(8), 0x0180_0001);
    let places = [1, 3, 4, 2].map(|kind| guest.capability(9, kind));
    let places = places.map(|capability| (capability.bar, capability.offset, capability.len));
    assert_eq!(
        places,
        [
            (0, 0, 0x40),
            (0, 0x100, 4),
            (0, 0x800, 0x800),
            (0, NOTIFY, 8)
        ]
    );
    let notify = guest.capability(9, 2);
    assert_eq!(
        guest.config_read(notify.at + 16),
        4,
        "notify_off_multiplier"
    );

    let msix = guest.capability(0x11, 0);
    assert_eq!(guest.config_read(msix.at) >> 16, 2, "three vectors");
    assert_eq!(guest.config_read(msix.at + 4), TABLE as u32);
    assert_eq!(guest.config_read(msix.at + 8), PENDING as u32);
    guest.config_write(0x10, &[0xff; 4]);
    assert_eq!(guest.config_read(0x10), 0xffff_c000);
}

#[test]
fn capabilities_other_than_the_window_are_read_only() {
    let guest = Guest::new();
    for kind in [1, 2, 3, 4] {
        let at = guest.capability(9, kind).at;
        let words = || [0, 4, 8, 12].map(|offset| guest.config_read(at + offset));
        let before = words();
        guest.config_write(at, &[0xff; 16]);
        assert_eq!(words(), before);
    }
}

#[test]
fn features_are_negotiated() {
    let guest = Guest::new();
    guest.enable_memory();
    let offered = [0, 1, 2].map(|half| {
        guest.write_u32(0, half);
        guest.read_u32(4)
    });
    assert_eq!(offered, [FEATURES as u32, 1, 0]);
    guest.set_status(3);

    for unacceptable in [0, FEATURES, VERSION_1 | 2, VERSION_1 << 1 | VERSION_1] {
        guest.write_features(unacceptable);
        guest.set_status(11);
        assert_eq!(guest.status(), 3, "{unacceptable:#x}");
    }
    guest.write_features(VERSION_1 | FEATURES);
    guest.set_status(11);
    assert_eq!(guest.status(), 11);
    guest.write_features(VERSION_1);
    guest.write_u32(8, 0);
    assert_eq!(
        guest.read_u32(0xc),
        FEATURES as u32,
        "fixed from FEATURES_OK on"
    );
}

#[test]
fn status_bits_stay_until_reset() {
    let guest = Guest::new();
    guest.enable_memory();
    guest.set_status(3);
    guest.set_status(0x40 | 1);
    assert_eq!(guest.status(), 3);
    guest.set_status(4);
    assert_eq!(guest.status(), 3, "DRIVER_OK without FEATURES_OK");
    guest.set_status(0x80);
    assert_eq!(guest.status(), 0x83);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    assert_eq!(lock(&guest.log).activations, 0);
}

#[test]
fn queues_are_handed_over_as_they_were_set_up() {
    let guest = Guest::new();
    guest.negotiate(VERSION_1 | FEATURES);
    assert_eq!(guest.read_u16(0x12), 2);
    guest.set_up_queue(1, 4);
    assert_eq!(guest.read_u16(0x1e), 1, "notification offset");
    guest.set_status(15);
    assert_eq!(guest.status(), 15);
    let log = lock(&guest.log);
    assert_eq!(log.queues, [(1, 4, true, 0)]);
    assert_eq!(log.features, VERSION_1 | FEATURES);
}

#[test]
fn queue_registers_are_fixed_once_in_use() {
    let guest = Guest::new();
    guest.negotiate(VERSION_1);
    guest.write_u16(0x16, 0);
    for bad in [0, 3, 32, 0xffff] {
        guest.write_u16(0x18, bad);
        assert_eq!(guest.read_u16(0x18), 16, "{bad}");
    }
    guest.set_up_queue(0, 8);
    guest.write_u16(0x18, 16);
    guest.write_u32(0x20, 0x5000);
    guest.write_u16(0x1c, 0);
    assert_eq!(guest.read_u16(0x18), 8);
    assert_eq!(guest.read_u32(0x20), 0x1_0000);
    assert_eq!(guest.read_u16(0x1c), 1);

    guest.set_status(15);
    guest.write_u16(0x16, 1);
    guest.write_u16(0x1c, 1);
    assert_eq!(guest.read_u16(0x1c), 0, "no new queue in a running device");
    guest.write_u16(0x16, 2);
    assert_eq!(guest.read_u16(0x18), 0, "there is no such queue");
}

#[test]
fn registers_read_at_any_width_and_are_written_at_their_own() {
    let guest = Guest::new();
    guest.negotiate(VERSION_1);
    guest.bar_write(0x20, &0x1_2345_6780_u64.to_le_bytes());
    assert_eq!(guest.bar_read::<8>(0x20), 0x1_2345_6780_u64.to_le_bytes());
    assert_eq!(guest.bar_read::<2>(0x23), [0x23, 0x01]);
    assert_eq!(guest.bar_read::<4>(0x12), [2, 0, 11, 0]);
    guest.bar_write(0x20, &[0xff; 2]);
    guest.bar_write(0x22, &[0xff; 4]);
    guest.bar_write(0x14, &[0xff; 4]);
    guest.bar_write(0x12, &[0xff; 2]);
    assert_eq!(guest.bar_read::<8>(0x20), 0x1_2345_6780_u64.to_le_bytes());
    assert_eq!(guest.bar_read::<4>(0x12), [2, 0, 11, 0]);
}

#[test]
fn a_doorbell_makes_the_device_work() {
    let guest = Guest::new();
    guest.start();
    guest.offer(1, 0);
    assert!(guest.machine.doorbells.ring(BAR + NOTIFY + 4));
    eventually("an interrupt", || guest.irq.level());
    assert_eq!(guest.used(1), 1);

    guest.offer(0, 0);
    guest.write_u16(NOTIFY, 0);
    eventually("work without doorbell", || guest.used(0) == 1);
}

#[test]
fn doorbells_follow_the_bar() {
    let guest = Guest::new();
    let doorbells = &guest.machine.doorbells;
    let at = |base: u64| vec![base + NOTIFY, base + NOTIFY + 4];
    guest.negotiate(VERSION_1);
    assert_eq!(doorbells.addresses(), NONE);
    guest.set_up_queue(0, 16);
    guest.set_up_queue(1, 4);
    guest.set_status(15);
    assert_eq!(doorbells.addresses(), at(BAR));

    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(doorbells.addresses(), at(0xd000_0000));
    guest.config_write(0x10, &0x1000_u32.to_le_bytes());
    assert_eq!(doorbells.addresses(), NONE, "outside of the window");
    guest.config_write(0x10, &(BAR as u32).to_le_bytes());
    guest.config_write(4, &[0]);
    assert_eq!(doorbells.addresses(), NONE);
    guest.enable_memory();
    assert_eq!(doorbells.addresses(), at(BAR));
    guest.set_status(0);
    assert_eq!(doorbells.addresses(), NONE);
}

#[test]
fn only_enabled_queues_have_doorbells() {
    let guest = Guest::new();
    guest.negotiate(VERSION_1);
    guest.set_up_queue(1, 8);
    guest.set_status(15);
    assert_eq!(guest.machine.doorbells.addresses(), [BAR + NOTIFY + 4]);
}

#[test]
fn the_device_works_where_doorbells_do_not() {
    let guest = Guest::new();
    guest.machine.doorbells.refuse();
    guest.start();
    guest.offer(0, 0);
    guest.write_u32(NOTIFY, 0);
    eventually("work", || guest.used(0) == 1);
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn reading_isr_lowers_the_line() {
    let guest = Guest::new();
    guest.start();
    let notifier = notifier(&guest);
    notifier.queue(0);
    notifier.queue(1);
    assert!(guest.irq.level());
    assert_eq!(guest.config_read(4) >> 19 & 1, 1);
    notifier.config();
    assert_eq!(guest.bar_read::<1>(0x100), [3]);
    assert!(!guest.irq.level());
    assert_eq!(guest.config_read(4) >> 19 & 1, 0);
    assert_eq!(guest.bar_read::<1>(0x100), [0]);
    assert_eq!(guest.irq.rises(), 1);
}

#[test]
fn an_interrupt_while_the_line_is_lowered_is_not_lost() {
    let guest = Guest::new();
    guest.start();
    let notifier = notifier(&guest);
    notifier.queue(0);
    guest.irq.before_next_lowering(move || notifier.queue(1));
    assert_eq!(guest.bar_read::<1>(0x100), [1]);
    assert!(guest.irq.level());
    assert_eq!(guest.bar_read::<1>(0x100), [1]);
    assert!(!guest.irq.level());
}

#[test]
fn a_disabled_pin_is_pending_only() {
    let guest = Guest::new();
    guest.start();
    guest.config_write(4, &0x0406_u16.to_le_bytes());
    notifier(&guest).queue(0);
    assert!(!guest.irq.level());
    assert_eq!(guest.config_read(4) >> 19 & 1, 1);
    guest.enable_memory();
    assert!(guest.irq.level());
    guest.set_status(0);
    assert!(!guest.irq.level());
}

#[test]
fn msix_vectors_are_signalled_as_assigned() {
    let guest = Guest::new();
    guest.enable_memory();
    enable_msix(&guest);
    guest.negotiate(VERSION_1);
    guest.write_u16(0x10, 0);
    guest.set_up_queue(0, 16);
    guest.write_u16(0x1a, 2);
    assert_eq!(guest.read_u16(0x1a), 2);
    guest.set_up_queue(1, 4);
    guest.set_status(15);
    let notifier = notifier(&guest);
    notifier.queue(0);
    notifier.queue(1);
    notifier.config();
    let delivered = [0, 1, 2].map(|vector| guest.msi.vector(vector).delivered);
    assert_eq!(delivered, [1, 0, 1], "queue 1 has no vector");
    assert_eq!(guest.irq.rises(), 0);
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 102,
    };
    assert_eq!(guest.msi.vector(2).message, Some(message));
    assert_eq!(guest.msi.vector(2).routed, 1, "only when the mask went");

    guest.write_u16(0x1a, 3);
    assert_eq!(guest.read_u16(0x1a), 0xffff, "there is no such vector");
    guest.set_status(0);
    assert_eq!(guest.read_u16(0x10), 0xffff);
}

#[test]
fn masked_vectors_are_pending_until_unmasked() {
    let guest = Guest::new();
    guest.enable_memory();
    enable_msix(&guest);
    guest.start();
    guest.write_u16(0x16, 1);
    guest.write_u16(0x1a, 1);
    let notifier = notifier(&guest);

    guest.write_u32(TABLE + 16 + 12, 1);
    notifier.queue(1);
    assert_eq!(guest.msi.vector(1).delivered, 0);
    assert_eq!(guest.bar_read::<8>(PENDING), 2_u64.to_le_bytes());
    guest.write_u32(TABLE + 16 + 12, 0);
    assert_eq!(guest.msi.vector(1).delivered, 1);
    assert_eq!(guest.read_u32(PENDING), 0);

    let control = guest.capability(0x11, 0).at + 3;
    guest.config_write(control, &[0xc0]);
    notifier.queue(1);
    assert_eq!(guest.bar_read::<1>(PENDING), [2]);
    guest.config_write(control, &[0x80]);
    assert_eq!(guest.msi.vector(1).delivered, 2);
}

#[test]
fn no_pending_interrupt_survives_a_reset() {
    let resets: [fn(&Guest); 2] = [|guest| guest.set_status(0), |guest| guest.host.reset_all()];
    for reset in resets {
        let guest = Guest::new();
        guest.enable_memory();
        enable_msix(&guest);
        guest.start();
        guest.write_u16(0x16, 1);
        guest.write_u16(0x1a, 1);
        guest.write_u32(TABLE + 16 + 12, 1);
        notifier(&guest).queue(1);
        assert_eq!(guest.read_u32(PENDING), 2);

        reset(&guest);
        guest.enable_memory();
        assert_eq!(guest.read_u32(PENDING), 0);
        enable_msix(&guest);
        assert_eq!(guest.msi.vector(1).delivered, 0);
    }
}

#[test]
fn the_msix_table_is_accessed_by_dwords() {
    let guest = Guest::new();
    guest.enable_memory();
    assert_eq!(guest.read_u32(TABLE + 12), 1, "masked after reset");
    guest.bar_write(TABLE, &0x1122_3344_5566_7788_u64.to_le_bytes());
    guest.bar_write(TABLE + 8, &[0xff; 2]);
    assert_eq!(
        guest.bar_read::<8>(TABLE),
        0x1122_3344_5566_7788_u64.to_le_bytes()
    );
    assert_eq!(guest.bar_read::<2>(TABLE + 3), [0x55, 0x44]);
    assert_eq!(guest.read_u32(TABLE + 8), 0);
    guest.write_u32(TABLE + 12, u32::MAX);
    assert_eq!(guest.read_u32(TABLE + 12), 1);
    assert_eq!(
        guest.read_u32(TABLE + 48),
        u32::MAX,
        "beyond the last vector"
    );
}

#[test]
fn the_device_config_changes_under_a_generation() {
    let guest = Guest::new();
    guest.start();
    guest.bar_write(0x802, &[7, 8]);
    assert_eq!(guest.bar_read::<8>(0x800), [0, 0, 7, 8, 0, 0, 0, 0]);
    let before = guest.bar_read::<1>(0x15);
    notifier(&guest).config();
    assert_ne!(guest.bar_read::<1>(0x15), before);
    assert_eq!(guest.bar_read::<1>(0x100), [2]);
}

#[test]
fn config_writes_come_with_the_negotiated_features() {
    let guest = Guest::new();
    let features_of_write = || {
        lock(&guest.log).config_features = u64::MAX;
        guest.bar_write(0x800, &[1]);
        lock(&guest.log).config_features
    };
    guest.enable_memory();
    guest.set_status(3);
    guest.write_features(VERSION_1 | FEATURES);
    assert_eq!(features_of_write(), 0);
    guest.set_status(11);
    assert_eq!(features_of_write(), VERSION_1 | FEATURES);
    guest.negotiate(VERSION_1);
    assert_eq!(features_of_write(), VERSION_1);
}

#[test]
fn a_reset_gives_everything_back() {
    let guest = Guest::new();
    for round in 1..=3 {
        guest.start();
        guest.offer(0, 0);
        guest.write_u16(NOTIFY, 0);
        guest.set_status(0);
        let log = lock(&guest.log);
        assert_eq!((log.activations, log.deactivations), (round, round));
        drop(log);
        assert_eq!(guest.status(), 0);
        guest.write_u16(0x16, 0);
        assert_eq!(guest.read_u16(0x1c), 0);
        assert_eq!(guest.read_u32(0x20), 0);
        guest.write_u32(8, 1);
        assert_eq!(guest.read_u32(0xc), 0);
    }
}

#[test]
fn every_reset_reaches_the_device_once_it_is_stopped() {
    let guest = Guest::new();
    let resets: [fn(&Guest); 2] = [|guest| guest.set_status(0), |guest| guest.host.reset_all()];
    for reset in resets {
        guest.start();
        guest.bar_write(0x800, &[7]);
        lock(&guest.function).suspend();
        lock(&guest.function).resume();
        assert_eq!(guest.bar_read::<1>(0x800), [7], "no reset");
        reset(&guest);
        assert_eq!(lock(&guest.log).config[0], 0);
    }
}

#[test]
fn a_machine_reset_resets_configuration_space_too() {
    let guest = Guest::new();
    guest.enable_memory();
    enable_msix(&guest);
    guest.start();
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    guest.host.reset_all();
    assert_eq!(guest.config_read(0x10), BAR as u32);
    assert_eq!(guest.config_read(4) & 0xffff, 0);
    assert_eq!(guest.msi.vector(0).message, None);
    assert_eq!(guest.machine.doorbells.addresses(), NONE);
    assert_eq!(lock(&guest.log).deactivations, 1);
    guest.start();
    assert_eq!(guest.status(), 15);
    assert_eq!(guest.bar_read::<8>(TABLE + 8), [0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn the_window_reaches_the_bar_without_decoding_it() {
    let guest = Guest::new();
    let window = guest.capability(9, 5).at;
    let set_up = |offset: u32, len: u32| {
        guest.config_write(window + 4, &[0]);
        guest.config_write(window + 8, &offset.to_le_bytes());
        guest.config_write(window + 12, &len.to_le_bytes());
    };
    set_up(0x14, 1);
    guest.config_write(window + 16, &[3]);
    assert_eq!(guest.config_read(window + 16) & 0xff, 3);
    set_up(0x12, 2);
    assert_eq!(guest.config_read(window + 16) & 0xffff, 2);
    guest.config_write(window + 8, &4_u32.to_le_bytes());
    guest.config_write(window + 12, &4_u32.to_le_bytes());
    assert_eq!(guest.config_read(window + 16), FEATURES as u32);

    guest.start();
    notifier(&guest).queue(0);
    guest.config_write(window + 12, &1_u32.to_le_bytes());
    guest.config_write(window + 8, &0x100_u32.to_le_bytes());
    assert!(
        guest.irq.level(),
        "moving the window to ISR does not read it"
    );
    set_up(0x100, 1);
    assert_eq!(guest.config_read(window + 16) & 0xff, 1);
    assert!(!guest.irq.level());
}

#[test]
fn a_device_that_can_not_start_needs_a_reset() {
    let guest = Guest::new();
    lock(&guest.log).fail = true;
    guest.start();
    assert_eq!(guest.status(), 0x4f);
    assert_eq!(guest.bar_read::<1>(0x100), [2]);
    assert_eq!(guest.machine.doorbells.addresses(), NONE);
    guest.start();
    assert_eq!(guest.status(), 15);
}

#[test]
fn a_broken_driver_is_asked_for_a_reset() {
    let guest = Guest::new();
    guest.start();
    notifier(&guest).needs_reset(&DriverError::Chain("it is endless"));
    assert_eq!(guest.status(), 0x4f);
    assert!(guest.irq.level());
    assert_eq!(guest.bar_read::<1>(0x100), [2]);
}
