//! Functions that are saved and go on elsewhere.

use proptest::prelude::*;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use super::super::VirtioPciState;
use super::guest::{BAR, FEATURES, Guest, MEMORY_LEN, VERSION_1};
use super::{NONE, NOTIFY, PENDING, TABLE, enable_msix, eventually, notifier};
use crate::bus::lock;
use crate::pci::PciHostState;
use crate::state::StateError;

/// A machine as it is stored: bus, function and memory.
pub(super) struct Saved {
    host: PciHostState,
    pub(super) function: VirtioPciState,
    memory: Vec<u8>,
}

fn through_text<T: serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

pub(super) fn save(guest: &Guest) -> Saved {
    let function = lock(&guest.function).suspend();
    let mut memory = vec![0; MEMORY_LEN];
    guest
        .memory
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();
    Saved {
        host: through_text(&guest.host.state()),
        function: through_text(&function),
        memory,
    }
}

/// Puts `saved` into a new machine whose device is still suspended.
fn restore(saved: &Saved) -> Guest {
    let guest = Guest::new();
    restore_into(&guest, saved);
    guest
}

pub(super) fn restore_into(guest: &Guest, saved: &Saved) {
    let memory = &guest.memory;
    memory.write_slice(&saved.memory, GuestAddress(0)).unwrap();
    lock(&guest.function).restore(&saved.function).unwrap();
    guest.host.restore(&saved.host).unwrap();
}

pub(super) fn resume(guest: &Guest) {
    lock(&guest.function).resume();
}

/// All that a driver can read without side effects: configuration space, common configuration by
/// queue, device config, MSI-X table and pending bits.
fn seen(guest: &Guest) -> Vec<u32> {
    let mut seen: Vec<_> = (0..64).map(|n| guest.config_read(4 * n)).collect();
    let select = guest.read_u16(0x16);
    for queue in 0..3 {
        guest.write_u16(0x16, queue);
        seen.extend((0..16).map(|n| guest.read_u32(4 * n)));
    }
    guest.write_u16(0x16, select);
    for start in [0x800, TABLE, PENDING] {
        seen.extend((0..12).map(|n| guest.read_u32(start + 4 * n)));
    }
    seen
}

#[test]
fn a_restored_function_looks_the_same_at_each_step() {
    type Step = fn(&Guest);
    let steps: [(&str, Step); 9] = [
        ("decoding", Guest::enable_memory),
        ("MSI-X", enable_msix),
        ("status", |guest| guest.set_status(3)),
        ("features", |guest| {
            guest.write_features(VERSION_1 | FEATURES);
        }),
        ("negotiation", |guest| guest.set_status(11)),
        ("queue", |guest| {
            guest.write_u16(0x10, 0);
            guest.set_up_queue(1, 4);
            guest.write_u16(0x1a, 2);
        }),
        ("device config", |guest| guest.bar_write(0x800, &[7, 8])),
        ("driver", |guest| guest.set_status(15)),
        ("interrupt", |guest| {
            guest.write_u32(TABLE + 32 + 12, 1);
            notifier(guest).queue(1);
            notifier(guest).config();
        }),
    ];
    let guest = Guest::new();
    for (name, step) in steps {
        step(&guest);
        let saved = save(&guest);
        let restored = restore(&saved);
        assert_eq!(seen(&restored), seen(&guest), "{name}");
        assert_eq!(lock(&restored.function).suspend(), saved.function, "{name}");
        resume(&restored);
        assert_eq!(seen(&restored), seen(&guest), "{name}, resumed");
        resume(&guest);
    }
    assert_eq!(guest.read_u32(PENDING), 4);
    assert_eq!(guest.bar_read::<1>(0x100), [2]);
}

