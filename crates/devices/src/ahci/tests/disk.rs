//! Disks and their driver.

use std::sync::atomic::Ordering;

use super::*;

#[test]
fn a_driver_finds_the_drives() {
    let mut rig = Rig::new();
    assert_eq!(rig.ahci.read(0x0c), 0x3f);
    assert_eq!(rig.ahci.read(0x10), 0x0001_0301);
    // Commands, ports and 64-bit addresses.
    assert_eq!(rig.ahci.read(0) & 0x8000_1fff, 0x8000_1f05);
    assert_eq!(rig.disk.get(&mut rig.ahci, SIG), 0x101);
    assert_eq!(rig.cd.get(&mut rig.ahci, SIG), 0xeb14_0101);
    assert_eq!(rig.disk.get(&mut rig.ahci, SSTS) & 0xf, 3);
    let empty = Port::new(rig.memory(), 2);
    assert_eq!(empty.get(&mut rig.ahci, SSTS), 0);
    assert_eq!(empty.get(&mut rig.ahci, SIG), u32::MAX);
    assert_eq!(rig.ahci.read(0x100 + 0x80 * 6 + SIG), 0);
}

#[test]
fn a_disk_describes_itself() {
    let mut rig = Rig::new();
    assert_eq!(rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]), 0x50);
    let page = rig.disk.bytes(DATA, 512);
    assert_eq!(
        page.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
        0
    );
    assert_eq!(&page[20..40], b"ns1-                ");
    assert_eq!(&page[54..68], b"deegmv midks  ");
    let sectors = u32::from(word(&page, 60)) | u32::from(word(&page, 61)) << 16;
    assert_eq!(u64::from(sectors), DISK / 512);
    assert_eq!(
        (word(&page, 100), word(&page, 75), word(&page, 76) >> 8),
        (8192, 31, 1)
    );
    // It came by PIO.
    assert_eq!(rig.disk.get(&mut rig.ahci, PORT_IS) & 3, 2);
    let setup = rig.disk.bytes(rig.disk.received(0x20), 20);
    assert_eq!((setup[0], setup[2], setup[15]), (0x5f, 0x58, 0x50));
}

#[test]
fn disks_of_longer_sectors_count_by_those() {
    let (mut rig, disk) = faults::faulty(crate::disk::ErrorPolicy::Stop);
    disk.logical_block.store(4096, Ordering::SeqCst);
    assert_eq!(rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]), 0x50);
    let page = rig.disk.bytes(DATA, 512);
    // 2048 words in each of 1024 sectors.
    let words = [60, 61, 100, 101, 106, 117, 118].map(|at| word(&page, at));
    assert_eq!(words, [1024, 0, 1024, 0, 0x5000, 2048, 0]);
    let read = Ata::new(0x25, 1023, 1);
    assert_eq!(rig.run(&read, &[(DATA, 4096)]), 0x50);
    assert_eq!(rig.disk.bytes(DATA, 4096), pattern(1023 * 4096, 4096));
    let read = Ata::queued(0x60, 0, 5, 2);
    assert_eq!(rig.run(&read, &[(DATA, 8192)]), 0x50);
    assert_eq!(rig.disk.bytes(DATA, 8192), pattern(5 * 4096, 8192));
    assert_eq!(rig.run(&Ata::new(0x25, 1023, 2), &[(DATA, 8192)]), 0x1051);
}

#[test]
fn sectors_are_read_by_every_command() {
    let mut rig = Rig::new();
    for command in [0x20, 0x24, 0x29, 0xc4, 0xc8, 0x25] {
        rig.disk.put(DATA, &[0; 4096]);
        // Odd places in memory, and more of it than needed.
        let pieces = [(DATA + 2, 1000), (DATA + 2048, 1002), (DATA + 4096, 4096)];
        assert_eq!(rig.run(&Ata::new(command, 77, 4), &pieces), 0x50);
        let got = [
            rig.disk.bytes(DATA + 2, 1000),
            rig.disk.bytes(DATA + 2048, 1002),
            rig.disk.bytes(DATA + 4096, 46),
        ];
        assert_eq!(got.concat(), pattern(77 * 512, 2048), "{command:#x}");
        let moved = rig.disk.bytes(rig.disk.header(0) + 4, 4);
        assert_eq!(moved, 2048_u32.to_le_bytes());
    }
}

