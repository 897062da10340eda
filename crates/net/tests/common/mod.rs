//! A guest made by hand, and a network namespace to run a test in.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const INSIDE: &str = "EDGEVMM_TEST_NAMESPACE";

/// Says that a test does not run and why, past the test harness, which hides what passes.
pub fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(io::stderr(), "SKIPPED {name}: {reason}");
}

/// Whether `program` can be run.
pub fn installed(program: &str) -> bool {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

/// Whether this is the test inside of a fresh network namespace. If not, runs it there.
pub fn inside_fresh_network() -> bool {
    inside("-rn", "user and network namespaces are not permitted here")
}

/// As [`inside_fresh_network`], with all users of the host.
pub fn inside_fresh_network_as_root() -> bool {
    inside(
        "-n",
        "only root can have a network namespace with several users",
    )
}

fn inside(unshare: &str, or_else: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let try_out = Command::new("unshare")
        .args([unshare, "true"])
        .stderr(Stdio::null())
        .status();
    if try_out.is_ok_and(|status| status.success()) {
        run_this_test(unshare, INSIDE);
    } else {
        skip(or_else);
    }
    false
}

/// Runs the test that calls this once more, by unshare(1) and with `variable` set.
pub fn run_this_test(unshare: &str, variable: &str) {
    let output = Command::new("unshare")
        .arg(unshare)
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            std::thread::current().name().unwrap(),
        ])
        .env(variable, "1")
        .output()
        .unwrap();
    let _ = io::stderr().write_all(&output.stderr);
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && report.contains("1 passed"),
        "{report}"
    );
}

pub fn ethernet(destination: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [
        &destination[..],
        &GUEST_MAC,
        &ethertype.to_be_bytes(),
        payload,
    ]
    .concat()
}

pub fn arp_request(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let kinds = [0, 1, 8, 0, 6, 4, 0, 1];
    let sender = sender.octets();
    let target = target.octets();
    ethernet(
        [0xff; 6],
        ARP,
        &[&kinds[..], &GUEST_MAC, &sender, &[0; 6], &target].concat(),
    )
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap()
}

pub fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [
        0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0,
    ]
    .to_vec();
    header.extend(from.octets());
    header.extend(to.octets());
    let checksum = sum(&[&header]).to_be_bytes();
    header[10..12].copy_from_slice(&checksum);
    ethernet(
        [0x52, 0x55, 0x0a, 0, 2, 2],
        IPV4,
        &[&header[..], payload].concat(),
    )
}

pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    ipv4(
        UDP,
        from.0,
        to.0,
        &[&ports[..], &length, &[0; 2], payload].concat(),
    )
}

/// A TCP segment; the numbers are sequence and acknowledgement.
pub fn tcp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), numbers: (u32, u32), flags: u8) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend(numbers.0.to_be_bytes());
    segment.extend(numbers.1.to_be_bytes());
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&from.0.octets()[..], &to.0.octets(), &[0, TCP, 0, 20]].concat();
    let checksum = sum(&[&pseudo, &segment]).to_be_bytes();
    segment[16..18].copy_from_slice(&checksum);
    ipv4(TCP, from.0, to.0, &segment)
}

/// The parts of a received TCP segment that the tests look at.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    pub from: (Ipv4Addr, u16),
    pub to: (Ipv4Addr, u16),
    pub sequence: u32,
    pub flags: u8,
    pub data: Vec<u8>,
}

impl Segment {
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        if frame[12..14] != IPV4.to_be_bytes() || ip[9] != TCP {
            return None;
        }
        let length = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        let tcp = ip.get(usize::from(ip[0] & 15) * 4..length)?;
        let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
        let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        Some(Self {
            from: (address(12), port(0)),
            to: (address(16), port(2)),
            sequence: u32::from_be_bytes(tcp[4..8].try_into().unwrap()),
            flags: tcp[13],
            data: tcp[usize::from(tcp[12] >> 4) * 4..].to_vec(),
        })
    }
}
