//! Frames of guests for tests, and the two ends that they go between.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use edgevmm_net::{Tap, VNET_HEADER};
use nix::net::if_::if_nametoindex;
use vm_memory::VolatileSlice;

/// A guest's end of a pod's interface, and the other end of that, which is a tap as well.
pub struct Ends {
    /// Name of the guest's end.
    pub tap: String,
    guest: Option<Tap>,
    outside: Tap,
}

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
const ALL: [u8; 6] = [0xff; 6];
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

type Named = (&'static str, Vec<u8>);

impl Ends {
    /// Of the interface `name`.
    pub fn open(name: &str) -> Self {
        let tap = format!("evm{}", if_nametoindex(name).unwrap());
        Self {
            guest: Some(Tap::open(&tap).unwrap()),
            outside: Tap::open(name).unwrap(),
            tap,
        }
    }

    /// Of an interface that no guest has.
    pub fn only(name: &str) -> Self {
        Self {
            tap: String::new(),
            guest: None,
            outside: Tap::open(name).unwrap(),
        }
    }

    /// Whether a frame like this comes out in time when the guest, or the outside if there is none,
    /// sends one again and again: a tap takes frames once the kernel has noticed that it is open.
    pub fn arrives(&mut self, sent: &[u8], like: impl Fn(&[u8]) -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_secs(4);
        while Instant::now() < deadline {
            write(self.guest.as_mut().unwrap_or(&mut self.outside), sent);
            sleep(Duration::from_millis(5));
            while let Some(frame) = read(&mut self.outside) {
                if like(&frame) {
                    while read(&mut self.outside).is_some() {}
                    return true;
                }
            }
        }
        false
    }

    /// Whether a frame of the guest comes out: it does so while it is sent.
    pub fn crosses(&mut self, frame: &[u8]) -> bool {
        self.send(frame);
        self.hears(|other| other == frame)
    }

    /// Sends a frame of the guest.
    pub fn send(&mut self, frame: &[u8]) {
        write(self.guest.as_mut().unwrap(), frame);
    }

    /// Whether a frame like this has come out.
    pub fn hears(&mut self, like: impl Fn(&[u8]) -> bool) -> bool {
        while let Some(frame) = read(&mut self.outside) {
            if like(&frame) {
                return true;
            }
        }
        false
    }

    /// Whether the guest, as an IPv4 address, is told the MAC address of another.
    pub fn is_told(&mut self, mac: [u8; 6], own: &str, target: &str) -> bool {
        let target: Ipv4Addr = target.parse().unwrap();
        self.send(&arp(mac, mac, own, target));
        let guest = self.guest.as_mut().unwrap();
        while let Some(frame) = read(guest) {
            if frame.get(20..22) == Some(&[0, 2]) && frame.get(28..32) == Some(&target.octets()) {
                return true;
            }
        }
        false
    }

    /// Whether somebody answers for an IPv4 address.
    pub fn answers(&mut self, address: &str) -> bool {
        let target: Ipv4Addr = address.parse().unwrap();
        let question = arp(OTHER, OTHER, "0.0.0.0", target);
        self.arrives(&question, |frame| {
            frame.get(20..22) == Some(&[0, 2]) && frame.get(28..32) == Some(&target.octets())
        })
    }

    /// A packet of UDP between MAC and IPv6 addresses.
    pub fn udp6(&self, [to, from]: [[u8; 6]; 2], source: &str, target: &str, hops: u8) -> Vec<u8> {
        // Without a checksum, so that translation finds it right.
        let udp = [0x30, 0, 0x30, 1, 0, 12, 0, 0, 9, 9, 9, 9];
        let mut frame = ipv6(from, source, target, 17, &udp);
        frame[..6].copy_from_slice(&to);
        frame[21] = hops;
        frame
    }

    /// What the guest may send, with the addresses of tests.rs.
    pub fn good(&self, mac: [u8; 6]) -> Vec<Named> {
        let (own, link) = ("fd00:10::7", "fe80::1234:1");
        let me: Ipv4Addr = "10.42.1.7".parse().unwrap();
        vec![
            ("IPv4", ipv4(mac, "10.42.1.7")),
            ("ARP", arp(mac, mac, "10.42.1.7", Ipv4Addr::BROADCAST)),
            ("an ARP probe", arp(mac, mac, "0.0.0.0", me)),
            ("IPv6", ipv6(mac, own, "fd00::1", 6, &[1; 20])),
            ("of the link", ipv6(mac, link, "ff02::1", 17, &[1; 20])),
            ("a ping", ipv6(mac, own, "fd00::1", 58, &[128; 8])),
            (
                "a question",
                ipv6(mac, link, "ff02::1", 58, &about(135, "fd00:10::1")),
            ),
            ("DAD", ipv6(mac, "::", "ff02::1", 58, &about(135, own))),
            (
                "DAD of the link",
                ipv6(mac, "::", "ff02::1", 58, &about(135, link)),
            ),
            (
                "an advertisement",
                ipv6(mac, own, "ff02::1", 58, &about(136, own)),
            ),
            (
                "looking for routers",
                ipv6(mac, "::", "ff02::2", 58, &[133, 0, 0, 0, 0, 0, 0, 0]),
            ),
            ("groups", ipv6(mac, "::", "ff02::16", 0, &groups(143))),
            ("a fragment", ipv6(mac, own, "fd00::1", 44, &[17; 20])),
        ]
    }

    /// What it may not.
    pub fn bad(&self, mac: [u8; 6]) -> Vec<Named> {
        let (own, other, link) = ("fd00:10::7", "fd00:10::8", "fe80::1234:1");
        let lie = arp(mac, OTHER, "10.42.1.7", Ipv4Addr::BROADCAST);
        let mut tagged = ipv4(mac, "10.42.1.7");
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        vec![
            ("another MAC", ipv4(OTHER, "10.42.1.7")),
            ("another IPv4", ipv4(mac, "10.42.1.8")),
            ("no IPv4", ipv4(mac, "0.0.0.0")),
            (
                "another's ARP",
                arp(mac, mac, "10.42.1.1", Ipv4Addr::BROADCAST),
            ),
            ("ARP of another MAC", lie),
            (
                "half of ARP",
                arp(mac, mac, "10.42.1.7", Ipv4Addr::BROADCAST)[..40].to_vec(),
            ),
            ("another IPv6", ipv6(mac, other, "fd00::1", 6, &[1; 20])),
            ("no IPv6", ipv6(mac, "::", "fd00::1", 6, &[1; 20])),
            (
                "half of IPv6",
                ipv6(mac, own, "fd00::1", 58, &[128; 8])[..50].to_vec(),
            ),
            ("ICMP without end", ipv6(mac, own, "fd00::1", 58, &[128])),
            ("a router", ipv6(mac, link, "ff02::1", 58, &[134; 16])),
            ("a redirect", ipv6(mac, link, "ff02::1", 58, &[137; 40])),
            (
                "another's advertisement",
                ipv6(mac, own, "ff02::1", 58, &about(136, other)),
            ),
            (
                "half an advertisement",
                ipv6(mac, own, "ff02::1", 58, &about(136, own)[..20]),
            ),
            (
                "another's DAD",
                ipv6(mac, "::", "ff02::1", 58, &about(135, other)),
            ),
            (
                "a ping of nobody",
                ipv6(mac, "::", "ff02::1", 58, &[128; 8]),
            ),
            (
                "hidden in options",
                ipv6(mac, own, "ff02::1", 60, &groups(136)),
            ),
            (
                "hidden in more options",
                ipv6(mac, own, "ff02::1", 0, &groups(136)),
            ),
            (
                "hidden in a route",
                ipv6(mac, own, "ff02::1", 43, &groups(134)),
            ),
            ("a tag", tagged),
            ("something else", frame(ALL, mac, 0x88cc, &[0; 50])),
        ]
    }

    /// Frames, and whether one who has but a MAC address may send them.
    pub fn anything(&self, mac: [u8; 6]) -> Vec<(Vec<u8>, bool)> {
        vec![
            (ipv4(mac, "1.2.3.4"), true),
            (frame(ALL, mac, 0x88cc, &[0; 50]), true),
            (ipv4(OTHER, "1.2.3.4"), false),
        ]
    }
}

fn write(tap: &mut Tap, frame: &[u8]) {
    let mut bytes = [&[0; VNET_HEADER], frame].concat();
    assert!(tap.send(&[VolatileSlice::from(&mut bytes[..])]).unwrap());
}

fn read(tap: &mut Tap) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 2048];
    let len = tap.recv(&[VolatileSlice::from(&mut bytes[..])]).unwrap()?;
    bytes.truncate(len);
    Some(bytes.split_off(VNET_HEADER))
}

fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

fn ipv4(mac: [u8; 6], source: &str) -> Vec<u8> {
    let source: Ipv4Addr = source.parse().unwrap();
    let start = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    let packet = [&start[..], &source.octets(), &[8, 8, 8, 8], &[0; 8]].concat();
    frame(ALL, mac, IPV4, &packet)
}

fn arp(mac: [u8; 6], told: [u8; 6], source: &str, target: Ipv4Addr) -> Vec<u8> {
    let source: Ipv4Addr = source.parse().unwrap();
    let start = [0, 1, 8, 0, 6, 4, 0, 1];
    let end = [&[0; 6], &target.octets()[..]].concat();
    frame(
        ALL,
        mac,
        ARP,
        &[&start[..], &told, &source.octets(), &end].concat(),
    )
}

fn ipv6(mac: [u8; 6], source: &str, target: &str, header: u8, payload: &[u8]) -> Vec<u8> {
    let [source, target] = [source, target].map(|text| text.parse::<Ipv6Addr>().unwrap());
    let start = [0x60, 0, 0, 0, 0, payload.len() as u8, header, 255];
    let packet = [&start[..], &source.octets(), &target.octets(), payload].concat();
    frame(ALL, mac, IPV6, &packet)
}

/// A message of neighbour discovery.
fn about(kind: u8, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat()
}

/// A message of ICMPv6 behind options.
fn groups(kind: u8) -> Vec<u8> {
    let target: Ipv6Addr = "fd00:10::8".parse().unwrap();
    let options = [58, 0, 5, 2, 0, 0, 1, 0];
    [&options[..], &[kind, 0, 0, 0, 0, 0, 0, 0], &target.octets()].concat()
}
