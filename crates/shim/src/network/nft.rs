//! nf_tables (nft(8), kernel's uapi/linux/netfilter/nf_tables.h): address translation in a pod.
//!
//! Written as messages, as nodes need not have the `nft` program. A table is replaced as a whole, in
//! one transaction.

use std::io;
use std::net::IpAddr;

use super::netlink::{ACK, CREATE, Message, Socket};

/// The table, one of each family.
const TABLE: &str = "edgevmm";
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
/// A new rule comes after the others.
const APPEND: u16 = 0x800;

const REGISTER: u32 = 1;
const META_IN: u32 = 6;
const META_OUT: u32 = 7;
const META_PROTOCOL: u32 = 16;
const TCP: u8 = 6;
const LOOPBACK: u8 = 127;
/// Offset of the source address in an IPv4 header, and of the other.
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const NAME_SIZE: usize = 16;

/// Which packets a table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Those of IPv4.
    Inet = 2,
    /// Those of IPv6.
    Inet6 = 10,
}

/// A place that packets come through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chain {
    /// Before anything else looks at those received.
    Guard,
    /// Those received.
    Received,
    /// Those received that are sent on.
    Forwarded,
    /// Those of the pod's own programs.
    Own,
    /// Those sent.
    Sent,
}

/// A condition on packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum If {
    /// They come in by an interface.
    From(String),
    /// They go out by an interface.
    To(String),
    /// They go out by any other interface.
    NotTo(String),
    /// They are TCP.
    Tcp,
    /// They come from a loopback address of IPv4.
    SourceLoopback,
    /// They go to a loopback address of IPv4.
    DestinationLoopback,
}

/// What becomes of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// They are lost.
    Drop,
    /// They go to another address.
    Destination(IpAddr),
    /// They come from the address of the interface that they leave by.
    Masquerade,
}

/// A rule of a chain: packets that meet all conditions.
pub type Rule = (Chain, Vec<If>, Then);

impl Chain {
    const ALL: [Self; 5] = [
        Self::Guard,
        Self::Received,
        Self::Forwarded,
        Self::Own,
        Self::Sent,
    ];

    /// Name, hook, priority and type.
    const fn place(self) -> (&'static str, u32, i32, &'static str) {
        match self {
            Self::Guard => ("guard", 0, -300, "filter"),
            Self::Received => ("received", 0, -100, "nat"),
            Self::Forwarded => ("forwarded", 2, 0, "filter"),
            Self::Own => ("own", 3, -100, "nat"),
            Self::Sent => ("sent", 4, 100, "nat"),
        }
    }
}

/// Has these rules for a family, and no others of ours, in the network namespace of the caller.
///
/// # Errors
///
/// When the kernel has no nf_tables or no address translation.
pub fn replace(family: Family, rules: &[Rule]) -> io::Result<()> {
    Socket::netfilter()?.send(batch(family, rules))
}

/// Removes all rules of ours, if there are any, from the network namespace of the caller.
///
/// # Errors
///
/// When the kernel has no nf_tables.
pub fn remove() -> io::Result<()> {
    for family in [Family::Inet, Family::Inet6] {
        let [create, delete] = without_table(family, ACK);
        Socket::netfilter()?.send([border(BATCH_BEGIN), create, delete, border(BATCH_END)])?;
    }
    Ok(())
}

fn batch(family: Family, rules: &[Rule]) -> Vec<Message> {
    let mut messages = vec![border(BATCH_BEGIN)];
    messages.extend(without_table(family, 0));
    messages.push(table(family, NEW_TABLE, CREATE));
    let used = |chain: &Chain| rules.iter().any(|rule| rule.0 == *chain);
    let used = Chain::ALL.into_iter().filter(used);
    messages.extend(used.map(|chain| new_chain(family, chain)));
    let last = rules.len().saturating_sub(1);
    let numbered = rules.iter().enumerate();
    messages.extend(numbered.map(|(number, rule)| {
        let acknowledged = if number == last { ACK } else { 0 };
        new_rule(family, rule, acknowledged)
    }));
    messages.push(border(BATCH_END));
    messages
}

