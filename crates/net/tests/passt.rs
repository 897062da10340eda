//! passt as a guest and its host see it.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{ACK, RST, SYN, Segment, installed, skip, tcp, udp};
use edgevmm_net::{Forward, FrameSocket, Passt, PasstConfig, PasstError, PasstExit, Transport};
use nix::poll::{PollFd, PollFlags, poll};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const LIMIT: Duration = Duration::from_secs(20);

fn passt_is_there() -> bool {
    let there = installed("passt");
    if !there {
        skip("passt is not installed");
    }
    there
}

fn send(socket: &mut FrameSocket, frame: &[u8]) {
    let mut frame = frame.to_vec();
    assert!(socket.send(&[(&mut frame[..]).into()]).unwrap());
}

/// The first frame within `limit` that `pick` takes.
fn receive<T>(
    socket: &mut FrameSocket,
    limit: Duration,
    pick: impl Fn(&[u8]) -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        let mut frame = [0; 2000];
        match socket.recv(&[(&mut frame[..]).into()]).unwrap() {
            Some(length) => {
                if let Some(picked) = frame.get(..length).and_then(&pick) {
                    return Some(picked);
                }
            }
            None => {
                poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], 50_u8).unwrap();
            }
        }
    }
    None
}

/// Sends a DHCP discover (RFC 2131) and returns the offered address and the options.
fn dhcp_offer(socket: &mut FrameSocket) -> (Ipv4Addr, Vec<(u8, Vec<u8>)>) {
    let mut message = vec![0; 240];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(b"xid!");
    message[28..34].copy_from_slice(&common::GUEST_MAC);
    message[236..240].copy_from_slice(&[99, 130, 83, 99]);
    message.extend([53, 1, 1, 55, 4, 1, 3, 6, 26, 255]);
    message.resize(300, 0);
    send(
        socket,
        &udp(
            (Ipv4Addr::UNSPECIFIED, 68),
            (Ipv4Addr::BROADCAST, 67),
            &message,
        ),
    );
    let reply = receive(socket, LIMIT, |frame| {
        let message = frame.get(42..)?;
        (frame[23] == common::UDP && message[4..8] == *b"xid!").then(|| message.to_vec())
    })
    .unwrap();
    let address = Ipv4Addr::new(reply[16], reply[17], reply[18], reply[19]);
    let mut options = Vec::new();
    let mut rest = &reply[240..];
    while let [code @ 1..=254, length, tail @ ..] = rest {
        let (value, tail) = tail.split_at((*length).into());
        options.push((*code, value.to_vec()));
        rest = tail;
    }
    (address, options)
}

