#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;
use crate::testing::guest_memory;

const MEMORY: usize = 0x4_0000;
const REQUEST: u64 = 0x1000;
const BUFFER: u64 = 0x2000;

fn items() -> FwCfgItems {
    let mut items = FwCfgItems::new(NumberedItems {
        cpus: 3,
        max_cpus: 4,
        boot_menu: false,
    });
    for (name, bytes) in [
        ("etc/sercon-port", &0x3f8_u64.to_le_bytes()[..]),
        ("bootorder", b"/pci@i0cf8/scsi@4/disk@0,0\0"),
        ("etc/empty", &[]),
    ] {
        items.add_file(name, bytes.to_vec()).unwrap();
    }
    items
}

fn device() -> FwCfg {
    FwCfg::new(guest_memory(MEMORY), items())
}

fn read_port(device: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
    device.write(SELECTOR, &key.to_le_bytes());
    let mut byte = [0xff];
    let mut bytes = Vec::new();
    for _ in 0..len {
        device.read(DATA, &mut byte);
        bytes.push(byte[0]);
    }
    bytes
}

/// Files a DMA request and returns the control word that the device left.
fn dma(device: &mut FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let request = DmaRequest {
        control: control.into(),
        length: length.into(),
        address: address.into(),
    };
    let memory = device.memory.clone();
    memory
        .write_slice(request.as_bytes(), GuestAddress(REQUEST))
        .unwrap();
    device.write(DMA_HIGH, &[0; 4]);
    device.write(DMA_LOW, &(REQUEST as u32).to_be_bytes());
    let mut control = [0; 4];
    memory
        .read_slice(&mut control, GuestAddress(REQUEST))
        .unwrap();
    u32::from_be_bytes(control)
}

fn select(key: u16) -> u32 {
    CONTROL_SELECT | (u32::from(key) << CONTROL_KEY_SHIFT)
}

fn buffer(device: &FwCfg, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device
        .memory
        .read_slice(&mut bytes, GuestAddress(BUFFER))
        .unwrap();
    bytes
}

/// (name, key, length) by the directory that the guest reads.
fn directory(device: &mut FwCfg) -> Vec<(String, u16, u32)> {
    let count = read_port(device, 0x19, 4);
    let count = u32::from_be_bytes(count.try_into().unwrap());
    let bytes = read_port(device, 0x19, 4 + 64 * count as usize);
    let entries = bytes[4..].chunks(64).map(|entry| {
        let name = entry[8..].split(|b| *b == 0).next().unwrap();
        (
            String::from_utf8(name.to_vec()).unwrap(),
            u16::from_be_bytes(entry[4..6].try_into().unwrap()),
            u32::from_be_bytes(entry[..4].try_into().unwrap()),
        )
    });
    entries.collect()
}

#[test]
fn firmware_finds_signature_features_and_counts() {
    let mut device = device();
    assert_eq!(read_port(&mut device, 0, 4), b"QEMU");
    assert_eq!(read_port(&mut device, 1, 4), [3, 0, 0, 0]);
    assert_eq!(read_port(&mut device, 4, 2), [1, 0]);
    assert_eq!(read_port(&mut device, 5, 2), [3, 0]);
    assert_eq!(read_port(&mut device, 0x0f, 2), [4, 0]);
    assert_eq!(read_port(&mut device, 0x8002, 2), [1, 0], "zeroes follow");
    assert_eq!(read_port(&mut device, 0x8000, 2), [0, 0], "no such item");
    let mut signature = [0; 8];
    device.read(DMA_HIGH, &mut signature[..4]);
    device.read(DMA_LOW, &mut signature[4..]);
    assert_eq!(&signature, b"QEMU CFG");
}

#[test]
fn directory_is_sorted_and_leads_to_the_files() {
    let mut device = device();
    let files = directory(&mut device);
    let names: Vec<_> = files.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["bootorder", "etc/empty", "etc/sercon-port"]);
    let (_, key, len) = files[2];
    assert_eq!(len, 8);
    assert_eq!(read_port(&mut device, key, 8), 0x3f8_u64.to_le_bytes());
}

