//! Which MAC address a neighbour has (rtnetlink(7)), as the pod's kernel finds out.

use std::io;
use std::net::{Ipv6Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::netlink::{Message, Socket};

const GET_NEIGHBOUR: u16 = 30;
const INET6: u8 = 10;
/// Bytes of the header of messages about neighbours (`ndmsg`).
const HEADER: usize = 12;
const ADDRESS: u16 = 1;
const MAC: u16 = 2;
/// A port whose packets are thrown away.
const DISCARD: u16 = 9;
/// How long a neighbour may take to answer: the kernel asks again after a second.
const PATIENCE: Duration = Duration::from_millis(1500);
const PAUSE: Duration = Duration::from_millis(1);

/// The MAC address of `address` at an interface of the namespace that the caller is in. A neighbour that
/// the kernel does not know yet is asked.
pub fn mac(kernel: &mut Socket, index: u32, address: Ipv6Addr) -> Option<[u8; 6]> {
    if let Some(mac) = known(kernel, index, address) {
        return Some(mac);
    }
    // It has to be known for that.
    let asked = || -> io::Result<usize> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
        socket.send_to(&[], (address, DISCARD))
    };
    asked().ok()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = known(kernel, index, address);
        if found.is_some() || Instant::now() > deadline {
            return found;
        }
        thread::sleep(PAUSE);
    }
}

fn known(kernel: &mut Socket, index: u32, address: Ipv6Addr) -> Option<[u8; 6]> {
    let mut header = vec![INET6, 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.resize(HEADER, 0);
    let mut message = Message::new(GET_NEIGHBOUR, 0, &header);
    message.add(ADDRESS, &address.octets());
    let answer = kernel.get(message, HEADER).ok()?;
    answer.find(MAC)?.try_into().ok()
}
