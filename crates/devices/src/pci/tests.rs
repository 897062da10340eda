//! The bus as firmware and kernels see it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;

use proptest::prelude::*;

use super::config_memory::{BUS_LEN, FUNCTION_LEN, SLOT_LEN};
use super::config_space::{ConfigSpace, ConfigSpaceBuilder, Identity};
use super::*;
use crate::bus::{BusDevice, ConcurrentBusDevice, lock, shared};
use crate::platform::MachineRequest;
use crate::testing::MockControl;

const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xfec0_0000;
const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    subsystem_vendor: 0x9abc,
    subsystem: 0xdef0,
    class: 0x01_8000,
    revision: 7,
};

/// Two BARs of memory.
struct Memory {
    config: ConfigSpace,
    bars: [Vec<u8>; 2],
}

impl Memory {
    fn new(slot: PciSlot) -> Self {
        let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
        builder.memory_bar(0, 0x1000, 0xc000_1000).unwrap();
        builder.memory_bar(2, 0x100, 0).unwrap();
        builder.interrupt_pin_a();
        builder.capability(9, &[1, 2, 3], &[0, 0xf0]).unwrap();
        builder.capability(0x11, &[4; 10], &[]).unwrap();
        Self {
            config: builder.build(slot),
            bars: [vec![0; 0x1000], vec![0; 0x100]],
        }
    }

    fn bytes(&mut self, bar: u8, offset: u64, len: usize) -> &mut [u8] {
        let offset = offset as usize;
        &mut self.bars[usize::from(bar) / 2][offset..offset + len]
    }
}

impl PciFunction for Memory {
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset % 4) + data.len() <= 4);
        self.config.write(offset, data);
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(self.bytes(bar, offset, data.len()));
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.bytes(bar, offset, data.len()).copy_from_slice(data);
    }

    fn reset(&mut self) {
        self.config.reset();
    }
}

struct Machine {
    host: Arc<PciHost>,
    ports: PciConfigPorts,
    control: Arc<MockControl>,
}

impl Machine {
    /// A bus with functions in slots 1 and 2.
    fn new() -> Self {
        let mut host = PciHost::new(WINDOW).unwrap();
        for slot in [1, 2] {
            let function = Memory::new(host.slot(slot).unwrap());
            host.add(slot, shared(function)).unwrap();
        }
        let host = Arc::new(host);
        let control = Arc::<MockControl>::default();
        Self {
            ports: PciConfigPorts::new(host.clone(), control.clone()),
            host,
            control,
        }
    }

    fn read(&self, slot: u64, offset: u64) -> u32 {
        let mut data = [0; 4];
        let at = slot * SLOT_LEN as u64 + offset;
        PciEcam::new(self.host.clone()).read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, slot: u64, offset: u64, value: u32) {
        let at = slot * SLOT_LEN as u64 + offset;
        PciEcam::new(self.host.clone()).write(at, &value.to_le_bytes());
    }

    fn select(&mut self, address: u32) {
        self.ports.write(0, &address.to_le_bytes());
    }

    fn port_read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xff; len];
        self.ports.read(offset, &mut data);
        data
    }

    fn window_read(&self, address: u64) -> u8 {
        let mut data = [0];
        PciWindow::new(self.host.clone()).read(address - WINDOW.start, &mut data);
        data[0]
    }

    fn window_write(&self, address: u64, value: u8) {
        PciWindow::new(self.host.clone()).write(address - WINDOW.start, &[value]);
    }
}

#[test]
fn the_header_says_who_is_there() {
    let machine = Machine::new();
    assert_eq!(machine.read(1, 0), 0x5678_1234);
    assert_eq!(machine.read(1, 8), 0x0180_0007);
    assert_eq!(machine.read(1, 0x2c), 0xdef0_9abc);
    assert_eq!(machine.read(1, 0x3c), 0x100);
    assert_eq!(machine.read(3, 0), u32::MAX);
    let function_1 = FUNCTION_LEN as u64;
    assert_eq!(machine.read(1, function_1), u32::MAX);
}

