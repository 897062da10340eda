//! Drivers that break the rules.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const HOST_FATAL: u32 = 1 << 29;
const OVERFLOW: u32 = 1 << 24;

/// Issues what is in slot 0, and waits for its end, which is fatal.
fn fails(rig: &mut Rig) -> u32 {
    rig.disk.set(&mut rig.ahci, CI, 1);
    rig.disk.wait(&mut rig.ahci, 1);
    let causes = rig.disk.get(&mut rig.ahci, PORT_IS);
    assert_ne!(causes & FATAL, 0);
    rig.disk.start(&mut rig.ahci);
    rig.disk.restart(&mut rig.ahci);
    causes
}

#[test]
fn structures_outside_of_memory_are_fatal() {
    let mut rig = Rig::new();
    let read = Ata::new(0xc8, 0, 8);
    let end = MEMORY as u64;
    // The list, at the very end of addresses too.
    for (low, high) in [(end as u32, 0), (0xffff_fc00, u32::MAX)] {
        rig.disk.set(&mut rig.ahci, CLB, low);
        rig.disk.set(&mut rig.ahci, CLB + 4, high);
        assert_eq!(fails(&mut rig) & FATAL, HOST_FATAL);
        rig.disk.set(&mut rig.ahci, CLB + 4, 0);
    }
    // The table, or its part about memory.
    rig.disk.put(end - 0x80, &read.fis());
    for table in [end, end - 0x80, u64::MAX] {
        rig.disk.prepare(0, &read, &[(DATA, 4096)]);
        rig.disk.put(rig.disk.header(0) + 8, &table.to_le_bytes());
        assert_eq!(fails(&mut rig) & FATAL, HOST_FATAL, "{table:#x}");
    }
    // The data.
    for address in [end, end - 1, u64::MAX - 100, u64::MAX] {
        rig.disk.prepare(0, &read, &[(DATA, 4), (address, 4096)]);
        assert_eq!(fails(&mut rig) & FATAL, HOST_FATAL, "{address:#x}");
    }
    // FISes that nobody receives.
    rig.disk.set(&mut rig.ahci, FB, 0xffff_ff00);
    rig.disk.set(&mut rig.ahci, FB + 4, u32::MAX);
    assert_eq!(rig.run(&read, &[(DATA, 4096)]), 0x50);
}

#[test]
fn too_little_memory_is_an_overflow() {
    let mut rig = Rig::new();
    for ata in [Ata::new(0xc8, 0, 8), Ata::new(0xca, 0, 8)] {
        for pieces in [&[][..], &[(DATA, 4095)], &[(DATA, 2), (DATA, 2)]] {
            rig.disk.prepare(0, &ata, pieces);
            assert_eq!(fails(&mut rig) & (FATAL | OVERFLOW), 1 << 30 | OVERFLOW);
        }
    }
    assert_eq!(rig.stored(0, 4096), pattern(0, 4096));
    // A description of the drive is cut off.
    rig.disk.put(DATA, &[0xee; 512]);
    assert_eq!(rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 100)]), 0x50);
    assert_eq!(rig.disk.bytes(DATA + 100, 2), [0xee; 2]);
}

#[test]
fn the_longest_list_of_memory_is_used_and_no_longer_one() {
    let mut rig = Rig::new();
    // All pieces lie over each other, and over what describes them.
    let read = Ata::new(0x25, 0, 8192);
    rig.disk.prepare(0, &read, &[]);
    let table = 0x80_0000;
    rig.disk.put(table, &read.fis());
    rig.disk
        .put(rig.disk.header(0) + 8, &u64::to_le_bytes(table));
    rig.disk.put(rig.disk.header(0), &[5, 0, 0xff, 0xff]);
    let mut piece = [0; 16];
    piece[..8].copy_from_slice(&(table + 0x80).to_le_bytes());
    piece[12..].copy_from_slice(&511_u32.to_le_bytes());
    for at in (table + 0x80..).step_by(16).take(65535) {
        rig.disk.put(at, &piece);
    }
    rig.disk.set(&mut rig.ahci, CI, 1);
    assert_eq!(rig.disk.wait(&mut rig.ahci, 1), 0x50);
    assert_eq!(rig.disk.bytes(table + 0x80, 512), pattern(DISK - 512, 512));
    piece[12..].copy_from_slice(&1_u32.to_le_bytes());
    for at in (table + 0x80..).step_by(16).take(65535) {
        rig.disk.put(at, &piece);
    }
    assert_eq!(fails(&mut rig) & FATAL, HOST_FATAL);
}

#[test]
fn frames_of_other_kinds_are_refused() {
    let mut rig = Rig::new();
    rig.disk.prepare(0, &Ata::new(0xe7, 0, 0), &[]);
    rig.disk.put(rig.disk.table(0), &[0x34]);
    assert_eq!(fails(&mut rig) & FATAL, 1 << 30);
    rig.disk.prepare(0, &Ata::new(0xe7, 0, 0), &[]);
    // Shorter than a register FIS.
    rig.disk.put(rig.disk.header(0), &[4]);
    assert_eq!(fails(&mut rig) & FATAL, 1 << 30);
}