#[test]
fn sectors_are_written_by_every_command() {
    let mut rig = Rig::new();
    for command in [0x30, 0x34, 0x39, 0xc5, 0xca, 0x35, 0x3d, 0xce] {
        rig.disk.put(DATA, &[command; 1024]);
        let ata = Ata::new(command, u64::from(command), 2);
        assert_eq!(rig.run(&ata, &[(DATA, 1024)]), 0x50);
        assert_eq!(rig.stored(u64::from(command) * 512, 1024), [command; 1024]);
    }
    assert_eq!(rig.run(&Ata::new(0xea, 0, 0), &[]), 0x50);
    // Up to 65536 sectors at once, and 256 in 28 bits.
    let pieces: Vec<_> = (0..2).map(|_| (DATA, 2 << 20)).collect();
    assert_eq!(rig.run(&Ata::new(0x25, 0, 8192), &pieces), 0x50);
    assert_eq!(rig.run(&Ata::new(0xc8, 0, 0), &[(DATA, 1 << 20)]), 0x50);
    assert_eq!(
        rig.disk.bytes(rig.disk.header(0) + 4, 4),
        (256_u32 * 512).to_le_bytes()
    );
}

#[test]
fn queued_commands_are_done_side_by_side() {
    let mut rig = Rig::new();
    for round in 0..20_u64 {
        for slot in 0..32 {
            let lba = round * 256 + slot as u64 * 8;
            let place = DATA + slot as u64 * 4096;
            rig.disk.put(place, &[round as u8; 4096]);
            let command = if slot % 2 == 0 { 0x60 } else { 0x61 };
            rig.disk
                .prepare(slot, &Ata::queued(command, slot, lba, 8), &[(place, 4096)]);
        }
        rig.disk.set(&mut rig.ahci, SACT, u32::MAX);
        rig.disk.set(&mut rig.ahci, CI, u32::MAX);
        assert_eq!(rig.disk.wait(&mut rig.ahci, u32::MAX), 0x50);
        for slot in 0..32_u64 {
            let at = (round * 256 + slot * 8) * 512;
            if slot % 2 == 0 {
                assert_eq!(rig.disk.bytes(DATA + slot * 4096, 4096), pattern(at, 4096));
            } else {
                assert_eq!(rig.stored(at, 4096), [round as u8; 4096]);
            }
        }
    }
    assert_eq!(rig.disk.bytes(rig.disk.received(0x58), 1), [0xa1]);
}

#[test]
fn commands_that_are_not_queued_are_no_matter_of_their_active_bit() {
    let mut rig = Rig::new();
    // As SeaBIOS does.
    rig.disk.prepare(0, &Ata::new(0xec, 0, 0), &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, PORT_IS, u32::MAX);
    rig.disk.set(&mut rig.ahci, SACT, 1);
    rig.disk.set(&mut rig.ahci, CI, 1);
    assert_eq!(rig.disk.wait(&mut rig.ahci, 1), 0x50);
    assert_eq!(rig.disk.get(&mut rig.ahci, PORT_IS), 2);
    // Among others that are queued, one without its bit.
    for slot in 0..32 {
        let place = DATA + slot as u64 * 4096;
        let ata = if slot % 5 == 0 {
            Ata::new(0x25, slot as u64 * 8, 8)
        } else {
            Ata::queued(0x60, slot, slot as u64 * 8, 8)
        };
        rig.disk.prepare(slot, &ata, &[(place, 4096)]);
    }
    rig.disk.set(&mut rig.ahci, SACT, !2);
    rig.disk.set(&mut rig.ahci, CI, u32::MAX);
    assert_eq!(rig.disk.wait(&mut rig.ahci, u32::MAX), 0x50);
    let all = rig.disk.bytes(DATA, 32 * 4096);
    assert_eq!(all, pattern(0, 32 * 4096));
}

