//! Tests of the header's check on headers that QEMU would never write.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::header::Header;

const FILE_LEN: u64 = 1 << 20;
const CLUSTER: usize = 1 << 16;

/// A version 3 header as qemu-img writes it for a disk of 1 GiB.
fn header() -> Vec<u8> {
    let mut head = vec![0; CLUSTER];
    put(&mut head, 0, b"QFI\xfb");
    put(&mut head, 4, &3u32.to_be_bytes());
    put(&mut head, 20, &16u32.to_be_bytes());
    put(&mut head, 24, &(1u64 << 30).to_be_bytes());
    put(&mut head, 36, &2u32.to_be_bytes());
    put(&mut head, 40, &0x3_0000_u64.to_be_bytes());
    put(&mut head, 48, &0x1_0000_u64.to_be_bytes());
    put(&mut head, 56, &1u32.to_be_bytes());
    put(&mut head, 96, &4u32.to_be_bytes());
    put(&mut head, 100, &104u32.to_be_bytes());
    head
}

fn put(head: &mut [u8], at: usize, bytes: &[u8]) {
    head[at..at + bytes.len()].copy_from_slice(bytes);
}

fn refusal(at: usize, bytes: &[u8]) -> String {
    let mut head = header();
    put(&mut head, at, bytes);
    Header::parse(&head, FILE_LEN).unwrap_err()
}

#[test]
fn a_good_header() {
    let mut head = header();
    put(&mut head, 104, &0xe279_2aca_u32.to_be_bytes());
    put(&mut head, 108, &3u32.to_be_bytes());
    put(&mut head, 112, b"raw");
    put(&mut head, 8, &200u64.to_be_bytes());
    put(&mut head, 16, &4u32.to_be_bytes());
    put(&mut head, 200, b"base");
    let parsed = Header::parse(&head, FILE_LEN).unwrap();
    assert_eq!(
        (parsed.version, parsed.size, parsed.cluster_size()),
        (3, 1 << 30, 65536)
    );
    assert_eq!(parsed.backing.as_deref(), Some("base"));
    assert_eq!(parsed.backing_format.as_deref(), Some("raw"));
}

#[test]
fn refusals_name_the_field() {
    for (at, bytes, word) in [
        (0, &b"QFI\xfa"[..], "does not begin"),
        (4, &4u32.to_be_bytes(), "version 4"),
        (20, &8u32.to_be_bytes(), "2^8"),
        (20, &22u32.to_be_bytes(), "2^22"),
        (20, &u32::MAX.to_be_bytes(), "clusters"),
        (24, &u64::MAX.to_be_bytes(), "larger than qcow2 allows"),
        (24, &(1u64 << 31).to_be_bytes(), "needs 4"),
        (32, &1u32.to_be_bytes(), "AES"),
        (32, &2u32.to_be_bytes(), "LUKS"),
        (32, &3u32.to_be_bytes(), "method 3"),
        (36, &u32::MAX.to_be_bytes(), "larger than qcow2 allows"),
        (36, &0x2_0000_u32.to_be_bytes(), "truncated: its L1 table"),
        (40, &0u64.to_be_bytes(), "L1 table at offset 0"),
        (40, &0x3_0008_u64.to_be_bytes(), "L1 table at offset 196616"),
        (
            40,
            &0xffff_ffff_ffff_0000_u64.to_be_bytes(),
            "truncated: its L1 table",
        ),
        (
            48,
            &0x10_0000_u64.to_be_bytes(),
            "truncated: its refcount table",
        ),
        (56, &0u32.to_be_bytes(), "refcount table would be 0 bytes"),
        (56, &u32::MAX.to_be_bytes(), "refcount table would be"),
        (
            72,
            &(1u64 << 63).to_be_bytes(),
            "unknown incompatible features",
        ),
        (72, &4u64.to_be_bytes(), "external file"),
        (72, &8u64.to_be_bytes(), "zstd"),
        (72, &16u64.to_be_bytes(), "extended L2"),
        (96, &7u32.to_be_bytes(), "2^7 bits"),
        (100, &103u32.to_be_bytes(), "header length of 103"),
        (100, &u32::MAX.to_be_bytes(), "header length"),
        (104, &[1; 8], "extension 0x1010101"),
        (
            104,
            &0x6803_f857_0000_0031_u64.to_be_bytes(),
            "feature name table of 49 bytes",
        ),
        (8, &[0xff; 12], "backing file"),
    ] {
        let text = refusal(at, bytes);
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

#[test]
fn memory_for_tables_is_bounded() {
    // 2 MiB clusters and 64 TiB: imago would keep 128 L2 tables of 2 MiB each.
    let mut head = header();
    head.resize(2 << 20, 0);
    put(&mut head, 20, &21u32.to_be_bytes());
    put(&mut head, 24, &(64u64 << 40).to_be_bytes());
    put(&mut head, 36, &128u32.to_be_bytes());
    put(&mut head, 40, &(4u64 << 20).to_be_bytes());
    put(&mut head, 48, &(2u64 << 20).to_be_bytes());
    assert!(
        Header::parse(&head, 1 << 30)
            .unwrap_err()
            .contains("too much memory")
    );
    // A disk of a common size is fine even so.
    put(&mut head, 24, &(1u64 << 40).to_be_bytes());
    Header::parse(&head, 1 << 30).unwrap();
}

proptest! {
    #[test]
    fn no_header_panics(head in prop::collection::vec(any::<u8>(), 0..600), len in any::<u64>()) {
        let _ = Header::parse(&head, len);
        let mut valid_start = header();
        let end = head.len();
        valid_start[8..8 + end].copy_from_slice(&head);
        let _ = Header::parse(&valid_start, len);
    }

    #[test]
    fn accepted_headers_are_bounded(
        changes in prop::collection::vec((0usize..128, any::<u8>()), 0..6),
        file_len in 0u64..1 << 24,
    ) {
        let mut head = header();
        for (at, value) in changes {
            head[at] = value;
        }
        let shown = head.len().min(file_len as usize);
        if let Ok(parsed) = Header::parse(&head[..shown], file_len) {
            let ends = |offset: u64, entries: u32| offset + u64::from(entries) * 8;
            prop_assert!(ends(parsed.l1_offset, parsed.l1_entries) <= file_len || parsed.l1_entries == 0);
            prop_assert!(ends(parsed.refcount_offset, parsed.refcount_entries) <= file_len);
            prop_assert!((9..=21).contains(&parsed.cluster_bits));
            let covered = u64::from(parsed.l1_entries) << (2 * parsed.cluster_bits - 3);
            prop_assert!(parsed.size <= covered);
        }
    }
}
