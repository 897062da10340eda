#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::testing::disk_of;

const SECTORS: usize = 256;

fn blank() -> Vec<u8> {
    let mut bytes = vec![0; SECTORS * 512];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

fn put_mbr(bytes: &mut [u8], sector: usize, index: usize, kind: u8, start: u32, sectors: u32) {
    let at = sector * 512 + 446 + index * 16;
    bytes[at + 4] = kind;
    bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    bytes[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

/// A GPT of these partitions: (type, first sector, last sector).
fn gpt(partitions: &[([u8; 16], u64, u64)]) -> Vec<u8> {
    let mut bytes = blank();
    put_mbr(&mut bytes, 0, 0, MBR_GPT, 1, u32::MAX);
    for (index, (kind, first, last)) in partitions.iter().enumerate() {
        let at = 1024 + index * 128;
        bytes[at..at + 16].copy_from_slice(kind);
        bytes[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        bytes[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
    }
    let header: [(usize, &[u8]); 5] = [
        (0, b"EFI PART"),
        (12, &92_u32.to_le_bytes()),
        (72, &2_u64.to_le_bytes()),
        (80, &16_u32.to_le_bytes()),
        (84, &128_u32.to_le_bytes()),
    ];
    for (at, value) in header {
        bytes[512 + at..512 + at + value.len()].copy_from_slice(value);
    }
    seal(&mut bytes);
    bytes
}

/// Puts a GPT's checksums right.
fn seal(bytes: &mut [u8]) {
    let entries = CRC.checksum(&bytes[1024..1024 + 16 * 128]);
    bytes[512 + 88..512 + 92].copy_from_slice(&entries.to_le_bytes());
    bytes[512 + 16..512 + 20].fill(0);
    let header = CRC.checksum(&bytes[512..512 + 92]);
    bytes[512 + 16..512 + 20].copy_from_slice(&header.to_le_bytes());
}

fn found(bytes: Vec<u8>) -> Vec<(u32, Role, u64)> {
    let partitions = read(&disk_of(bytes)).unwrap().unwrap();
    let partitions = partitions.iter();
    partitions
        .map(|p| (p.number, p.role, p.disk.len() / SECTOR))
        .collect()
}

#[test]
fn gpt_partitions_are_found() {
    let bytes = gpt(&[
        ([7; 16], 40, 49),
        (ESP, 50, 99),
        ([0; 16], 0, 0),
        (XBOOTLDR, 100, 100),
        ([7; 16], 200, 256),
        ([7; 16], 9, 8),
        ([7; 16], 0, u64::MAX),
    ]);
    let expected = [
        (1, Role::Other, 10),
        (2, Role::Esp, 50),
        (4, Role::Xbootldr, 1),
    ];
    assert_eq!(found(bytes), expected);
}

#[test]
fn a_damaged_gpt_is_refused() {
    let whole = gpt(&[(ESP, 50, 99)]);
    for at in [512, 512 + 16, 512 + 20, 512 + 73, 1024 + 33] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        assert!(read(&disk_of(bytes)).is_err(), "{at}");
    }
    for (at, value) in [
        (80, u32::MAX),
        (84, u32::MAX),
        (84, 0),
        (12, 1 << 20),
        (76, u32::MAX),
    ] {
        let mut bytes = whole.clone();
        bytes[512 + at..512 + at + 4].copy_from_slice(&value.to_le_bytes());
        seal(&mut bytes);
        assert!(read(&disk_of(bytes)).is_err(), "{at}");
    }
}

#[test]
fn mbr_partitions_are_found_also_logical_ones() {
    let mut bytes = blank();
    put_mbr(&mut bytes, 0, 0, 0x83, 1, 9);
    put_mbr(&mut bytes, 0, 1, 0x0f, 20, 100);
    put_mbr(&mut bytes, 0, 3, MBR_ESP, 130, 10);
    put_mbr(&mut bytes, 20, 0, 0x83, 1, 5);
    put_mbr(&mut bytes, 20, 1, 0x05, 10, 10);
    put_mbr(&mut bytes, 30, 0, 0x83, 2, 6);
    let expected = [
        (1, Role::Other, 9),
        (4, Role::Esp, 10),
        (5, Role::Other, 5),
        (6, Role::Other, 6),
    ];
    assert_eq!(found(bytes.clone()), expected);
    // A chain in a circle.
    put_mbr(&mut bytes, 30, 1, 0x05, 0, 10);
    assert!(read(&disk_of(bytes)).is_err());
}

#[test]
fn what_is_no_table_is_none() {
    assert!(read(&disk_of(vec![0; 4096])).unwrap().is_none());
    assert!(read(&disk_of(blank())).unwrap().is_none());
    let mut boot_sector = blank();
    boot_sector[446..510].fill(b'x');
    assert!(read(&disk_of(boot_sector)).unwrap().is_none());
    assert!(read(&disk_of(Vec::new())).is_err());
}

proptest! {
    #[test]
    fn any_table_is_read_or_refused(
        changes in prop::collection::vec((0..3000_usize, any::<u8>()), 1..20),
        sealed in any::<bool>(),
    ) {
        let mut bytes = gpt(&[(ESP, 50, 99), ([7; 16], 100, 200)]);
        put_mbr(&mut bytes, 0, 1, 0x05, 20, 30);
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if sealed {
            seal(&mut bytes);
        }
        let disk = disk_of(bytes);
        if let Ok(Some(partitions)) = read(&disk) {
            for partition in partitions {
                prop_assert!(partition.disk.len() <= disk.len());
            }
        }
    }
}