fn option(options: &[(u8, Vec<u8>)], code: u8) -> &[u8] {
    options
        .iter()
        .find(|(known, _)| *known == code)
        .map_or(&[], |(_, value)| value)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn end(passt: &mut Passt) -> PasstExit {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(exit) = passt.try_wait() {
            return exit;
        }
        assert!(Instant::now() < deadline, "passt goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_gets_its_network_by_dhcp() {
    if !passt_is_there() {
        return;
    }
    let dns = Ipv4Addr::new(192, 0, 2, 53);
    let config = PasstConfig {
        dns: Some(vec![dns]),
        mtu: Some(1400),
        ..PasstConfig::default()
    };
    let (mut passt, mut socket) = Passt::spawn(&config).unwrap();
    let (address, options) = dhcp_offer(&mut socket);
    assert_eq!(address, GUEST);
    assert_eq!(option(&options, 53), [2], "an offer");
    assert_eq!(option(&options, 1), [255, 255, 255, 0]);
    assert_eq!(option(&options, 3), GATEWAY.octets());
    assert_eq!(option(&options, 6), dns.octets());
    assert_eq!(option(&options, 26), 1400_u16.to_be_bytes());
    assert_eq!(passt.try_wait(), None);
}

#[test]
fn it_runs_on_a_host_without_any_network() {
    if !passt_is_there() || !common::inside_fresh_network() {
        return;
    }
    let (_passt, mut socket) = Passt::spawn(&PasstConfig::default()).unwrap();
    assert_eq!(dhcp_offer(&mut socket).0, GUEST);
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    if !passt_is_there() {
        return;
    }
    let forward = Forward {
        transport: Transport::Tcp,
        address: Some(Ipv4Addr::LOCALHOST),
        host: free_port(),
        guest: 22,
    };
    let config = PasstConfig {
        forwards: vec![forward],
        ..PasstConfig::default()
    };
    let (_passt, mut socket) = Passt::spawn(&config).unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", forward.host)).unwrap();
    client.write_all(b"hello").unwrap();

    let syn = receive(&mut socket, LIMIT, Segment::parse).unwrap();
    assert_eq!((syn.from.0, syn.to, syn.flags), (GATEWAY, (GUEST, 22), SYN));
    let acknowledged = syn.sequence.wrapping_add(1);
    send(
        &mut socket,
        &tcp(syn.to, syn.from, (1000, acknowledged), SYN | ACK),
    );
    let data = receive(&mut socket, LIMIT, |frame| {
        Segment::parse(frame).filter(|segment| !segment.data.is_empty())
    });
    assert_eq!(data.unwrap().data, b"hello");
    client.shutdown(Shutdown::Both).unwrap();
}

/// Whether a service on the host's loopback sees a connection of the guest to `target`.
fn guest_reaches_loopback(config: &PasstConfig, target: Ipv4Addr) -> bool {
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let (_passt, mut socket) = Passt::spawn(config).unwrap();
    send(
        &mut socket,
        &tcp((GUEST, 40_000), (target, port), (1, 0), SYN),
    );
    let limit = Duration::from_secs(1);
    let answer = receive(&mut socket, limit, Segment::parse);
    service.set_nonblocking(true).unwrap();
    let accepted = service.accept().is_ok();
    let flags = answer.map_or(RST, |segment| segment.flags);
    assert_eq!(accepted, flags == SYN | ACK, "{target}: {flags:#x}");
    accepted
}

#[test]
fn the_hosts_loopback_is_out_of_reach() {
    if !passt_is_there() {
        return;
    }
    let closed = PasstConfig::default();
    let open = PasstConfig {
        host_loopback: true,
        ..PasstConfig::default()
    };
    assert!(guest_reaches_loopback(&open, GATEWAY));
    assert!(!guest_reaches_loopback(&closed, GATEWAY));
    for target in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        assert!(!guest_reaches_loopback(&closed, target));
        assert!(!guest_reaches_loopback(&open, target));
    }
}

#[test]
fn a_taken_port_is_told() {
    if !passt_is_there() {
        return;
    }
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let host = taken.local_addr().unwrap().port();
    let forward = Forward {
        transport: Transport::Tcp,
        address: None,
        host,
        guest: 22,
    };
    let config = PasstConfig {
        forwards: vec![forward],
        ..PasstConfig::default()
    };
    let error = Passt::spawn(&config).unwrap_err().to_string();
    assert!(error.contains(&format!("{host}:22")), "{error}");
    assert!(
        error.ends_with("is the port taken, or below 1024 without privilege?"),
        "{error}"
    );
}

#[test]
fn a_program_that_is_missing_or_another() {
    let spawn = |program: &str| {
        Passt::spawn(&PasstConfig {
            program: PathBuf::from(program),
            ..PasstConfig::default()
        })
        .unwrap_err()
    };
    assert!(matches!(
        spawn("/nonexistent/passt"),
        PasstError::Missing { .. }
    ));
    assert!(matches!(spawn("/"), PasstError::Spawn { .. }));
    let error = spawn("/bin/false");
    assert!(
        matches!(&error, PasstError::Refused { exit } if exit.status.code() == Some(1)),
        "{error}"
    );
}

#[test]
fn networks_that_make_no_sense() {
    let config = PasstConfig::default;
    let network = |guest: [u8; 4], gateway: [u8; 4], prefix| {
        let (guest, gateway) = (guest.into(), gateway.into());
        let error = Passt::spawn(&PasstConfig {
            guest,
            gateway,
            prefix,
            ..config()
        })
        .unwrap_err();
        matches!(error, PasstError::Network { .. })
    };
    assert!(network([10, 0, 2, 15], [10, 0, 3, 2], 24));
    assert!(network([10, 0, 2, 15], [10, 0, 2, 15], 24));
    assert!(network([10, 0, 2, 0], [10, 0, 2, 2], 24));
    assert!(network([10, 0, 2, 15], [10, 0, 2, 255], 24));
    assert!(network([127, 0, 0, 2], [127, 0, 0, 3], 24));
    assert!(
        [0, 31, 32, 33, 255]
            .into_iter()
            .all(|p| network([10, 0, 2, 15], [10, 0, 2, 2], p))
    );
    for mtu in [0, 67, 65_521] {
        let error = Passt::spawn(&PasstConfig {
            mtu: Some(mtu),
            ..config()
        })
        .unwrap_err();
        assert!(matches!(error, PasstError::Mtu { .. }));
    }
    let forward = Forward {
        transport: Transport::Udp,
        address: None,
        host: 1,
        guest: 1,
    };
    for forward in [
        Forward { host: 0, ..forward },
        Forward {
            guest: 0,
            ..forward
        },
    ] {
        let error = Passt::spawn(&PasstConfig {
            forwards: vec![forward],
            ..config()
        })
        .unwrap_err();
        assert!(matches!(error, PasstError::Forward { .. }));
    }
}

#[test]
fn it_ends_with_its_socket_and_with_its_owner() {
    if !passt_is_there() {
        return;
    }
    let (mut passt, socket) = Passt::spawn(&PasstConfig::default()).unwrap();
    drop(socket);
    assert_eq!(end(&mut passt).message, "");

    let (passt, socket) = Passt::spawn(&PasstConfig::default()).unwrap();
    let process = PathBuf::from(format!("/proc/{}", passt.pid()));
    assert!(process.exists());
    drop(passt);
    assert!(!process.exists());
    drop(socket);
}

#[test]
fn its_death_is_told() {
    if !passt_is_there() {
        return;
    }
    let (mut passt, mut socket) = Passt::spawn(&PasstConfig::default()).unwrap();
    let pid = nix::unistd::Pid::from_raw(passt.pid().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let exit = end(&mut passt);
    assert_eq!(exit.to_string(), "signal: 9 (SIGKILL)");
    let error = socket.recv(&[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}
