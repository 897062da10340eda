//! Ethernet, IPv4 and UDP around DHCP messages (IEEE 802.3, RFC 791, RFC 768).

use std::net::Ipv4Addr;

use crate::Mac;
use crate::dhcp::Reply;

/// Bytes of the longest answer: what a packet of 1500 bytes makes.
pub const MAX_FRAME: usize = ETHERNET + 1500;

pub(crate) const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;
const IPV4_TYPE: [u8; 2] = [0x08, 0x00];
const UDP_PROTOCOL: u8 = 17;
const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// The server's own address on the link: locally administered, and nobody's.
pub(crate) const SERVER_MAC: Mac = [0x02, 0x65, 0x64, 0x67, 0x65, 0x01];

/// Whether a frame that starts so is IPv4 UDP, whole, to the port of DHCP servers.
pub(crate) fn is_question(head: &[u8]) -> bool {
    head.get(12..14) == Some(&IPV4_TYPE)
        && head.get(ETHERNET + 9) == Some(&UDP_PROTOCOL)
        // Neither an offset nor more to come: nobody sends fragments of DHCP.
        && u16_at(head, ETHERNET + 6).is_some_and(|fragment| fragment & 0x3fff == 0)
        && header_len(head)
            .and_then(|len| u16_at(head, ETHERNET + len + 2))
            .is_some_and(|port| port == SERVER_PORT)
}

/// The DHCP message in a frame that [`is_question`], if it is for the server or for all.
pub(crate) fn question(frame: &[u8], server: Ipv4Addr) -> Option<&[u8]> {
    let to: [u8; 4] = frame.get(ETHERNET + 16..ETHERNET + 20)?.try_into().ok()?;
    if ![Ipv4Addr::BROADCAST, server].contains(&to.into()) {
        return None;
    }
    let udp = ETHERNET + header_len(frame)?;
    // Frames are padded; what counts is UDP's length. A wrong one makes an empty message.
    let len = usize::from(u16_at(frame, udp + 4)?);
    Some(frame.get(udp + UDP..udp + len).unwrap_or_default())
}

/// Writes `reply` as a frame to the front of `frame`. Returns its length if there is room.
pub(crate) fn wrap(reply: &Reply, server: Ipv4Addr, frame: &mut [u8]) -> Option<usize> {
    let message = reply.message.as_slice();
    let udp_len = UDP + message.len();
    let len = ETHERNET + IPV4 + udp_len;
    let frame = frame.get_mut(..len)?;
    let (ethernet, packet) = frame.split_at_mut(ETHERNET);
    ethernet.get_mut(..6)?.copy_from_slice(&reply.mac);
    ethernet.get_mut(6..12)?.copy_from_slice(&SERVER_MAC);
    ethernet.get_mut(12..14)?.copy_from_slice(&IPV4_TYPE);

    let (ip, udp) = packet.split_at_mut(IPV4);
    let total = u16::try_from(IPV4 + udp_len).ok()?.to_be_bytes();
    // Version and header length, no special service; no identification; may not be fragmented.
    ip.copy_from_slice(&[
        0x45,
        0,
        total[0],
        total[1],
        0,
        0,
        0x40,
        0,
        64,
        UDP_PROTOCOL,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
    ip.get_mut(12..16)?.copy_from_slice(&server.octets());
    ip.get_mut(16..20)?.copy_from_slice(&reply.address.octets());
    let checksum = !sum(0, ip);
    ip.get_mut(10..12)?.copy_from_slice(&checksum.to_be_bytes());

    let udp_len = u16::try_from(udp_len).ok()?;
    udp.get_mut(0..2)?
        .copy_from_slice(&SERVER_PORT.to_be_bytes());
    udp.get_mut(2..4)?
        .copy_from_slice(&CLIENT_PORT.to_be_bytes());
    udp.get_mut(4..6)?.copy_from_slice(&udp_len.to_be_bytes());
    udp.get_mut(6..8)?.fill(0);
    udp.get_mut(UDP..)?.copy_from_slice(message);
    let pseudo = sum(0, ip.get(12..20)?);
    let pseudo = sum(pseudo, &[0, UDP_PROTOCOL]);
    let pseudo = sum(pseudo, &udp_len.to_be_bytes());
    // Zero would mean that there is no checksum.
    let checksum = match !sum(pseudo, udp) {
        0 => u16::MAX,
        checksum => checksum,
    };
    udp.get_mut(6..8)?.copy_from_slice(&checksum.to_be_bytes());
    Some(len)
}

/// Bytes of the IPv4 header, which has at least five words.
fn header_len(frame: &[u8]) -> Option<usize> {
    match frame.get(ETHERNET)? {
        version @ 0x45..=0x4f => Some(usize::from(version & 0xf) * 4),
        _ => None,
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// The sum in ones' complement of `start` and the 16-bit words of `bytes` (RFC 1071).
pub(crate) fn sum(start: u16, bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(start, |sum, word| {
        let word = u16::from_be_bytes([
            word.first().copied().unwrap_or(0),
            word.get(1).copied().unwrap_or(0),
        ]);
        let (sum, carry) = sum.overflowing_add(word);
        sum.wrapping_add(carry.into())
    })
}