#[test]
fn what_can_not_be_done_is_refused() {
    let mut rig = Rig::new();
    let end = DISK / 512;
    let by_cylinder = Ata {
        device: 0,
        ..Ata::new(0xc8, 1, 1)
    };
    for (ata, error) in [
        (Ata::new(0x25, end - 1, 2), 0x10),
        (Ata::new(0x35, u64::MAX, 0), 0x10),
        (Ata::new(0xa0, 0, 0), 0x04),
        (Ata::new(0xb0, 0, 0), 0x04),
        (by_cylinder, 0x04),
    ] {
        let registers = rig.run(&ata, &[(DATA, 4096)]);
        assert_eq!(registers, error << 8 | 0x51, "{ata:x?}");
        assert_ne!(rig.disk.get(&mut rig.ahci, PORT_IS) & 0x4000_0000, 0);
        // Nothing is done before the driver has reacted.
        rig.disk.prepare(1, &Ata::new(0xec, 0, 0), &[(DATA, 512)]);
        rig.disk.set(&mut rig.ahci, CI, 2);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(rig.disk.get(&mut rig.ahci, CI), 3);
        rig.disk.restart(&mut rig.ahci);
    }
    assert_eq!(rig.run(&Ata::new(0x25, end - 1, 1), &[(DATA, 512)]), 0x50);
}

#[test]
fn a_failed_queued_command_is_in_the_log() {
    let mut rig = Rig::new();
    rig.disk
        .prepare(3, &Ata::queued(0x60, 3, DISK / 512, 1), &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, SACT, 8);
    rig.disk.set(&mut rig.ahci, CI, 8);
    assert_eq!(rig.disk.wait(&mut rig.ahci, 8), 0x1051);
    assert_eq!(rig.disk.get(&mut rig.ahci, SACT), 8);
    rig.disk.restart(&mut rig.ahci);
    let log = Ata::new(0x2f, 0x10, 1);
    assert_eq!(rig.run(&log, &[(DATA, 512)]), 0x50);
    let page = rig.disk.bytes(DATA, 512);
    assert_eq!(page[..4], [3, 0, 0x51, 0x10]);
    assert_eq!(page[4..7], [0, 0x20, 0]);
    assert_eq!(
        page.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
        0
    );
    // It is told once.
    assert_eq!(rig.run(&log, &[(DATA, 512)]), 0x50);
    assert_eq!(rig.disk.bytes(DATA, 1), [0x80]);
    // A tag that is another slot's.
    rig.disk
        .prepare(3, &Ata::queued(0x60, 4, 0, 1), &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, SACT, 8);
    rig.disk.set(&mut rig.ahci, CI, 8);
    assert_eq!(rig.disk.wait(&mut rig.ahci, 8), 0x0451);
}

#[test]
fn trims_discard_what_they_name() {
    let mut rig = Rig::new();
    let mut ranges = [0; 512];
    // The middle two are one.
    let entries = [(8, 8), (64, 64), (128, 64), (0, 0), (1024, 8_u16)];
    for (entry, (sector, count)) in ranges.chunks_exact_mut(8).zip(entries) {
        entry.copy_from_slice(&((u64::from(count) << 48) | sector).to_le_bytes());
    }
    rig.disk.put(DATA, &ranges);
    let trim = Ata {
        features: 1,
        ..Ata::new(0x06, 0, 1)
    };
    assert_eq!(rig.run(&trim, &[(DATA, 512)]), 0x50);
    for (sector, count) in entries {
        let len = usize::from(count) * 512;
        assert_eq!(rig.stored(sector * 512, len), vec![0; len]);
    }
    assert_eq!(rig.stored(512 * 16, 512), pattern(512 * 16, 512));
    ranges[..8].copy_from_slice(&((1_u64 << 48) | (DISK / 512)).to_le_bytes());
    rig.disk.put(DATA, &ranges);
    assert_eq!(rig.run(&trim, &[(DATA, 512)]), 0x1051);
}