#[test]
fn io_goes_on_where_it_was() {
    let guest = Guest::new();
    guest.start();
    guest.offer(0, 0);
    guest.write_u16(NOTIFY, 0);
    eventually("work", || guest.used(0) == 1);
    assert_eq!(guest.bar_read::<1>(0x100), [1]);

    let first = save(&guest);
    let queue = first.function.common.queues[0];
    assert_eq!((queue.next_avail, queue.next_used), (1, 1));
    // Made available while nobody serves: whoever goes on finds it without a doorbell.
    guest.offer(0, 1);
    let saved = save(&guest);
    assert_eq!(saved.function, first.function);
    let restored = restore(&saved);
    assert_eq!(restored.used(0), 1, "suspended");
    for machine in [&restored, &guest] {
        resume(machine);
        eventually("the waiting work", || machine.used(0) == 2);
        machine.offer(0, 2);
        assert!(machine.machine.doorbells.ring(BAR + NOTIFY));
        eventually("new work", || machine.used(0) == 3);
        eventually("an interrupt", || machine.irq.level());
    }
    assert_eq!(
        lock(&restored.log).queues,
        [(0, 16, false, 1), (1, 4, false, 0)]
    );
}

#[test]
fn what_has_happened_since_is_gone_after_a_restore() {
    let guest = Guest::new();
    guest.start();
    let saved = save(&guest);
    resume(&guest);
    guest.offer(0, 0);
    guest.write_u16(NOTIFY, 0);
    eventually("an interrupt", || guest.irq.level());
    guest.config_write(0x10, &0xd000_0000_u32.to_le_bytes());

    restore_into(&guest, &saved);
    assert!(!guest.irq.level());
    assert_eq!(guest.status(), 15, "at the saved address");
    assert_eq!(
        guest.machine.doorbells.addresses(),
        [BAR + NOTIFY, BAR + NOTIFY + 4]
    );
    resume(&guest);
    guest.offer(0, 0);
    guest.write_u16(NOTIFY, 0);
    eventually("work", || guest.used(0) == 1);
}

#[test]
fn a_waiting_pin_interrupt_is_raised_again() {
    let guest = Guest::new();
    guest.start();
    notifier(&guest).queue(0);
    let restored = restore(&save(&guest));
    assert!(restored.irq.level());
    assert_eq!(restored.config_read(4) >> 19 & 1, 1);
    assert_eq!(restored.bar_read::<1>(0x100), [1]);
    assert!(!restored.irq.level());
}

#[test]
fn a_pending_vector_is_delivered_when_the_restored_driver_unmasks_it() {
    let guest = Guest::new();
    guest.enable_memory();
    enable_msix(&guest);
    guest.start();
    guest.write_u16(0x16, 1);
    guest.write_u16(0x1a, 1);
    guest.write_u32(TABLE + 16 + 12, 1);
    notifier(&guest).queue(1);
    let restored = restore(&save(&guest));
    assert_eq!(restored.read_u32(PENDING), 2);
    assert_eq!(restored.msi.vector(1).delivered, 0);
    restored.write_u32(TABLE + 16 + 12, 0);
    assert_eq!(restored.msi.vector(1).delivered, 1);
    assert_eq!(restored.read_u32(PENDING), 0);
}

#[test]
fn a_suspended_function_can_be_reset() {
    let guest = Guest::new();
    guest.start();
    let saved = save(&guest);
    guest.host.reset_all();
    resume(&guest);
    assert_eq!(lock(&guest.log).activations, 1);
    assert_eq!(guest.machine.doorbells.addresses(), NONE);
    let restored = restore(&saved);
    restored.set_status(0);
    resume(&restored);
    assert_eq!(lock(&restored.log).activations, 0);
    restored.start();
    assert_eq!(restored.status(), 15);
}

#[test]
fn a_broken_device_stays_broken_until_its_driver_resets_it() {
    let guest = Guest::new();
    guest.start();
    let driver = guest.memory.clone();
    // An available index beyond the queue's size.
    let [_, available, _] = Guest::rings(0);
    driver
        .write_obj(1000_u16, GuestAddress(available + 2))
        .unwrap();
    guest.write_u16(NOTIFY, 0);
    eventually("the failure", || guest.status() == 0x4f);
    let saved = save(&guest);
    assert!(!saved.function.active);
    resume(&guest);
    assert_eq!(lock(&guest.log).activations, 1);
    let restored = restore(&saved);
    resume(&restored);
    assert_eq!(restored.status(), 0x4f);
    restored.start();
    assert_eq!(restored.status(), 15);
}

#[test]
fn a_device_that_can_not_go_on_needs_a_reset() {
    let guest = Guest::new();
    guest.start();
    let restored = restore(&save(&guest));
    lock(&restored.log).fail = true;
    resume(&restored);
    assert_eq!(restored.status(), 0x4f);
    assert_eq!(restored.machine.doorbells.addresses(), NONE);
}

