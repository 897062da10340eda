//! Ethernet, IPv6, UDP and ICMPv6 around what is said of a guest's IPv6 (RFC 8200, RFC 768,
//! RFC 4443). Extension headers are not looked behind: nobody puts any before these messages.

use std::net::Ipv6Addr;

use crate::Mac;
use crate::frame::{ETHERNET, SERVER_MAC, sum, u16_at};

pub(crate) const ICMPV6: u8 = 58;
pub(crate) const UDP: u8 = 17;
const IPV6_TYPE: [u8; 2] = [0x86, 0xdd];
const IPV6: usize = 40;
/// Where the message in a packet begins.
pub(crate) const INNER: usize = ETHERNET + IPV6;
const UDP_HEADER: usize = 8;
const SERVER_PORT: u16 = 547;
const CLIENT_PORT: u16 = 546;

pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// The responder's own address on the link, made of its MAC address (RFC 4291, appendix A).
pub(crate) const OWN: Ipv6Addr = {
    let [a, b, c, d, e, f] = SERVER_MAC;
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        u16::from_be_bytes([a ^ 2, b]),
        u16::from_be_bytes([c, 0xff]),
        u16::from_be_bytes([0xfe, d]),
        u16::from_be_bytes([e, f]),
    )
};

const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
/// What no router lets through, so that a message with it is of this link (RFC 4861, 11.2).
pub(crate) const LINK_HOPS: u8 = 255;

/// What the responder takes out of a guest's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question<'a> {
    /// A host looks for routers.
    Routers,
    /// A host looks for the MAC address of the responder's own IP address.
    Own,
    /// A message to all DHCP servers.
    Dhcp(&'a [u8]),
}

/// Whether a frame that starts so may have a [`question`].
pub(crate) fn is_question(head: &[u8]) -> bool {
    kind(head).is_some()
}

/// The question in a frame, with who asks: MAC and IP address.
pub(crate) fn question(frame: &[u8]) -> Option<(Mac, Ipv6Addr, Question<'_>)> {
    let asked = match kind(frame)? {
        Kind::Routers => Question::Routers,
        Kind::Own => Question::Own,
        Kind::Dhcp => {
            let udp = ETHERNET + IPV6;
            let len = usize::from(u16_at(frame, udp + 4)?);
            // Frames are padded; a wrong length makes an empty message.
            Question::Dhcp(frame.get(udp + UDP_HEADER..udp + len).unwrap_or_default())
        }
    };
    let mac = frame.get(6..12)?.try_into().ok()?;
    Some((mac, address_at(frame, ETHERNET + 8)?, asked))
}

/// The ICMPv6 message of a type in a frame of this link.
pub(crate) fn of_link(frame: &[u8], kind: u8) -> Option<&[u8]> {
    let ip = frame.get(12..ETHERNET + IPV6)?;
    let is_link = ip.get(..2)? == IPV6_TYPE
        && ip.get(2)? >> 4 == 6
        && (ip.get(8)?, ip.get(9)?) == (&ICMPV6, &LINK_HOPS);
    let message = frame.get(INNER..)?;
    (is_link && message.get(..2)? == [kind, 0]).then_some(message)
}

enum Kind {
    Routers,
    Own,
    Dhcp,
}

fn kind(head: &[u8]) -> Option<Kind> {
    let version = head.get(ETHERNET)? >> 4;
    if head.get(12..14)? != IPV6_TYPE || version != 6 {
        return None;
    }
    let inner = ETHERNET + IPV6;
    let of_link = *head.get(ETHERNET + 7)? == LINK_HOPS;
    match (*head.get(ETHERNET + 6)?, head.get(inner..inner + 2)?) {
        (ICMPV6, [ROUTER_SOLICITATION, 0]) if of_link => Some(Kind::Routers),
        (ICMPV6, [NEIGHBOUR_SOLICITATION, 0]) if of_link => {
            (address_at(head, inner + 8)? == OWN).then_some(Kind::Own)
        }
        (UDP, _) => {
            let to = (address_at(head, ETHERNET + 24)?, u16_at(head, inner + 2)?);
            (to == (ALL_SERVERS, SERVER_PORT)).then_some(Kind::Dhcp)
        }
        _ => None,
    }
}

fn address_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    let bytes = bytes.get(at..at.checked_add(16)?)?;
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
}

/// Where a message goes, and whom it comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    pub(crate) mac: Mac,
    pub(crate) to: Ipv6Addr,
    pub(crate) from: Ipv6Addr,
}

impl Envelope {
    /// To all who listen.
    pub(crate) const fn to_all(from: Ipv6Addr) -> Self {
        Self {
            mac: [0x33, 0x33, 0, 0, 0, 1],
            to: ALL_NODES,
            from,
        }
    }

    /// Writes a DHCP message to a client to the front of `frame`. Returns the length of the frame if
    /// there is room.
    pub(crate) fn wrap_dhcp(&self, message: &[u8], frame: &mut [u8]) -> Option<usize> {
        let len = u16::try_from(UDP_HEADER + message.len()).ok()?;
        let mut udp = Vec::with_capacity(len.into());
        udp.extend(SERVER_PORT.to_be_bytes());
        udp.extend(CLIENT_PORT.to_be_bytes());
        udp.extend(len.to_be_bytes());
        udp.extend([0; 2]);
        udp.extend(message);
        self.wrap(UDP, 64, &mut udp, 6, frame)
    }

    /// As [`Envelope::wrap_dhcp`] for an ICMPv6 message, whose checksum is still zero.
    pub(crate) fn wrap_icmp(&self, mut message: Vec<u8>, frame: &mut [u8]) -> Option<usize> {
        self.wrap(ICMPV6, LINK_HOPS, &mut message, 2, frame)
    }

    fn wrap(
        &self,
        protocol: u8,
        hops: u8,
        payload: &mut [u8],
        checksum_at: usize,
        frame: &mut [u8],
    ) -> Option<usize> {
        let len = u16::try_from(payload.len()).ok()?.to_be_bytes();
        let mut header = [0; ETHERNET + IPV6];
        let (ethernet, ip) = header.split_at_mut(ETHERNET);
        ethernet.get_mut(..6)?.copy_from_slice(&self.mac);
        ethernet.get_mut(6..12)?.copy_from_slice(&SERVER_MAC);
        ethernet.get_mut(12..)?.copy_from_slice(&IPV6_TYPE);
        let start = [0x60, 0, 0, 0, len[0], len[1], protocol, hops];
        ip.get_mut(..8)?.copy_from_slice(&start);
        ip.get_mut(8..24)?.copy_from_slice(&self.from.octets());
        ip.get_mut(24..)?.copy_from_slice(&self.to.octets());
        let pseudo = sum(0, ip.get(8..)?);
        let pseudo = sum(pseudo, &[len[0], len[1], 0, protocol]);
        // Zero would mean that there is none.
        let checksum = match !sum(pseudo, payload) {
            0 => u16::MAX,
            checksum => checksum,
        };
        let place = payload.get_mut(checksum_at..checksum_at + 2)?;
        place.copy_from_slice(&checksum.to_be_bytes());
        let whole = header.len() + payload.len();
        let (front, rest) = frame.get_mut(..whole)?.split_at_mut(header.len());
        front.copy_from_slice(&header);
        rest.copy_from_slice(payload);
        Some(whole)
    }
}
