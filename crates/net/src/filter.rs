//! Keeps guest frames off the host's loopback.
//!
//! passt connects the guest's packets through the host's own sockets, and to the host's kernel
//! 127.0.0.0/8 and 0.0.0.0 are the host itself: a guest that writes these into a packet would reach
//! services that listen on the loopback alone. passt's `--no-map-gw` closes only the detour by the
//! gateway's address, and passt of 2023 looks at no other.

use std::ops::Range;

/// Where an IPv4 header behind an Ethernet header has its destination.
const DESTINATION: Range<usize> = 30..34;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Whether a frame of the guest may go to passt: ARP, and IPv4 to any address but the host's
/// loopback. passt runs without IPv6 and reads nothing else.
///
/// The frame must be a copy that the guest cannot change any more, and that copy the one sent.
pub(crate) fn may_leave(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some(ethertype) if ethertype == ETHERTYPE_ARP => true,
        Some(ethertype) if ethertype == ETHERTYPE_IPV4 => frame
            .get(DESTINATION)
            .is_some_and(|destination| !matches!(destination, [0 | 127, ..])),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ethertype: u16, destination: [u8; 4]) -> [u8; 60] {
        let mut frame = [0xee; 60];
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        frame[30..34].copy_from_slice(&destination);
        frame
    }

    #[test]
    fn loopback_stays_here() {
        for destination in [
            [127, 0, 0, 1],
            [127, 255, 255, 254],
            [0, 0, 0, 0],
            [0, 1, 2, 3],
        ] {
            let frame = frame(0x0800, destination);
            assert!(!may_leave(&frame), "{destination:?}");
        }
    }

    #[test]
    fn the_rest_of_ipv4_and_arp_leave() {
        for destination in [[10, 0, 2, 2], [128, 0, 0, 1], [1, 0, 0, 127], [255; 4]] {
            assert!(may_leave(&frame(0x0800, destination)));
        }
        assert!(may_leave(&frame(0x0806, [0; 4])[..42]));
    }

    #[test]
    fn other_protocols_and_stumps_stay_here() {
        for ethertype in [0x86dd, 0x8100, 0x0801, 0] {
            assert!(!may_leave(&frame(ethertype, [8, 8, 8, 8])));
        }
        for length in 0..DESTINATION.end {
            assert!(!may_leave(&frame(0x0800, [8, 8, 8, 8])[..length]));
        }
    }
}
