//! Traffic control (tc(8), tc-u32(8), tc-bpf(8), tc-mirred(8), tc-nat(8)): which packets take another
//! way than to the kernel's IP, and which none.

use std::net::Ipv4Addr;

use super::guard::Instruction;
use super::netlink::{ACK, CREATE, EXCLUSIVE, Message, REPLACE};

const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;

const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const U32_SELECTOR: u16 = 5;
const U32_ACTIONS: u16 = 7;
const BPF_LEN: u16 = 4;
const BPF_CODE: u16 = 5;
const BPF_FLAGS: u16 = 8;
/// What a program answers is what becomes of the packet.
const BPF_DIRECT: u32 = 1;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;
const NAT_PARAMETERS: u16 = 1;
const SKBEDIT_PARAMETERS: u16 = 2;
const SKBEDIT_TYPE: u16 = 7;

/// What becomes of a packet after an action: it goes on, to the next action, or it is gone.
const GO_ON: i32 = 0;
const NEXT: i32 = 3;
const GONE: i32 = 4;
/// `mirred` sends the packet out of an interface, and keeps none.
const OUT: i32 = 1;
/// The packet is for this host, whatever its MAC address says.
const TO_HOST: u16 = 0;

/// Where filters hang, and the handle of that.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const TERMINAL: u8 = 1;
const ALL_PROTOCOLS: u16 = 3;

/// Packets on their way into the kernel or out of it, by an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Received.
    In,
    /// Sent.
    Out,
}

/// Which packets a filter takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// IPv4 to an address.
    To(Ipv4Addr),
    /// Questions for the MAC address of an address.
    Asks(Ipv4Addr),
    /// All of them.
    All,
}

/// What becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// They are sent out of the interface of this index.
    Redirect(u32),
    /// They are given to the kernel, though their MAC address is another's.
    Accept,
    /// Those to an address go to another one.
    Destination(Ipv4Addr, Ipv4Addr),
    /// Those from an address come from another one, and then as [`Action::Accept`].
    Source(Ipv4Addr, Ipv4Addr),
}

/// Makes the place for filters of an interface; there may be one already.
pub fn add_filters(index: u32) -> Message {
    let header = header(index, CLSACT_HANDLE, CLSACT, 0);
    let mut message = Message::new(NEW_QDISC, ACK | CREATE | REPLACE, &header);
    message.add_text(KIND, "clsact");
    message
}

/// Removes all filters of an interface.
pub fn delete_filters(index: u32) -> Message {
    let header = header(index, CLSACT_HANDLE, CLSACT, 0);
    Message::new(DELETE_QDISC, ACK, &header)
}

/// A filter of an interface. Those of a lower `rank` are asked first, and each needs its own.
pub fn add_filter(index: u32, way: Way, rank: u16, what: Match, action: Action) -> Message {
    let (protocol, key) = match what {
        Match::To(address) => (0x0800, Some((16, address))),
        Match::Asks(address) => (0x0806, Some((24, address))),
        Match::All => (ALL_PROTOCOLS, None),
    };
    let mut message = filter(index, way, rank, protocol);
    message.add_text(KIND, "u32");
    message.nest(OPTIONS, |options| {
        options.add(U32_SELECTOR, &selector(key));
        options.nest(U32_ACTIONS, |actions| action.describe(actions));
    });
    message
}

/// A filter of packets that an interface receives, as [`add_filter`], by a program.
pub fn add_program(index: u32, rank: u16, program: &[Instruction]) -> Message {
    let mut message = filter(index, Way::In, rank, ALL_PROTOCOLS);
    message.add_text(KIND, "bpf");
    message.nest(OPTIONS, |options| {
        let len = u16::try_from(program.len()).unwrap_or(u16::MAX);
        options.add(BPF_LEN, &len.to_ne_bytes());
        options.add(BPF_CODE, program.as_flattened());
        options.add(BPF_FLAGS, &BPF_DIRECT.to_ne_bytes());
    });
    message
}

fn filter(index: u32, way: Way, rank: u16, protocol: u16) -> Message {
    let parent = match way {
        Way::In => 0xffff_fff2,
        Way::Out => 0xffff_fff3,
    };
    let info = u32::from(rank) << 16 | u32::from(protocol.to_be());
    let header = header(index, 0, parent, info);
    Message::new(NEW_FILTER, ACK | CREATE | EXCLUSIVE, &header)
}

/// The header of messages of traffic control (`tcmsg`).
fn header(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let numbers = [0, index, handle, parent, info];
    numbers.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// A selector (`tc_u32_sel`) of packets that have `key` at an offset behind the MAC header.
fn selector(key: Option<(u32, Ipv4Addr)>) -> Vec<u8> {
    let mut bytes = vec![TERMINAL, 0, u8::from(key.is_some())];
    bytes.extend([0; 13]);
    if let Some((offset, address)) = key {
        bytes.extend([0xff; 4]);
        bytes.extend(address.octets());
        bytes.extend(offset.to_ne_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

impl Action {
    fn describe(self, actions: &mut Message) {
        let add = |actions: &mut Message, place, kind, fill: &dyn Fn(&mut Message)| {
            actions.nest(place, |action| {
                action.add_text(ACTION_KIND, kind);
                action.nest(ACTION_OPTIONS, fill);
            });
        };
        let accept = |options: &mut Message| {
            options.add(SKBEDIT_PARAMETERS, &parameters(GO_ON));
            options.add(SKBEDIT_TYPE, &TO_HOST.to_ne_bytes());
        };
        match self {
            Self::Redirect(to) => add(actions, 1, "mirred", &|options| {
                let more = [OUT.to_ne_bytes(), to.to_ne_bytes()].concat();
                let parameters = [parameters(GONE), more].concat();
                options.add(MIRRED_PARAMETERS, &parameters);
            }),
            Self::Accept => add(actions, 1, "skbedit", &accept),
            Self::Destination(old, new) => add(actions, 1, "nat", &|options| {
                options.add(NAT_PARAMETERS, &nat(GO_ON, old, new, 0));
            }),
            Self::Source(old, new) => {
                add(actions, 1, "nat", &|options| {
                    options.add(NAT_PARAMETERS, &nat(NEXT, old, new, 1));
                });
                add(actions, 2, "skbedit", &accept);
            }
        }
    }
}

/// What parameters of all actions begin with (`tc_gen`).
fn parameters(after: i32) -> Vec<u8> {
    let numbers = [0, 0, after, 0, 0];
    numbers.into_iter().flat_map(i32::to_ne_bytes).collect()
}

fn nat(after: i32, old: Ipv4Addr, new: Ipv4Addr, source: u32) -> Vec<u8> {
    let addresses = [old.octets(), new.octets(), [0xff; 4], source.to_ne_bytes()];
    [parameters(after), addresses.concat()].concat()
}