/// A running function's state.
fn running() -> VirtioPciState {
    let guest = Guest::new();
    guest.enable_memory();
    enable_msix(&guest);
    guest.start();
    save(&guest).function
}

#[test]
fn states_that_can_not_be_are_refused() {
    let good = running();
    let change: [fn(&mut VirtioPciState); 22] = [
        |s| s.config.registers.truncate(63),
        |s| s.config.registers[0] ^= 1,
        |s| s.config.registers[4] |= 0x10,
        |s| s.msix.table.truncate(2),
        |s| s.msix.pending.push(3),
        |s| s.interrupts.status = 0x10,
        |s| s.interrupts.status = 7,
        |s| s.interrupts.status |= 0x40,
        |s| s.interrupts.status = 11,
        |s| s.interrupts.isr = 4,
        |s| s.interrupts.config_vector = 3,
        |s| s.interrupts.queue_vectors[1] = 0xfffe,
        |s| s.interrupts.queue_vectors.push(0),
        |s| s.common.driver_features |= 1 << 63,
        |s| s.common.driver_features = 0,
        |s| s.common.queues.truncate(1),
        |s| s.common.queues[0].size = 3,
        |s| s.common.queues[0].size = 32,
        |s| s.common.queues[1].descriptors = 1 << 40,
        |s| s.common.queues[1].driver = MEMORY_LEN as u64 - 2,
        |s| s.common.queues[1].device += 1,
        |s| s.device = crate::virtio::DeviceState::Rng,
    ];
    let guest = Guest::new();
    for (number, change) in change.into_iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let refused = lock(&guest.function).restore(&state);
        let error = refused.expect_err(&number.to_string());
        assert!(!error.to_string().is_empty());
        assert_eq!(lock(&guest.log).activations, 0);
        assert_eq!(guest.machine.doorbells.addresses(), NONE);
        assert_eq!(
            guest.config_read(4) & 0xffff,
            0,
            "{number}: as after power-on"
        );
    }
    lock(&guest.function).restore(&good).unwrap();
}

#[test]
fn states_of_other_buses_are_refused() {
    let guest = Guest::new();
    let mut state = guest.host.state();
    state.bridge.registers[0] = 0;
    let error = guest.host.restore(&state).unwrap_err();
    assert!(matches!(error, StateError::OtherConfig { .. }), "{error}");
    let mut state = guest.host.state();
    state.reset_control = 1;
    let error = guest.host.restore(&state).unwrap_err();
    assert!(matches!(error, StateError::Impossible { .. }), "{error}");
}

/// Replaces the number at leaf `index` of `value` by another; counts down the leaves.
fn change_leaf(value: &mut Value, index: &mut usize, number: u64) {
    match value {
        Value::Array(values) => {
            for value in values {
                change_leaf(value, index, number);
            }
        }
        Value::Object(fields) => {
            for value in fields.values_mut() {
                change_leaf(value, index, number);
            }
        }
        Value::Number(_) => {
            if *index == 0 {
                *value = number.into();
            }
            *index = index.wrapping_sub(1);
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a state says, the function refuses it or serves its driver by the same rules.
    #[test]
    fn no_state_panics_or_hangs(
        changes in prop::collection::vec(
            (0_usize..130, prop_oneof![0_u64..0x100, any::<u16>().prop_map(u64::from), any::<u64>()]),
            1..6,
        ),
    ) {
        let mut value = serde_json::to_value(running()).unwrap();
        for (leaf, number) in changes {
            change_leaf(&mut value, &mut leaf.clone(), number);
        }
        let Ok(state) = serde_json::from_value::<VirtioPciState>(value) else {
            return Ok(());
        };
        let guest = Guest::new();
        if lock(&guest.function).restore(&state).is_ok() {
            guest.host.restore(&guest.host.state()).unwrap();
            resume(&guest);
            guest.offer(0, state.common.queues[0].next_avail);
            for offset in (0..0x4000).step_by(4) {
                guest.read_u32(offset);
            }
            guest.write_u16(NOTIFY, 0);
            lock(&guest.function).suspend();
        }
        guest.host.reset_all();
        guest.start();
        prop_assert_eq!(guest.status(), 15);
    }
}
