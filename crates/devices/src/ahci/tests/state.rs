//! Saved states.

use std::sync::atomic::Ordering;

use super::faults::faulty;
use super::*;
use crate::disk::ErrorPolicy;

fn through_text(state: &AhciState) -> AhciState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn another_adapter_goes_on_where_one_was() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    let off = Ata {
        features: 0x82,
        ..Ata::new(0xef, 0, 0)
    };
    rig.run(&off, &[]);
    disk.errno.store(libc::EIO, Ordering::SeqCst);
    rig.disk.put(DATA, &[9; 512]);
    rig.disk.prepare(5, &Ata::new(0xca, 3, 1), &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, CI, 1 << 5);
    rig.control.wait_pauses(1);
    let state = rig.ahci.suspend();
    assert_eq!(state.ports[0].issued, 1 << 5);

    let mut other = Rig::with(|_| (), |disk| disk, None);
    for at in [rig.disk.header(0), rig.disk.table(0), DATA] {
        other.disk.put(at, &rig.disk.bytes(at, 0x4000));
    }
    other.ahci.restore(&through_text(&state)).unwrap();
    assert_eq!(other.irq.level(), rig.irq.level());
    assert_eq!(other.ahci.suspend(), state);
    assert_eq!(other.disk.get(&mut other.ahci, CI), 1 << 5);
    other.ahci.resume();
    assert_eq!(other.disk.wait(&mut other.ahci, 1 << 5), 0x50);
    assert_eq!(other.stored(3 * 512, 512), [9; 512]);
    other.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]);
    assert_eq!(word(&other.disk.bytes(DATA, 512), 85) & 0x20, 0);
}

#[test]
fn a_suspended_adapter_does_nothing() {
    let mut rig = Rig::new();
    rig.answer(&[0x1e, 0, 0, 0, 1], 0);
    let state = rig.ahci.suspend();
    let Some(DriveState::CdRom(cd)) = &state.ports[1].drive else {
        panic!();
    };
    assert!(cd.locked);
    rig.disk.prepare(0, &Ata::new(0xe7, 0, 0), &[]);
    rig.disk.set(&mut rig.ahci, CI, 1);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(rig.disk.get(&mut rig.ahci, CI), 1);
    rig.ahci.resume();
    assert_eq!(rig.disk.wait(&mut rig.ahci, 1), 0x50);
}

#[test]
fn states_that_can_not_be_are_refused() {
    let mut rig = Rig::new();
    let good = rig.ahci.suspend();
    let changes: [fn(&mut AhciState); 12] = [
        |state| state.ports.truncate(5),
        |state| state.pending = 1 << 6,
        |state| state.config.registers[0] ^= 1,
        |state| state.ports[0].command_list |= 1,
        |state| state.ports[0].received_fis |= 0x80,
        |state| state.ports[0].command |= 1 << 15,
        |state| state.ports[0].signature ^= 1,
        |state| state.ports[0].drive = None,
        |state| state.ports[0].drive = state.ports[1].drive.clone(),
        |state| state.ports[3].drive = state.ports[1].drive.clone(),
        |state| state.ports[0].task_file = 1 << 16,
        |state| {
            state.ports[2].issued = 1;
            state.ports[2].command &= !1;
        },
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(rig.ahci.restore(&bad).is_err(), "{number}");
    }
    rig.ahci.restore(&good).unwrap();
    rig.ahci.resume();
    assert_eq!(rig.run(&Ata::new(0xe7, 0, 0), &[]), 0x50);
}