#[test]
fn dma_reads_skips_and_pads() {
    let mut device = device();
    let (_, key, len) = directory(&mut device)[0].clone();
    assert_eq!(dma(&mut device, select(key) | CONTROL_READ, len, BUFFER), 0);
    assert_eq!(buffer(&device, 27), b"/pci@i0cf8/scsi@4/disk@0,0\0");
    assert_eq!(dma(&mut device, select(key) | CONTROL_SKIP, 5, 0), 0);
    assert_eq!(dma(&mut device, CONTROL_READ, 5, BUFFER), 0);
    assert_eq!(buffer(&device, 5), b"i0cf8");
    assert_eq!(dma(&mut device, CONTROL_READ, 5000, BUFFER), 0);
    let bytes = buffer(&device, 5000);
    assert_eq!(&bytes[..17], b"/scsi@4/disk@0,0\0");
    assert!(bytes[17..].iter().all(|b| *b == 0));
}

#[test]
fn dma_refuses_what_is_out_of_bounds() {
    let mut device = device();
    let read = select(0) | CONTROL_READ;
    for (control, length, address) in [
        (read, 4, MEMORY as u64),
        (read, 4, MEMORY as u64 - 3),
        (read, 4, u64::MAX - 1),
        (read, u32::MAX, BUFFER),
        (read, MAX_PADDING as u32 + 5, BUFFER),
        (select(0) | CONTROL_WRITE, 4, BUFFER),
        (select(0x3000) | CONTROL_WRITE, 0, BUFFER),
    ] {
        let got = dma(&mut device, control, length, address);
        assert_eq!(got, CONTROL_ERROR, "{control:#x} {length:#x} {address:#x}");
    }
    // The request itself is not memory: nobody to tell.
    device.write(DMA_HIGH, &[0xff; 4]);
    device.write(DMA_LOW, &[0xff; 4]);
}

#[test]
fn names_are_checked() {
    let mut items = items();
    for name in ["", "a b", "ä", &"x".repeat(56), "nul\0"] {
        let got = items.add_file(name, vec![]);
        assert_eq!(got, Err(FwCfgError::InvalidName(name.to_owned())));
    }
    let got = items.add_file("bootorder", vec![]);
    assert_eq!(got, Err(FwCfgError::DuplicateName("bootorder".into())));
    items.add_file(&"x".repeat(55), vec![]).unwrap();
}

#[test]
fn a_restored_device_goes_on_in_the_middle_of_an_item() {
    let mut device = device();
    read_port(&mut device, 0, 2);
    device.write(DMA_HIGH, &[0; 4]);
    let json = serde_json::to_string(&device.state()).unwrap();
    let mut restored = self::device();
    restored.restore(&serde_json::from_str(&json).unwrap());
    assert_eq!(restored.state(), device.state());
    for rest in *b"MU\0" {
        let mut byte = [0xff];
        restored.read(DATA, &mut byte);
        assert_eq!(byte, [rest]);
    }
    restored.restore(&FwCfgState {
        key: 0x3fff,
        position: u64::MAX,
        dma_high: u32::MAX,
    });
    restored.read(DATA, &mut [0]);
    restored.write(DMA_LOW, &[0xff; 4]);
    assert_eq!(restored.state().position, u64::MAX);
}

proptest! {
    #[test]
    fn hostile_descriptors_never_leave_their_bounds(
        control in any::<u32>(),
        key in prop_oneof![0u16..0x30, any::<u16>()],
        lengths in proptest::collection::vec(prop_oneof![0u32..64, 0x3_0000u32..0x6_0000, any::<u32>()], 1..8),
        address in prop_oneof![0u64..0x5_0000, any::<u64>()],
    ) {
        let mut device = device();
        let control = (control & 0x1f) | (u32::from(key) << CONTROL_KEY_SHIFT);
        for length in lengths {
            let result = dma(&mut device, control, length, address);
            let inside = address.checked_add(length.into()).is_some_and(|end| end <= MEMORY as u64);
            if control & (CONTROL_READ | CONTROL_WRITE) != 0 && length > 0 && !inside {
                prop_assert_eq!(result, CONTROL_ERROR);
            }
        }
    }

    #[test]
    fn any_port_access_is_survived(
        accesses in proptest::collection::vec((0u64..12, any::<bool>(), any::<[u8; 4]>(), 1usize..5), 0..100)
    ) {
        let mut device = device();
        for (offset, write, mut bytes, len) in accesses {
            if write {
                device.write(offset, &bytes[..len]);
            } else {
                device.read(offset, &mut bytes[..len]);
            }
        }
    }
}
