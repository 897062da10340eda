#![allow(clippy::unwrap_used)]

use std::process::Command;

use super::*;
use crate::layout::LEGACY_HOLE_END;
use crate::tables::loader::tests::sum;

const CONFIG: SmbiosConfig = SmbiosConfig {
    uuid: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
    serial: Some("SN-42\n\0\u{e9}x"),
    sockets: 2,
    cores: 3,
    threads: 2,
    ram: 5 << 30,
};

/// (type, length, handle, fields, strings) of each structure.
fn parse(mut bytes: &[u8]) -> Vec<(u8, u16, &[u8], Vec<String>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (fields, rest) = bytes.split_at(bytes[1].into());
        let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
        let strings = rest[..end].split(|b| *b == 0).filter(|s| !s.is_empty());
        let strings = strings
            .map(|s| String::from_utf8(s.to_vec()).unwrap())
            .collect();
        let handle = u16::from_le_bytes([fields[2], fields[3]]);
        found.push((fields[0], handle, fields, strings));
        bytes = &rest[end + 2..];
    }
    found
}

#[test]
fn anchors_lead_to_the_structures() {
    let placed = place(&CONFIG);
    let [(at_3, three), (at_2, two), (at, structures)] = &placed[..] else {
        panic!("{placed:?}")
    };
    assert_eq!((at_3 % 16, at_2 % 16), (0, 0));
    assert!(at_3 + three.len() as u64 <= *at_2 && at_2 + two.len() as u64 <= *at);
    assert!(at + structures.len() as u64 <= LEGACY_HOLE_END);
    assert_eq!((three.len(), three[6]), (24, 24));
    assert_eq!(&three[..5], b"_SM3_");
    assert_eq!(sum(three), 0);
    assert_eq!(three[16..24], at.to_le_bytes());
    assert_eq!((two.len(), two[5]), (31, 31));
    assert_eq!((&two[..4], &two[16..21]), (&b"_SM_"[..], &b"_DMI_"[..]));
    assert_eq!((sum(two), sum(&two[16..])), (0, 0));
    assert_eq!(
        u64::from(u32::from_le_bytes(two[24..28].try_into().unwrap())),
        *at
    );
    let word = |at: usize| usize::from(u16::from_le_bytes([two[at], two[at + 1]]));
    let parsed = parse(structures);
    assert_eq!((word(22), word(28)), (structures.len(), parsed.len()));
    let longest = parsed.iter().map(|(_, _, fields, strings)| {
        fields.len() + strings.iter().map(|s| s.len() + 1).sum::<usize>() + 1
    });
    assert_eq!(Some(word(8)), longest.max());
}

#[test]
fn structures_are_those_of_the_machine() {
    let placed = place(&CONFIG);
    let parsed = parse(&placed[2].1);
    let kinds: Vec<_> = parsed.iter().map(|(kind, ..)| *kind).collect();
    assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 19, 19, 32, 127]);
    let lengths: Vec<_> = parsed.iter().map(|(.., fields, _)| fields.len()).collect();
    assert_eq!(lengths, [24, 27, 21, 42, 42, 23, 40, 31, 31, 11, 4]);
    let mut handles: Vec<_> = parsed.iter().map(|(_, handle, ..)| *handle).collect();
    handles.dedup();
    assert_eq!(handles.len(), parsed.len(), "handles differ");
    let (_, _, system, strings) = &parsed[1];
    assert_eq!(strings[3], "SN-42???x");
    // The first three fields of the UUID are little endian.
    let uuid = [
        0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee,
        0xff,
    ];
    assert_eq!(system[8..24], uuid);
}

#[test]
fn firmware_gets_no_structure_0_and_the_old_anchor() {
    let files = files(&CONFIG);
    let [(ANCHOR_FILE, anchor), (TABLES_FILE, structures)] = &files[..] else {
        panic!("{files:?}");
    };
    assert_eq!(anchor.len(), 31);
    assert_eq!(anchor[24..28], [0; 4]);
    assert!(parse(structures).iter().all(|(kind, ..)| *kind != 0));
}

#[test]
fn large_memory_uses_the_extended_fields() {
    let placed = place(&SmbiosConfig {
        ram: 6 << 40,
        serial: Some(" "),
        ..CONFIG
    });
    let parsed = parse(&placed[2].1);
    let (array, device) = (parsed[5].2, parsed[6].2);
    assert_eq!(array[7..11], 0x8000_0000_u32.to_le_bytes());
    assert_eq!(array[15..23], (6_u64 << 40).to_le_bytes());
    assert_eq!(device[12..14], 0x7fff_u16.to_le_bytes());
    assert_eq!(device[28..32], (6_u32 << 20).to_le_bytes());
    let high = parsed[8].2;
    assert_eq!(high[4..8], [0xff; 4]);
    assert_eq!(high[15..23], (1_u64 << 32).to_le_bytes());
    assert_eq!(parsed[1].2[7], 0, "a blank serial number is none");
}

/// What dmidecode reads from the tables of [`CONFIG`] under `anchor`.
fn decoded(anchor: fn(&Structures, u64) -> Vec<u8>) -> Option<String> {
    let mut structures = Structures::default();
    add_firmware(&mut structures);
    add_machine(&mut structures, &CONFIG);
    // A dump has the anchor first and counts addresses from there.
    let mut dump = anchor(&structures, 0x20);
    dump.resize(0x20, 0);
    dump.extend(structures.into_bytes());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    std::fs::write(&path, dump).unwrap();
    let run = Command::new("dmidecode")
        .arg("--from-dump")
        .arg(&path)
        .output();
    let Ok(output) = run else {
        eprintln!("skipped: dmidecode is not installed");
        return None;
    };
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn dmidecode_understands_both_forms() {
    for (anchor, version) in [
        (
            anchor_3 as fn(&Structures, u64) -> Vec<u8>,
            "SMBIOS 3.0.0 present",
        ),
        (anchor_2, "SMBIOS 2.8 present"),
    ] {
        let Some(text) = decoded(anchor) else { return };
        for part in [
            version,
            "Vendor: edgevmm",
            "System is a virtual machine",
            "Product Name: edgevmm virtual machine",
            "Serial Number: SN-42",
            "UUID: 00112233-4455-6677-8899-aabbccddeeff",
            "Wake-up Type: Power Switch",
            "Boot-up State: Safe",
            "Socket Designation: CPU 1",
            "Core Count: 3",
            "Thread Count: 6",
            "Maximum Capacity: 5 GB",
            "Form Factor: Other",
            "Ending Address: 0x000AFFFFFFF",
            "Starting Address: 0x00100000000",
            "Status: No errors detected",
            "End Of Table",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        for sign in ["<BAD", "<OUT OF SPEC>", "broken", "truncated", "Wrong"] {
            assert!(!text.contains(sign), "{sign:?} is in {text}");
        }
    }
}
