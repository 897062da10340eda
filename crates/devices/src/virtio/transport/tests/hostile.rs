//! Drivers that break the rules.

use proptest::prelude::*;

use super::guest::{BAR, Guest, MEMORY_LEN, VERSION_1};
use crate::bus::lock;

#[test]
fn rings_outside_of_memory_do_not_start_the_device() {
    let memory_end = MEMORY_LEN as u64;
    for register in [0x20, 0x28, 0x30] {
        for address in [
            memory_end,
            memory_end - 16,
            0xb000_0000,
            1 << 63,
            u64::MAX - 15,
        ] {
            let guest = Guest::new();
            guest.negotiate(VERSION_1);
            guest.write_u16(0x16, 0);
            for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(Guest::rings(0)) {
                guest.bar_write(register, &address.to_le_bytes());
            }
            guest.bar_write(register, &address.to_le_bytes());
            guest.write_u16(0x1c, 1);
            guest.set_status(15);
            assert_eq!(guest.status(), 0x4f, "{register:#x} {address:#x}");
            assert_eq!(lock(&guest.log).activations, 0);
        }
    }
}

#[test]
fn misaligned_rings_do_not_start_the_device() {
    for (register, off) in [(0x20, 8), (0x28, 1), (0x30, 2)] {
        let guest = Guest::new();
        guest.negotiate(VERSION_1);
        guest.write_u16(0x16, 0);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(Guest::rings(0)) {
            let off = if at == register { off } else { 0 };
            guest.bar_write(at, &(address + off).to_le_bytes());
        }
        guest.write_u16(0x1c, 1);
        guest.set_status(15);
        assert_eq!(guest.status(), 0x4f, "{register:#x}");
        guest.set_status(0);
        guest.start();
        assert_eq!(guest.status(), 15, "a reset mends it");
    }
}

#[test]
fn notifying_what_is_not_there_does_nothing() {
    let guest = Guest::new();
    guest.enable_memory();
    guest.write_u16(0x1000, 0);
    guest.start();
    for offset in [0x1001, 0x1008, 0x1ffc, 0x1ffe, 0x3ffc] {
        guest.write_u32(offset, u32::MAX);
    }
    assert_eq!(guest.used(0), 0);
    assert_eq!(guest.status(), 15);
}

#[test]
fn windows_onto_nothing_are_ignored() {
    let guest = Guest::new();
    let window = guest.capability(9, 5).at;
    for (bar, offset, len) in [
        (1, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x14, u32::MAX),
        (0, 0x15, 2),
        (0, 0x4000, 1),
        (0, u32::MAX, 1),
        (0, 0xffff_fffc, 4),
    ] {
        guest.config_write(window + 4, &[bar]);
        guest.config_write(window + 8, &offset.to_le_bytes());
        guest.config_write(window + 12, &len.to_le_bytes());
        guest.config_write(window + 16, &[1; 4]);
        guest.config_write(window + 4, &[0]);
        guest.config_write(window + 8, &0x14_u32.to_le_bytes());
        guest.config_write(window + 12, &1_u32.to_le_bytes());
        let status = guest.config_read(window + 16) & 0xff;
        assert_eq!(status, 0, "{bar} {offset:#x} {len:#x}");
    }
}

/// What a driver may do: configuration space, the BAR, or what makes the device run.
#[derive(Debug, Clone)]
enum Step {
    Config(u64, Vec<u8>),
    Bar(u64, Vec<u8>),
    Start,
    Signal,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let data = || {
        let len = prop::sample::select(vec![1_usize, 2, 3, 4, 8]);
        let byte = prop_oneof![Just(0_u8), Just(0xff), 0_u8..16, any::<u8>()];
        len.prop_flat_map(move |len| prop::collection::vec(byte.clone(), len))
    };
    let bar = prop_oneof![
        6 => 0_u64..0x40,
        1 => 0xfe_u64..0x106,
        1 => 0x7fe_u64..0x810,
        2 => 0xffc_u64..0x1010,
        2 => 0x1ffc_u64..0x2040,
        1 => 0x2ffc_u64..0x4004,
    ];
    prop_oneof![
        6 => (0_u64..0x110, data()).prop_map(|(at, data)| Step::Config(at, data)),
        12 => (bar, data()).prop_map(|(at, data)| Step::Bar(at, data)),
        2 => Just(Step::Start),
        1 => Just(Step::Signal),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_sequence_of_accesses_harms_us(steps in prop::collection::vec(step(), 1..150)) {
        let guest = Guest::new();
        guest.enable_memory();
        for step in steps {
            match step {
                Step::Config(at, mut data) => {
                    guest.config_write(at, &data);
                    guest.host.config_read(at, &mut data);
                }
                Step::Bar(at, mut data) => {
                    guest.bar_write(at, &data);
                    guest.host.window_read(BAR + at, &mut data);
                }
                Step::Start => {
                    guest.config_write(0x10, &0xc000_4000_u32.to_le_bytes());
                    guest.enable_memory();
                    guest.start();
                    prop_assert_eq!(guest.status(), 15);
                }
                Step::Signal => {
                    let notifier = lock(&guest.log).notifier.clone();
                    if let Some(notifier) = notifier {
                        notifier.queue(0);
                        notifier.config();
                    }
                }
                Step::Reset => guest.host.reset_all(),
            }
        }
        guest.host.reset_all();
        let log = lock(&guest.log);
        prop_assert_eq!(log.activations, log.deactivations);
        prop_assert!(guest.machine.doorbells.addresses().is_empty());
        prop_assert!(!guest.irq.level());
        drop(log);
        guest.start();
        prop_assert_eq!(guest.status(), 15);
    }
}