#[test]
fn the_bridge_is_what_seabios_looks_for() {
    let machine = Machine::new();
    assert_eq!(machine.read(0, 0), 0x29c0_8086);
    assert_eq!(machine.read(0, 8), 0x0600_0000);
    assert_eq!(machine.read(0, 0x2c), 0x1100_1af4);
    assert_eq!(machine.read(0, 0x90), 0);

    machine.write(0, 0x90, 0x3333_3330);
    machine.write(0, 0x94, 0xff33_3333);
    assert_eq!(machine.read(0, 0x90), 0x3333_3330);
    assert_eq!(machine.read(0, 0x94), 0x0033_3333);
    machine.write(0, 0x60, 0xb000_0001);
    assert_eq!(machine.read(0, 0x60), 0xb000_0001);
    machine.host.reset_all();
    assert_eq!(machine.read(0, 0x60), 0);
    assert_eq!(machine.read(0, 0x90), 0);
}

#[test]
fn the_face_is_changed_for_the_next_start() {
    let mut machine = Machine::new();
    machine.host.set_face(BridgeModel::CloudHypervisor, false);
    machine.host.reset_all();
    assert_eq!(machine.read(0, 0), 0x0d57_8086);
    machine.select(0x8000_0000);
    assert_eq!(machine.port_read(0, 4), [0xff; 4]);
    assert_eq!(machine.port_read(4, 4), [0xff; 4]);
    machine.ports.write(1, &[6]);
    assert_eq!(machine.control.requests(), [MachineRequest::Reset]);

    machine.host.set_face(BridgeModel::Q35, true);
    machine.select(0x8000_0000);
    assert_eq!(machine.port_read(4, 4), [0x86, 0x80, 0xc0, 0x29]);
}

#[test]
fn ecam_moves_in_the_window_to_where_ovmf_wants_it() {
    let host = Arc::new(PciHost::new(WINDOW).unwrap().with_movable_ecam(0xc800_0000));
    let window = PciWindow::new(host.clone());
    let read = |address: u64| {
        let mut data = [0; 4];
        window.read(address - WINDOW.start, &mut data);
        u32::from_le_bytes(data)
    };
    let bridge = |value: u32| {
        host.config_write(0x64, &[0; 4]);
        host.config_write(0x60, &value.to_le_bytes());
    };
    assert_eq!(read(0xc800_0000), 0x29c0_8086);
    bridge(0xe000_0000);
    assert_eq!(read(0xe000_0000), u32::MAX, "not enabled");
    bridge(0xe000_0001);
    assert_eq!(read(0xe000_0000), 0x29c0_8086);
    assert_eq!(read(0xc800_0000), u32::MAX, "no longer");
    assert_eq!(read(0xe010_0000), u32::MAX, "bus 1");
    assert_eq!(read(0xf000_0000), u32::MAX);
    // By itself it can go elsewhere.
    window.write(0xe000_0060 - WINDOW.start, &0xd000_0001_u32.to_le_bytes());
    assert_eq!(read(0xd000_0000), 0x29c0_8086);
    let state = host.state();
    host.reset_all();
    assert_eq!(read(0xd000_0000), u32::MAX);
    host.restore(&state).unwrap();
    assert_eq!(read(0xd000_0000), 0x29c0_8086);
}