#[test]
fn resets_show_the_signature_again() {
    let mut rig = Rig::new();
    let reset = |control| Ata {
        control,
        ..Ata::default()
    };
    assert_eq!(rig.cd.run(&mut rig.ahci, &reset(4), &[]) & 0xff, 0x80);
    assert_eq!(rig.cd.run(&mut rig.ahci, &reset(0x80), &[]), 0x150);
    assert_eq!(
        rig.cd.bytes(rig.cd.received(0x40), 8)[4..7],
        [1, 0x14, 0xeb]
    );
    // By the link.
    rig.disk.set(&mut rig.ahci, SCTL, 0x301);
    assert_eq!(rig.disk.get(&mut rig.ahci, SSTS), 0);
    assert_eq!(rig.disk.get(&mut rig.ahci, CMD) & 0x8001, 0);
    rig.disk.set(&mut rig.ahci, SCTL, 0x300);
    assert_eq!(rig.disk.get(&mut rig.ahci, SSTS), 0x123);
    assert_eq!(rig.disk.get(&mut rig.ahci, TFD), 0x150);
    assert_eq!(rig.disk.get(&mut rig.ahci, PORT_IS) & 0x40, 0x40);
    rig.disk.set(&mut rig.ahci, SERR, u32::MAX);
    assert_eq!(rig.disk.get(&mut rig.ahci, PORT_IS) & 0x40, 0);
    // Of the adapter, which keeps the addresses only.
    rig.ahci.write(4, 1);
    assert_eq!(rig.ahci.read(4), 1 << 31);
    assert_eq!(rig.disk.get(&mut rig.ahci, PORT_IE), 0);
    assert_ne!(rig.disk.get(&mut rig.ahci, CLB), 0);
    rig.disk.start(&mut rig.ahci);
    assert_eq!(rig.run(&Ata::new(0xc8, 0, 1), &[(DATA, 512)]), 0x50);
}

#[test]
fn the_interrupt_pin_is_up_until_all_causes_are_gone() {
    let mut rig = Rig::new();
    assert!(!rig.irq.level());
    rig.run(&Ata::new(0xe7, 0, 0), &[]);
    rig.packet(&[0; 6], 0);
    assert!(rig.irq.level());
    assert_eq!(rig.ahci.read(8), 3);
    // What is cleared in the wrong order comes again.
    rig.ahci.write(8, 1);
    assert_eq!(rig.ahci.read(8), 3);
    rig.disk.set(&mut rig.ahci, PORT_IS, u32::MAX);
    rig.ahci.write(8, 1);
    assert!(rig.irq.level());
    rig.cd.set(&mut rig.ahci, PORT_IS, u32::MAX);
    rig.ahci.write(8, 2);
    assert!(!rig.irq.level());
    // Without the driver's wish none comes.
    rig.disk.set(&mut rig.ahci, PORT_IE, 0);
    rig.run(&Ata::new(0xe7, 0, 0), &[]);
    assert!(!rig.irq.level());
    rig.disk.set(&mut rig.ahci, PORT_IE, 1);
    assert!(rig.irq.level());
}

#[test]
fn messages_come_for_every_command() {
    let mut rig = Rig::new();
    let mut write = |at: u16, value: u32| rig.ahci.config_write(at, &value.to_le_bytes());
    write(0x44, 0xfee0_0000);
    write(0x4c, 0x41);
    write(0x40, 1 << 16);
    let before = rig.msi.vector(0).delivered;
    for _ in 0..5 {
        rig.run(&Ata::new(0xe5, 0, 0), &[]);
    }
    assert_eq!(rig.msi.vector(0).delivered, before + 5);
    assert!(!rig.irq.level());
    assert_eq!(rig.disk.bytes(rig.disk.received(0x40) + 12, 1), [0xff]);
}

#[test]
fn the_cache_can_be_turned_off_and_features_are_told() {
    let mut rig = Rig::new();
    let feature = |features| Ata {
        features,
        ..Ata::new(0xef, 0, 0)
    };
    assert_eq!(rig.run(&feature(0x82), &[]), 0x50);
    assert_eq!(rig.run(&feature(0x55), &[]), 0x50);
    rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]);
    assert_eq!(word(&rig.disk.bytes(DATA, 512), 85), 0);
    assert_eq!(rig.run(&Ata::new(0x35, 1, 1), &[(DATA, 512)]), 0x50);
    assert_eq!(rig.run(&feature(0x02), &[]), 0x50);
    rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]);
    assert_eq!(word(&rig.disk.bytes(DATA, 512), 85), 0x20);
    assert_eq!(rig.run(&feature(0x10), &[]), 0x451);
}