#[test]
fn ports_without_drives_do_nothing() {
    let mut rig = Rig::new();
    let empty = Port::new(rig.memory(), 5);
    empty.start(&mut rig.ahci);
    empty.set(&mut rig.ahci, CI, u32::MAX);
    empty.set(&mut rig.ahci, SCTL, 1);
    empty.set(&mut rig.ahci, SCTL, 0);
    assert_eq!(empty.get(&mut rig.ahci, TFD), 0x7f);
    // Commands of a drive whose link is down wait.
    rig.disk.set(&mut rig.ahci, SCTL, 1);
    rig.disk.prepare(0, &Ata::new(0xe7, 0, 0), &[]);
    rig.disk.set(&mut rig.ahci, CMD, STARTED);
    rig.disk.set(&mut rig.ahci, CI, 1);
    assert_eq!(rig.disk.get(&mut rig.ahci, CI), 1);
    rig.disk.set(&mut rig.ahci, SCTL, 0);
    assert_eq!(rig.disk.wait(&mut rig.ahci, 1) & 0xff, 0x50);
}

#[test]
fn stopping_amid_commands_leaves_memory_alone() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        for slot in 0..32 {
            let ata = Ata::queued(0x60, slot, 0, 64);
            rig.disk.prepare(slot, &ata, &[(DATA, 32768)]);
        }
        rig.disk.set(&mut rig.ahci, SACT, u32::MAX);
        rig.disk.set(&mut rig.ahci, CI, u32::MAX);
        rig.disk.set(&mut rig.ahci, CMD, 0);
        rig.disk.put(DATA, &[0xee; 32768]);
        assert_eq!(rig.disk.bytes(DATA, 32768), [0xee; 32768]);
        rig.disk.set(&mut rig.ahci, CMD, STARTED);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Register(u64, Vec<u8>),
    Config(u16, u32),
    Memory(u64, Vec<u8>),
    Command(usize, u8, u8, [u8; 12], u32),
    Reset,
    Suspend,
}

fn step() -> impl Strategy<Value = Step> {
    let data = prop::sample::select(vec![1_usize, 2, 4, 8]).prop_flat_map(|len| {
        let byte = prop_oneof![Just(0_u8), Just(0xff), 0_u8..32, any::<u8>()];
        prop::collection::vec(byte, len)
    });
    let register = prop_oneof![2 => 0x100_u64..0x140, 2 => 0x180_u64..0x1c0, 1 => 0_u64..0x1010];
    let structure = prop_oneof![0x1_0000_u64..0x1_2400, 0x2_0000_u64..0x2_2400];
    prop_oneof![
        6 => (register, data.clone()).prop_map(|(at, data)| Step::Register(at, data)),
        1 => (0_u16..0x60, any::<u32>()).prop_map(|(at, value)| Step::Config(at & !3, value)),
        4 => (structure, data).prop_map(|(at, data)| Step::Memory(at, data)),
        8 => (0_usize..64, any::<u8>(), any::<u8>(), any::<[u8; 12]>(), 1_u32..0x8000)
            .prop_map(|(slot, command, count, packet, len)| {
                Step::Command(slot, command, count, packet, len)
            }),
        1 => Just(Step::Reset),
        1 => Just(Step::Suspend),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_accesses_harms_us(steps in prop::collection::vec(step(), 1..100)) {
        let mut rig = Rig::new();
        for step in steps {
            match step {
                Step::Register(at, mut data) => {
                    rig.ahci.bar_write(5, at, &data);
                    rig.ahci.bar_read(5, at, &mut data);
                }
                Step::Config(at, value) => rig.ahci.config_write(at, &value.to_le_bytes()),
                Step::Memory(at, data) => {
                    rig.memory().write_slice(&data, GuestAddress(at)).unwrap();
                }
                Step::Command(slot, command, count, packet, len) => {
                    let port = if slot < 32 { &rig.disk } else { &rig.cd };
                    let ata = Ata { packet, ..Ata::new(command, u64::from(packet[0]), count.into()) };
                    port.prepare(slot % 32, &ata, &[(DATA, len)]);
                    port.set(&mut rig.ahci, CI, 1 << (slot % 32));
                }
                Step::Reset => {
                    rig.ahci.reset();
                    rig.disk.start(&mut rig.ahci);
                    rig.cd.start(&mut rig.ahci);
                }
                Step::Suspend => {
                    let state = rig.ahci.suspend();
                    rig.ahci.restore(&state).unwrap();
                    rig.ahci.resume();
                }
            }
        }
        rig.ahci.reset();
        rig.disk.start(&mut rig.ahci);
        prop_assert_eq!(rig.run(&Ata::new(0xc8, 0, 1), &[(DATA, 512)]), 0x50);
    }
}
