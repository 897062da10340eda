//! The server's side of DHCP for one client (RFC 2131).

use std::net::Ipv4Addr;

use crate::options::{self, Options};
use crate::{Lease, Mac};

const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const ETHERNET: u8 = 1;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The fixed part of a message, with the cookie.
const FIXED: usize = 240;
/// Bytes that BOOTP's receivers take at least, and some want.
const MIN_MESSAGE: usize = 300;
/// Bytes of a packet that every client takes, and headers around the message in it.
const MIN_PACKET: usize = 576;
const HEADERS: usize = 28;
const MAX_PACKET: usize = 1500;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// A message to the client and where it goes.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) message: Vec<u8>,
    pub(crate) mac: Mac,
    pub(crate) address: Ipv4Addr,
}

/// What a client asks.
struct Question<'a> {
    kind: u8,
    transaction: [u8; 4],
    flags: [u8; 2],
    /// The address that it has already.
    address: Ipv4Addr,
    /// The one that it asks for.
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    longest: usize,
    hardware: &'a [u8],
}

/// The answer of `server` to `message`, if it gets one.
pub(crate) fn reply(message: &[u8], lease: &Lease, server: Ipv4Addr) -> Option<Reply> {
    let question = Question::read(message)?;
    if question.hardware.get(..6) != Some(&lease.mac)
        || question.server.is_some_and(|other| other != server)
    {
        return None;
    }
    let kind = match question.kind {
        DISCOVER => OFFER,
        INFORM => ACK,
        REQUEST => {
            let wanted = question.requested.unwrap_or(question.address);
            if wanted == lease.address { ACK } else { NAK }
        }
        // Taken note of: there is nobody else to give the address to.
        _ => return None,
    };
    Some(question.answer(kind, lease, server))
}

impl<'a> Question<'a> {
    fn read(message: &'a [u8]) -> Option<Self> {
        let [BOOT_REQUEST, ETHERNET, 6, ..] = message else {
            return None;
        };
        if message.get(236..FIXED) != Some(&COOKIE) {
            return None;
        }
        // A relay is on another network, and there is none.
        if address(message.get(24..28)?)? != Ipv4Addr::UNSPECIFIED {
            return None;
        }
        let options = message.get(FIXED..)?;
        let option = |code| options::find(options, code);
        let longest = option(options::LONGEST)
            .and_then(|value| Some(u16::from_be_bytes(value.try_into().ok()?)))
            .map_or(MIN_PACKET, usize::from);
        let &[kind] = option(options::TYPE)? else {
            return None;
        };
        Some(Self {
            kind,
            transaction: message.get(4..8)?.try_into().ok()?,
            flags: message.get(10..12)?.try_into().ok()?,
            address: address(message.get(12..16)?)?,
            requested: option(options::REQUESTED).and_then(address),
            server: option(options::SERVER).and_then(address),
            longest: longest.clamp(MIN_PACKET, MAX_PACKET),
            hardware: message.get(28..44)?,
        })
    }

    fn answer(&self, kind: u8, lease: &Lease, server: Ipv4Addr) -> Reply {
        // Who only asks for information has an address, and gets none.
        let given = match kind {
            NAK => Ipv4Addr::UNSPECIFIED,
            _ if self.kind == INFORM => Ipv4Addr::UNSPECIFIED,
            _ => lease.address,
        };
        let mut message = Vec::with_capacity(MAX_PACKET);
        message.extend([BOOT_REPLY, ETHERNET, 6, 0]);
        message.extend(self.transaction);
        message.extend([0; 2]);
        message.extend(self.flags);
        let has = if kind == NAK {
            Ipv4Addr::UNSPECIFIED
        } else {
            self.address
        };
        message.extend(has.octets());
        message.extend(given.octets());
        message.extend([0; 8]);
        message.extend(self.hardware);
        message.extend([0; 64 + 128]);
        message.extend(COOKIE);

        let mut options = Options::new(self.longest - HEADERS - FIXED);
        options.add(options::TYPE, &[kind]);
        options.add(options::SERVER, &server.octets());
        if kind != NAK {
            if self.kind != INFORM {
                options.add(options::LEASE_TIME, &u32::MAX.to_be_bytes());
            }
            options.describe(lease);
        }
        message.extend(options.finish());
        message.resize(message.len().max(MIN_MESSAGE), 0);

        let broadcast = self.flags[0] & 0x80 != 0;
        let (mac, address) = if kind == NAK {
            ([0xff; 6], Ipv4Addr::BROADCAST)
        } else if self.address != Ipv4Addr::UNSPECIFIED {
            (lease.mac, self.address)
        } else if broadcast {
            ([0xff; 6], Ipv4Addr::BROADCAST)
        } else {
            (lease.mac, given)
        };
        Reply {
            message,
            mac,
            address,
        }
    }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}
