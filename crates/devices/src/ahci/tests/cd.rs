//! CD-ROM drives and their driver.

use super::*;

const TEST_UNIT_READY: [u8; 6] = [0; 6];
const READ_CAPACITY: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const POLL: [u8; 9] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8];

#[test]
fn a_drive_describes_itself() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.cd
            .run(&mut rig.ahci, &Ata::new(0xa1, 0, 0), &[(DATA, 512)]),
        0x50
    );
    assert_eq!(word(&rig.cd.bytes(DATA, 512), 0), 0x85c0);
    // A driver that takes it for a disk learns what it is.
    assert_eq!(
        rig.cd
            .run(&mut rig.ahci, &Ata::new(0xec, 0, 0), &[(DATA, 512)]),
        0x451
    );
    assert_eq!(rig.cd.bytes(rig.cd.received(0x40) + 5, 2), [0x14, 0xeb]);
    rig.cd.restart(&mut rig.ahci);
    let inquiry = rig.answer(&[0x12, 0, 0, 0, 96], 96);
    assert_eq!((inquiry.len(), inquiry[0], inquiry[1]), (36, 5, 0x80));
    assert_eq!(&inquiry[8..24], b"edgevmm CD-ROM  ");
    let pages = rig.answer(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 96], 96);
    assert_eq!(usize::from(pages[1]) + 2, pages.len());
    let configuration = rig.answer(&[0x46, 0, 0, 0, 0, 0, 0, 0, 96], 96);
    assert_eq!(usize::from(configuration[3]) + 4, configuration.len());
    assert_eq!(configuration[7], 8);
    assert_eq!(
        rig.refusal(&[0x5a, 0, 0x05, 0, 0, 0, 0, 0, 96], 96),
        [5, 0x24, 0]
    );
    assert_eq!(rig.refusal(&[0xff], 0), [5, 0x20, 0]);
}

#[test]
fn blocks_are_read() {
    let mut rig = Rig::new();
    let capacity = rig.answer(&READ_CAPACITY, 8);
    assert_eq!(capacity, [0, 0, 1, 0xff, 0, 0, 8, 0]);
    for read in [
        &[0x28, 0, 0, 0, 0, 9, 0, 0, 3, 0][..],
        &[0xa8, 0, 0, 0, 0, 9, 0, 0, 0, 3],
        &[0xbe, 0, 0, 0, 0, 9, 0, 0, 3, 0x10],
    ] {
        assert_eq!(rig.answer(read, 6144), pattern(9 * 2048, 6144));
    }
    let past_the_end = [0x28, 0, 0, 0, 1, 0xff, 0, 0, 2, 0];
    assert_eq!(rig.refusal(&past_the_end, 4096), [5, 0x21, 0]);
    let toc = rig.answer(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64], 64);
    assert_eq!(toc[..4], [0, 18, 1, 1]);
    assert_eq!(toc[14..], [0xaa, 0, 0, 0, 2, 0]);
    let toc = rig.answer(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 64], 64);
    // 512 blocks and the gap before them.
    assert_eq!(toc[8..], [0, 0, 8, 62]);
    assert_eq!(rig.answer(&[0x51, 0, 0, 0, 0, 0, 0, 0, 34], 34)[1], 32);
}

#[test]
fn media_are_changed_and_the_guest_learns_of_it() {
    let mut rig = Rig::with(|_| (), |disk| disk, None);
    assert_eq!(rig.refusal(&TEST_UNIT_READY, 0), [2, 0x3a, 1]);
    assert_eq!(rig.answer(&POLL, 8)[4..6], [0, 0]);
    rig.media.insert(disc(2048 * 3), false).unwrap();
    assert_eq!(rig.answer(&POLL, 8)[4..6], [2, 2]);
    assert_eq!(rig.answer(&POLL, 8)[4..6], [0, 2]);
    assert_eq!(rig.refusal(&TEST_UNIT_READY, 0), [6, 0x28, 0]);
    assert_eq!(rig.packet(&TEST_UNIT_READY, 0), 0x50);
    assert_eq!(rig.answer(&READ_CAPACITY, 8)[3], 2);
    rig.media.insert(disc(2048 * 5), false).unwrap();
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [6, 0x28, 0]);
    assert_eq!(rig.answer(&READ_CAPACITY, 8)[3], 4);
    rig.media.eject(false).unwrap();
    assert_eq!(rig.answer(&POLL, 8)[4..6], [3, 1]);
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [2, 0x3a, 2]);
}

#[test]
fn a_locked_tray_is_opened_by_force_only() {
    let mut rig = Rig::new();
    rig.answer(&[0x1e, 0, 0, 0, 1], 0);
    assert_eq!(rig.media.eject(false), Err(MediaError::Locked));
    assert_eq!(rig.answer(&POLL, 8)[4..6], [1, 2]);
    assert_eq!(rig.refusal(&[0x1b, 0, 0, 0, 2], 0), [5, 0x53, 2]);
    rig.answer(&[0x1e, 0, 0, 0, 0], 0);
    rig.media.eject(false).unwrap();
    rig.media.insert(disc(4096), false).unwrap();
    rig.refusal(&TEST_UNIT_READY, 0);
    rig.answer(&[0x1e, 0, 0, 0, 1], 0);
    assert_eq!(rig.media.insert(disc(6144), false), Err(MediaError::Locked));
    rig.media.insert(disc(6144), true).unwrap();
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [6, 0x28, 0]);
    assert_eq!(rig.answer(&READ_CAPACITY, 8)[3], 2);
}

#[test]
fn the_guest_moves_the_tray() {
    let mut rig = Rig::new();
    rig.answer(&[0x1b, 0, 0, 0, 2], 0);
    assert_eq!(rig.answer(&POLL, 8)[4..6], [3, 1]);
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [2, 0x3a, 2]);
    // It stays open when the machine is reset.
    rig.ahci.reset();
    rig.cd.start(&mut rig.ahci);
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [2, 0x3a, 2]);
    rig.answer(&[0x1b, 0, 0, 0, 3], 0);
    assert_eq!(rig.refusal(&READ_CAPACITY, 8), [6, 0x28, 0]);
    assert_eq!(rig.answer(&READ_CAPACITY, 8)[2..4], [1, 0xff]);
}

#[test]
fn a_disc_that_is_cut_short_has_an_unreadable_end() {
    let mut rig = Rig::with(|_| (), |disk| disk, Some(disc(2048 + 1024)));
    assert_eq!(rig.answer(&READ_CAPACITY, 8)[3], 1);
    assert_eq!(
        rig.answer(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1], 2048),
        pattern(0, 2048)
    );
    assert_eq!(
        rig.refusal(&[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 2048),
        [3, 0x11, 0]
    );
}
