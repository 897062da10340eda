//! Interfaces (rtnetlink(7)): what is done to them.

use std::ffi::CString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::netlink::{ACK, CREATE, EXCLUSIVE, Message, REPLACE, Socket};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const NEW_NEIGHBOUR: u16 = 28;

/// Attributes of links.
const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const LINK_BELOW: u16 = 5;
const LINK_INFO: u16 = 18;
const LINK_NAMESPACE: u16 = 28;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const MACVLAN_MODE: u16 = 1;
/// Interfaces on the same one below reach each other.
const MACVLAN_BRIDGE: u32 = 4;

/// Attributes of addresses.
const ADDRESS_PEER: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;

/// Attributes of neighbours.
const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_MAC: u16 = 2;
/// It is not asked for, and is not forgotten.
const NEIGHBOUR_PERMANENT: u16 = 0x80;

/// Bytes of the header of messages about links (`ifinfomsg`).
const HEADER: usize = 16;
const UP: u32 = 1;
const INET: u8 = 2;
const INET6: u8 = 10;
/// It is used at once: nobody else can have it.
const ADDRESS_SURE: u8 = 2;

/// Brings an interface up, with an MTU.
pub fn bring_up(index: u32, mtu: u16) -> Message {
    let mut message = Message::new(NEW_LINK, ACK, &link(index, UP));
    message.add(LINK_MTU, &u32::from(mtu).to_ne_bytes());
    message
}

/// Removes an interface.
pub fn delete(index: u32) -> Message {
    Message::new(DELETE_LINK, ACK, &link(index, 0))
}

/// Which kind of driver an interface has, such as `tun`. `None` when it has none that tells, or is gone.
///
/// # Errors
///
/// Any other that the kernel has.
pub fn kind(socket: &mut Socket, index: u32) -> io::Result<Option<String>> {
    let answer = match socket.get(Message::new(GET_LINK, 0, &link(index, 0)), HEADER) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(None),
        answer => answer?,
    };
    let kind = || {
        let kind = answer.nested(LINK_INFO)?.find(INFO_KIND)?.to_vec();
        CString::from_vec_with_nul(kind).ok()?.into_string().ok()
    };
    Ok(kind())
}

/// Gives an interface an address in a network of `prefix` bits.
pub fn add_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let flags = if address.is_ipv6() { ADDRESS_SURE } else { 0 };
    let (family, address) = family(address);
    let header = [&[family, prefix, flags, 0], &index.to_ne_bytes()[..]].concat();
    let mut message = Message::new(NEW_ADDRESS, ACK | CREATE | REPLACE, &header);
    message.add(ADDRESS_LOCAL, &address);
    message.add(ADDRESS_PEER, &address);
    message
}

/// Tells which MAC address a neighbour at an interface has.
pub fn add_neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> Message {
    let (family, address) = family(address);
    let mut header = vec![family, 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(NEIGHBOUR_PERMANENT.to_ne_bytes());
    header.extend([0; 2]);
    let mut message = Message::new(NEW_NEIGHBOUR, ACK | CREATE | REPLACE, &header);
    message.add(NEIGHBOUR_ADDRESS, &address);
    message.add(NEIGHBOUR_MAC, &mac);
    message
}

fn family(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (INET, address.octets().to_vec()),
        IpAddr::V6(address) => (INET6, address.octets().to_vec()),
    }
}

/// Makes an interface `name` with its own MAC address on the network of the interface `below`, in
/// another network namespace than that one is in.
pub fn add_macvlan(name: &str, mac: [u8; 6], below: u32, namespace: BorrowedFd<'_>) -> Message {
    let mut message = Message::new(NEW_LINK, ACK | CREATE | EXCLUSIVE, &link(0, 0));
    message.add_text(LINK_NAME, name);
    message.add(LINK_ADDRESS, &mac);
    message.add(LINK_BELOW, &below.to_ne_bytes());
    message.add(LINK_NAMESPACE, &namespace.as_raw_fd().to_ne_bytes());
    message.nest(LINK_INFO, |info| {
        info.add_text(INFO_KIND, "macvlan");
        info.nest(INFO_DATA, |data| {
            data.add(MACVLAN_MODE, &MACVLAN_BRIDGE.to_ne_bytes());
        });
    });
    message
}

/// The header of messages about links (`ifinfomsg`), which sets and changes the same `flags`.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let numbers = [0, index, flags, flags];
    numbers.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// Has the kernel do one thing, which may be impossible as there is nothing to do it to.
///
/// # Errors
///
/// Any other that the kernel has.
pub fn unless_gone(socket: &mut Socket, message: Message) -> io::Result<()> {
    use nix::libc::{EINVAL, ENODEV, ENOENT};
    match socket.request(message) {
        Err(error) if matches!(error.raw_os_error(), Some(EINVAL | ENODEV | ENOENT)) => Ok(()),
        result => result,
    }
}