/// Removes the table. One that is not there can't be deleted, so it is made before.
fn without_table(family: Family, flags: u16) -> [Message; 2] {
    let create = table(family, NEW_TABLE, CREATE);
    [create, table(family, DELETE_TABLE, flags)]
}

fn table(family: Family, kind: u16, flags: u16) -> Message {
    let mut message = Message::new(kind, flags, &header(family as u8, 0));
    message.add_text(1, TABLE);
    message
}

fn border(kind: u16) -> Message {
    Message::new(kind, 0, &header(0, SUBSYSTEM))
}

/// The header of messages of netfilter (`nfgenmsg`).
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn new_chain(family: Family, chain: Chain) -> Message {
    let (name, hook, priority, kind) = chain.place();
    let mut message = Message::new(NEW_CHAIN, CREATE, &header(family as u8, 0));
    message.add_text(1, TABLE);
    message.add_text(3, name);
    message.nest(4, |place| {
        place.add(1, &hook.to_be_bytes());
        place.add(2, &priority.to_be_bytes());
    });
    message.add_text(7, kind);
    message
}

fn new_rule(family: Family, (chain, conditions, then): &Rule, flags: u16) -> Message {
    let flags = CREATE | APPEND | flags;
    let mut message = Message::new(NEW_RULE, flags, &header(family as u8, 0));
    message.add_text(1, TABLE);
    message.add_text(2, chain.place().0);
    message.nest(4, |list| {
        for condition in conditions {
            condition.describe(list);
        }
        then.describe(list);
    });
    message
}

/// Adds an expression to those of a rule.
fn expression(list: &mut Message, name: &str, fill: impl FnOnce(&mut Message)) {
    list.nest(1, |element| {
        element.add_text(1, name);
        element.nest(2, fill);
    });
}

fn number(message: &mut Message, kind: u16, number: u32) {
    message.add(kind, &number.to_be_bytes());
}

impl If {
    fn describe(&self, list: &mut Message) {
        let (value, meta, offset) = match self {
            Self::From(name) => (interface(name), META_IN, None),
            Self::To(name) | Self::NotTo(name) => (interface(name), META_OUT, None),
            Self::Tcp => (vec![TCP], META_PROTOCOL, None),
            Self::SourceLoopback => (vec![LOOPBACK], 0, Some(SOURCE)),
            Self::DestinationLoopback => (vec![LOOPBACK], 0, Some(DESTINATION)),
        };
        match offset {
            None => expression(list, "meta", |meta_of| {
                number(meta_of, 1, REGISTER);
                number(meta_of, 2, meta);
            }),
            Some(offset) => expression(list, "payload", |payload| {
                let network_header = 1;
                number(payload, 1, REGISTER);
                number(payload, 2, network_header);
                number(payload, 3, offset);
                number(payload, 4, 1);
            }),
        }
        expression(list, "cmp", |compare| {
            // Whether it is to be equal (0), or not (1).
            let relation = u32::from(matches!(self, Self::NotTo(_)));
            number(compare, 1, REGISTER);
            number(compare, 2, relation);
            compare.nest(3, |data| data.add(1, &value));
        });
    }
}

impl Then {
    fn describe(self, list: &mut Message) {
        match self {
            Self::Drop => expression(list, "immediate", |immediate| {
                let (verdict, drop) = (0, 0);
                number(immediate, 1, verdict);
                immediate.nest(2, |data| data.nest(2, |code| number(code, 1, drop)));
            }),
            Self::Destination(address) => {
                let (family, address) = match address {
                    IpAddr::V4(address) => (Family::Inet, address.octets().to_vec()),
                    IpAddr::V6(address) => (Family::Inet6, address.octets().to_vec()),
                };
                expression(list, "immediate", |immediate| {
                    number(immediate, 1, REGISTER);
                    immediate.nest(2, |data| data.add(1, &address));
                });
                expression(list, "nat", |nat| {
                    let destination = 1;
                    number(nat, 1, destination);
                    number(nat, 2, family as u32);
                    number(nat, 3, REGISTER);
                });
            }
            Self::Masquerade => expression(list, "masq", |_| {}),
        }
    }
}

/// A name as the kernel compares it.
fn interface(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(NAME_SIZE, 0);
    bytes
}
