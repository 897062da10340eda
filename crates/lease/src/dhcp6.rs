//! The server's side of DHCPv6 for one client and one address (RFC 8415, options of RFC 3646).
//!
//! Left out: relays, temporary addresses, prefixes, reconfiguration, unicast, authentication, and more
//! than one association of a client. Its address has no end; it renews it nevertheless, which is
//! when it hears of its router again (nd.rs).

use std::net::Ipv6Addr;

use crate::Lease6;
use crate::frame::SERVER_MAC;
use crate::nd::MAX_SERVERS;
use crate::options::search;

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

pub(crate) const CLIENT: u16 = 1;
pub(crate) const SERVER: u16 = 2;
pub(crate) const ASSOCIATION: u16 = 3;
pub(crate) const ADDRESS: u16 = 5;
pub(crate) const PREFERENCE: u16 = 7;
pub(crate) const STATUS: u16 = 13;
pub(crate) const RAPID: u16 = 14;
pub(crate) const DNS: u16 = 23;
pub(crate) const SEARCH: u16 = 24;
pub(crate) const REFRESH: u16 = 32;

const SUCCESS: [u8; 2] = [0, 0];
const NOT_ON_LINK: [u8; 2] = [0, 4];

/// Bytes of a message before its options: type and transaction.
const FIXED: usize = 4;
/// Longest identifier of a client: a type and 128 bytes (RFC 8415, 11.1).
const MAX_IDENTIFIER: usize = 130;
/// Bytes of an association before its options.
const ASSOCIATION_FIXED: usize = 12;
/// Addresses of an association that are looked at.
const MAX_ADDRESSES: usize = 8;
const FOREVER: [u8; 4] = [0xff; 4];
/// Seconds after which the client asks this server, and after which any, for its address again. Well
/// within the time for which the router is one.
const RENEW_AFTER: u32 = 4 * 3600;
const REBIND_AFTER: u32 = 8 * 3600;

/// The server's identifier, made of its MAC address (RFC 8415, 11.4).
const fn identifier() -> [u8; 10] {
    let [a, b, c, d, e, f] = SERVER_MAC;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

/// The answer to `message` if it gets one, and whether it is time to hear of the router again.
pub(crate) fn reply(message: &[u8], lease: &Lease6) -> Option<(Vec<u8>, bool)> {
    let question = Question::read(message)?;
    let answer = question.answer(lease)?;
    let again = matches!(question.kind, RENEW | REBIND | INFORMATION);
    Some((answer, again))
}

/// What a client asks.
struct Question<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    association: Option<&'a [u8]>,
    rapid: bool,
}

impl<'a> Question<'a> {
    /// Reads a message and does with it as section 16 says: `None` is to be discarded.
    fn read(message: &'a [u8]) -> Option<Self> {
        let (&[kind, a, b, c], options) = message.split_first_chunk::<FIXED>()?;
        let find = |code| Options(options).find(|option| option.0 == code);
        let client = find(CLIENT).map(|option| option.1);
        if client.is_some_and(|client| client.len() > MAX_IDENTIFIER) {
            return None;
        }
        let server = find(SERVER).map(|option| option.1 == identifier());
        let association = find(ASSOCIATION).map(|option| option.1);
        let sound = match kind {
            SOLICIT | CONFIRM | REBIND => client.is_some() && server.is_none(),
            REQUEST | RENEW | RELEASE | DECLINE => client.is_some() && server == Some(true),
            INFORMATION => server != Some(false) && association.is_none(),
            _ => false,
        };
        sound.then_some(Self {
            kind,
            transaction: [a, b, c],
            client,
            association,
            rapid: find(RAPID).is_some(),
        })
    }

    fn answer(&self, lease: &Lease6) -> Option<Vec<u8>> {
        let rapid = self.kind == SOLICIT && self.rapid;
        let kind = if self.kind == SOLICIT && !rapid {
            ADVERTISE
        } else {
            REPLY
        };
        let mut answer = vec![kind];
        answer.extend(self.transaction);
        if let Some(client) = self.client {
            add(&mut answer, CLIENT, client);
        }
        add(&mut answer, SERVER, &identifier());
        match self.kind {
            SOLICIT | REQUEST | RENEW | REBIND => {
                if kind == ADVERTISE {
                    // The best there can be: nobody has to wait for others.
                    add(&mut answer, PREFERENCE, &[u8::MAX]);
                }
                if rapid {
                    add(&mut answer, RAPID, &[]);
                }
                if let Some(association) = self.association {
                    let given = self.associate(association, lease)?;
                    add(&mut answer, ASSOCIATION, &given);
                }
            }
            CONFIRM => {
                let mut mine = addresses(self.association?).peekable();
                mine.peek()?;
                let right = mine.all(|address| address == lease.address);
                let status = if right { SUCCESS } else { NOT_ON_LINK };
                add(&mut answer, STATUS, &status);
            }
            // Taken note of: there is nobody else to give the address to.
            RELEASE | DECLINE => add(&mut answer, STATUS, &SUCCESS),
            _ => add(&mut answer, REFRESH, &RENEW_AFTER.to_be_bytes()),
        }
        let servers = lease.dns.iter().take(MAX_SERVERS);
        let servers: Vec<u8> = servers.flat_map(Ipv6Addr::octets).collect();
        for (code, value) in [(DNS, servers), (SEARCH, search(&lease.search))] {
            if !value.is_empty() && !matches!(self.kind, CONFIRM | RELEASE | DECLINE) {
                add(&mut answer, code, &value);
            }
        }
        Some(answer)
    }

    /// The client's association with its address. Others that it has are no good, and it is told so
    /// when it wants to keep them.
    fn associate(&self, association: &[u8], lease: &Lease6) -> Option<Vec<u8>> {
        let mut given = association.get(..4)?.to_vec();
        given.extend(RENEW_AFTER.to_be_bytes());
        given.extend(REBIND_AFTER.to_be_bytes());
        let mut give = |address: Ipv6Addr, lifetime: [u8; 4]| {
            let value = [&address.octets()[..], &lifetime, &lifetime].concat();
            add(&mut given, ADDRESS, &value);
        };
        give(lease.address, FOREVER);
        if matches!(self.kind, RENEW | REBIND) {
            let others = addresses(association).filter(|address| *address != lease.address);
            others.for_each(|other| give(other, [0; 4]));
        }
        Some(given)
    }
}

/// The first addresses of an association.
fn addresses(association: &[u8]) -> impl Iterator<Item = Ipv6Addr> {
    let options = association.get(ASSOCIATION_FIXED..).unwrap_or_default();
    let addresses = Options(options).filter(|option| option.0 == ADDRESS);
    let addresses = addresses.filter_map(|option| option.1.first_chunk::<16>());
    addresses
        .map(|bytes| Ipv6Addr::from(*bytes))
        .take(MAX_ADDRESSES)
}

/// Options as they lie one behind the other: a code, a length and that many bytes each.
pub(crate) struct Options<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[a, b, c, d], rest) = self.0.split_first_chunk::<4>()?;
        let len = u16::from_be_bytes([c, d]);
        let (value, rest) = rest.split_at_checked(len.into())?;
        self.0 = rest;
        Some((u16::from_be_bytes([a, b]), value))
    }
}

fn add(message: &mut Vec<u8>, code: u16, value: &[u8]) {
    // All that is told is far shorter.
    let Ok(len) = u16::try_from(value.len()) else {
        return;
    };
    message.extend(code.to_be_bytes());
    message.extend(len.to_be_bytes());
    message.extend(value);
}