#[test]
fn the_lpc_bridge_is_what_ovmf_looks_for() {
    let mut host = PciHost::new(WINDOW).unwrap();
    let lpc = shared(LpcBridge::new(host.slot(LpcBridge::SLOT).unwrap()));
    host.add(LpcBridge::SLOT, lpc.clone()).unwrap();
    let at = u64::from(LpcBridge::SLOT) * SLOT_LEN as u64;
    let read = |register: u64| {
        let mut data = [0; 4];
        host.config_read(at + register, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((read(0), read(8) >> 8), (0x2918_8086, 0x06_0100));
    for (register, value) in [
        (0x40, 0x600),
        (0x44, 0x80),
        (0x60, 0x0b0b_0a0a),
        (0xf0, 0xfed1_c001),
    ] {
        host.config_write(at + register, &u32::to_le_bytes(value));
        assert_eq!(read(register), value);
    }
    let state = lock(&lpc).state();
    host.reset_all();
    assert_eq!(read(0x40), 0);
    lock(&lpc).restore(&state).unwrap();
    assert_eq!(read(0xf0), 0xfed1_c001);
}

#[test]
fn capabilities_are_a_list() {
    let machine = Machine::new();
    assert_eq!(machine.read(1, 4) >> 16, 0x10);
    assert_eq!(machine.read(1, 0x34), 0x40);
    assert_eq!(machine.read(1, 0x40), 0x0201_4809);
    assert_eq!(machine.read(1, 0x48), 0x0404_0011);
    machine.write(1, 0x40, u32::MAX);
    assert_eq!(
        machine.read(1, 0x40),
        0xf201_4809,
        "one half byte is storage"
    );
}

#[test]
fn capabilities_end_where_the_space_does() {
    let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
    for _ in 0..11 {
        builder.capability(9, &[0; 14], &[]).unwrap();
    }
    let error = builder.capability(9, &[0; 14], &[]).unwrap_err();
    assert!(matches!(error, PciError::NoRoomForCapability(9)), "{error}");
}

#[test]
fn bad_bars_are_refused() {
    let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
    builder.memory_bar(5, 16, 0).unwrap();
    for (bar, len, address) in [(5, 16, 0), (6, 16, 0), (0, 8, 0), (0, 24, 0), (0, 32, 16)] {
        assert!(
            builder.memory_bar(bar, len, address).is_err(),
            "{bar} {len} {address}"
        );
    }
}

#[test]
fn bars_are_sized_by_writing_ones() {
    let machine = Machine::new();
    for (offset, expected) in [
        (0x10, 0xffff_f000),
        (0x14, 0),
        (0x18, 0xffff_ff00),
        (0x30, 0),
    ] {
        machine.write(1, offset, u32::MAX);
        assert_eq!(machine.read(1, offset), expected, "{offset:#x}");
    }
}

#[test]
fn bars_are_decoded_where_they_are_put_while_memory_is_enabled() {
    let machine = Machine::new();
    machine.window_write(0xc000_1000, 1);
    assert_eq!(machine.window_read(0xc000_1000), 0xff, "decoding is off");
    machine.write(1, 4, 2);
    machine.window_write(0xc000_1000, 1);
    assert_eq!(machine.window_read(0xc000_1000), 1);

    machine.write(1, 0x10, 0xd000_0000);
    assert_eq!(machine.window_read(0xc000_1000), 0xff);
    assert_eq!(machine.window_read(0xd000_0000), 1);
    machine.write(1, 0x18, 0xd000_1000);
    machine.window_write(0xd000_10ff, 2);
    assert_eq!(machine.window_read(0xd000_10ff), 2);
    assert_eq!(machine.window_read(0xd000_1100), 0xff);

    machine.host.reset_all();
    assert_eq!(machine.window_read(0xd000_0000), 0xff);
    assert_eq!(machine.read(1, 0x10), 0xc000_1000);
    assert_eq!(machine.read(1, 4) & 0xffff, 0);
}

#[test]
fn bars_outside_of_the_window_are_not_decoded() {
    let machine = Machine::new();
    machine.write(1, 4, 2);
    for base in [
        0,
        0x10_0000,
        0xb000_0000,
        0xbfff_f000,
        0xfec0_0000,
        0xffff_f000,
    ] {
        machine.write(1, 0x10, base);
        let mut data = [0; 4];
        machine.host.window_read(base.into(), &mut data);
        assert_eq!(data, [0xff; 4], "{base:#x}");
    }
    machine.write(1, 0x10, 0xfebf_f000);
    assert_eq!(machine.window_read(0xfebf_ffff), 0);
}

#[test]
fn overlapping_bars_go_to_the_lowest_slot() {
    let machine = Machine::new();
    for slot in [2, 1] {
        machine.write(slot, 0x10, 0xd000_0000);
        machine.write(slot, 4, 2);
    }
    machine.window_write(0xd000_0000, 1);
    machine.write(1, 4, 0);
    assert_eq!(machine.window_read(0xd000_0000), 0);
}

#[test]
fn accesses_across_the_end_of_a_bar_go_nowhere() {
    let machine = Machine::new();
    machine.write(1, 4, 2);
    machine.host.window_write(0xc000_1ffe, &[1; 4]);
    let mut data = [0; 4];
    machine.host.window_read(0xc000_1ffe, &mut data);
    assert_eq!(data, [0xff; 4]);
    machine.host.window_read(0xc000_1ffc, &mut data);
    assert_eq!(data, [0; 4]);
    machine.host.window_read(u64::MAX, &mut data);
    machine.host.window_read(u64::MAX, &mut []);
}

#[test]
fn ports_reach_what_ecam_does() {
    let mut machine = Machine::new();
    machine.select(0x8000_0800);
    assert_eq!(machine.port_read(0, 4), 0x8000_0800_u32.to_le_bytes());
    assert_eq!(machine.port_read(4, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(machine.port_read(6, 2), [0x78, 0x56]);
    assert_eq!(machine.port_read(7, 1), [0x56]);

    machine.select(0x8000_083c);
    machine.ports.write(4, &[11]);
    assert_eq!(machine.read(1, 0x3c), 0x10b);

    for elsewhere in [0x0000_0800, 0x8001_0800, 0x8000_0900, 0x8000_1800] {
        machine.select(elsewhere);
        assert_eq!(machine.port_read(4, 4), [0xff; 4], "{elsewhere:#x}");
        machine.ports.write(4, &[0; 4]);
    }
    machine.ports.write(0, &[1]);
    machine.ports.write(2, &[1, 2]);
    assert_eq!(machine.port_read(0, 4), 0x8000_1800_u32.to_le_bytes());
    assert_eq!(machine.port_read(0, 1), [0xff]);
}

#[test]
fn the_reset_register_resets_on_a_rising_edge() {
    let mut machine = Machine::new();
    machine.ports.write(1, &[0x02]);
    assert!(machine.control.requests().is_empty());
    machine.ports.write(1, &[0x06]);
    assert_eq!(machine.control.requests(), [MachineRequest::Reset]);
    assert_eq!(machine.port_read(1, 1), [0x06]);
    machine.ports.write(1, &[0x0e]);
    assert_eq!(machine.control.requests().len(), 1);
    machine.select(0x8000_0800);
    machine.host.reset_all();
    assert_eq!(machine.port_read(1, 1), [0]);
    assert_eq!(machine.port_read(0, 4), [0; 4]);
    machine.ports.write(1, &[0x0e]);
    assert_eq!(machine.control.requests().len(), 2);
}

#[test]
fn slots_are_given_once() {
    let mut host = PciHost::new(WINDOW).unwrap();
    assert!(matches!(host.slot(0), Err(PciError::SlotTaken(0))));
    assert!(matches!(host.slot(32), Err(PciError::NoSuchSlot(32))));
    let function = shared(Memory::new(host.slot(31).unwrap()));
    assert!(matches!(host.slot(31), Err(PciError::SlotTaken(31))));
    host.add(31, function.clone()).unwrap();
    let again = host.add(31, function.clone());
    assert!(matches!(again, Err(PciError::SlotTaken(31))));
    let beyond = host.add(32, function);
    assert!(matches!(beyond, Err(PciError::NoSuchSlot(32))));
}

#[test]
fn state_survives_a_round_trip_by_text() {
    let mut machine = Machine::new();
    machine.select(0x8000_0090);
    machine.ports.write(4, &[0x30]);
    let state = machine.host.state();
    assert_eq!(state.bridge.registers[0x90 / 4], 0x30);
    let text = serde_json::to_string(&state).unwrap();
    let mut restored = Machine::new();
    let saved: PciHostState = serde_json::from_str(&text).unwrap();
    restored.host.restore(&saved).unwrap();
    assert_eq!(restored.host.state(), state);
    assert_eq!(restored.port_read(0, 4), 0x8000_0090_u32.to_le_bytes());
    assert_eq!(restored.port_read(4, 1), [0x30]);
}

/// An access anywhere on the bus or in the window, and its data.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let len = prop::sample::select(vec![1_usize, 2, 3, 4, 5, 8]);
    let header = (0_u64..4, 0_u64..0x60).prop_map(|(slot, at)| slot * SLOT_LEN as u64 + at);
    let config = prop_oneof![4 => header, 1 => 0..BUS_LEN as u64 + 16, 1 => any::<u64>()];
    let window = prop_oneof![WINDOW.start..WINDOW.start + 0x3000, any::<u64>()];
    let at = prop_oneof![
        3 => config.prop_map(|at| (true, at)),
        1 => window.prop_map(|at| (false, at)),
    ];
    (at, len).prop_flat_map(|((config, at), len)| {
        (
            Just(config),
            Just(at),
            prop::collection::vec(any::<u8>(), len),
        )
    })
}

proptest! {
    #[test]
    fn no_access_panics_or_changes_what_is_constant(
        accesses in prop::collection::vec(access(), 1..200),
    ) {
        let machine = Machine::new();
        for (config, at, mut data) in accesses {
            if config {
                machine.host.config_write(at, &data);
                machine.host.config_read(at, &mut data);
            } else {
                machine.host.window_write(at, &data);
                machine.host.window_read(at, &mut data);
            }
        }
        prop_assert_eq!(machine.read(1, 0), 0x5678_1234);
        prop_assert_eq!(machine.read(1, 0x34), 0x40);
        prop_assert_eq!(machine.read(3, 0), u32::MAX);
        machine.host.reset_all();
        prop_assert_eq!(machine.read(1, 0x10), 0xc000_1000);
    }
}
