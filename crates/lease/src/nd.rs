//! The router's side of neighbour discovery (RFC 4861, options of RFC 8106).
//!
//! The advertisement says how the link is: its network, MTU, names and the router, if there is one, and
//! that addresses are had by DHCP alone. Its lifetimes have no end but the router's, for which the
//! field has too few bits: it is advertised again whenever the guest renews its address, and when a router
//! that the responder answers for has another MAC address. As the guest can't hear of that from the router,
//! the network is asked for it, as the guest, each time that the guest asks the responder.

use std::net::Ipv6Addr;

use crate::frame6::{self, ALL_NODES, Envelope, INNER, OWN};
use crate::options::search;
use crate::{Heard, Lease6, Mac, Router};

const ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Hops that the guest's packets begin with.
const HOPS: u8 = 64;
/// Addresses are had by DHCP, and so is the rest.
const MANAGED_AND_OTHER: u8 = 0xc0;
/// Seconds that the router is one: the most that can be said (RFC 8319).
const ROUTER_LIFETIME: u16 = u16::MAX;
const FOREVER: [u8; 4] = [0xff; 4];

const OPTION_SOURCE: u8 = 1;
const OPTION_TARGET: u8 = 2;
const OPTION_PREFIX: u8 = 3;
const OPTION_MTU: u8 = 5;
const OPTION_DNS: u8 = 25;
const OPTION_SEARCH: u8 = 31;
/// The network is on this link; addresses in it are not the guest's to choose.
const ON_LINK: u8 = 0x80;
/// What IPv6 needs at least.
const MIN_MTU: u16 = 1280;
/// Name servers that are told, more than resolvers ask.
pub(crate) const MAX_SERVERS: usize = 8;

/// Bytes of a frame with an answer that tells a MAC address.
pub(crate) const ANSWER: usize = INNER + 32;

/// Writes what all hosts on the link are told to the front of `frame`. Returns the length of that.
pub(crate) fn advertise(lease: &Lease6, frame: &mut [u8]) -> Option<usize> {
    let lifetime = lease.router.map_or(0, |_| ROUTER_LIFETIME).to_be_bytes();
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, HOPS, MANAGED_AND_OTHER];
    message.extend(lifetime);
    message.extend([0; 8]);
    if let Some(Router::Absent { mac, .. }) = lease.router {
        add(&mut message, OPTION_SOURCE, &mac);
    }
    if let Some(mtu) = lease.mtu.filter(|mtu| *mtu >= MIN_MTU) {
        let [high, low] = mtu.to_be_bytes();
        add(&mut message, OPTION_MTU, &[0, 0, 0, 0, high, low]);
    }
    if lease.prefix < 128 {
        let network = lease.address.to_bits() & mask(lease.prefix);
        let mut prefix = vec![lease.prefix, ON_LINK];
        prefix.extend([FOREVER, FOREVER, [0; 4]].concat());
        prefix.extend(Ipv6Addr::from(network).octets());
        add(&mut message, OPTION_PREFIX, &prefix);
    }
    let servers = lease.dns.iter().take(MAX_SERVERS);
    let servers: Vec<u8> = servers.flat_map(Ipv6Addr::octets).collect();
    for (kind, value) in [
        (OPTION_DNS, servers),
        (OPTION_SEARCH, search(&lease.search)),
    ] {
        if !value.is_empty() {
            add(
                &mut message,
                kind,
                &[&[0, 0], &FOREVER[..], &value].concat(),
            );
        }
    }
    Envelope::to_all(router_address(lease)).wrap_icmp(message, frame)
}

/// Answers `mac`, who asks as `from` for the MAC address of [`OWN`]: that of a router that can't be
/// asked by this address. No answer if there is none.
pub(crate) fn answer(lease: &Lease6, mac: Mac, from: Ipv6Addr, frame: &mut [u8]) -> Option<usize> {
    let Some(Router::Absent { mac: router, .. }) = lease.router else {
        return None;
    };
    // Who has no address yet is answered by telling all.
    let solicited = !from.is_unspecified();
    let (is_router, is_solicited, overrides) = (0x80, 0x40, 0x20);
    let flags = is_router | overrides | if solicited { is_solicited } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(OWN.octets());
    add(&mut message, OPTION_TARGET, &router);
    let to = if solicited { from } else { ALL_NODES };
    Envelope { mac, to, from: OWN }.wrap_icmp(message, frame)
}

/// The address by which the network can be asked for the router.
pub(crate) const fn address(lease: &Lease6) -> Option<Ipv6Addr> {
    match lease.router {
        Some(Router::Absent { address, .. }) => address,
        Some(Router::Present(_)) | None => None,
    }
}

/// Asks the network for the router's MAC address, as the guest.
pub(crate) fn look(lease: &Lease6, frame: &mut [u8]) -> Option<usize> {
    let target = address(lease)?.octets();
    let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target);
    add(&mut message, OPTION_SOURCE, &lease.mac);
    let [.., a, b, c] = target;
    let [high, low] = [u16::from_be_bytes([0xff, a]), u16::from_be_bytes([b, c])];
    let envelope = Envelope {
        mac: [0x33, 0x33, 0xff, a, b, c],
        to: Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low),
        from: lease.address,
    };
    let len = envelope.wrap_icmp(message, frame)?;
    frame.get_mut(6..12)?.copy_from_slice(&lease.mac);
    Some(len)
}

/// Takes the router's MAC address from its answer, which has that as its first option.
pub(crate) fn hear(lease: &mut Lease6, head: &[u8]) -> Heard {
    let Some(Router::Absent {
        mac,
        address: Some(address),
    }) = &mut lease.router
    else {
        return Heard::Nothing;
    };
    let target = address.octets();
    let told = frame6::of_link(head, NEIGHBOUR_ADVERTISEMENT).and_then(|message| {
        let is_router = message.get(8..24)? == target;
        let option = message.get(24..26)? == [OPTION_TARGET, 1];
        let told: Mac = message.get(26..32)?.try_into().ok()?;
        (is_router && option && told != Mac::default()).then_some(told)
    });
    // One of a group is nobody's, and the guest's own would lead nowhere.
    let told = told.filter(|[first, ..]| first & 1 == 0);
    match told.filter(|told| *told != lease.mac) {
        None => Heard::Nothing,
        Some(told) if told == *mac => Heard::Same,
        Some(told) => {
            *mac = told;
            Heard::Changed
        }
    }
}

/// By which address the guest knows its router.
const fn router_address(lease: &Lease6) -> Ipv6Addr {
    match lease.router {
        Some(Router::Present(address)) => address,
        Some(Router::Absent { .. }) | None => OWN,
    }
}

/// Adds an option, whose length counts in units of eight bytes.
fn add(message: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let len = (value.len() + 2).div_ceil(8);
    let Ok(units) = u8::try_from(len) else {
        return;
    };
    let end = message.len() + len * 8;
    message.extend([kind, units]);
    message.extend(value);
    message.resize(end, 0);
}

/// The mask of a network of `prefix` bits.
fn mask(prefix: u8) -> u128 {
    let host = u128::BITS.saturating_sub(prefix.into());
    u128::MAX.checked_shl(host).unwrap_or(0)
}
