//! Taps in a network namespace of their own.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use common::{GUEST_MAC, arp_request, installed, skip};
use edgevmm_net::{MAX_PARTS, Offloads, Tap, TapError, VNET_HEADER};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use vm_memory::VolatileSlice;

const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

fn ready() -> bool {
    tools_are_there() && common::inside_fresh_network()
}

fn tools_are_there() -> bool {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        skip(&format!("cannot open /dev/net/tun: {error}"));
        return false;
    }
    if !installed("ip") {
        skip("iproute2 is not installed");
        return false;
    }
    true
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn send(tap: &mut Tap, header: &[u8], frame: &[u8]) -> std::io::Result<bool> {
    let (mut header, mut frame) = (header.to_vec(), frame.to_vec());
    tap.send(&[(&mut header[..]).into(), (&mut frame[..]).into()])
}

/// The length of the next frame, in memory that is divided into `parts`.
fn receive(tap: &mut Tap, parts: &[VolatileSlice<'_>]) -> usize {
    for _ in 0..100 {
        if let Some(length) = tap.recv(parts).unwrap() {
            return length;
        }
        poll(&mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)], 100_u8).unwrap();
    }
    panic!("no frame");
}

/// A tap named edge0 that is up, where nothing but ARP comes from the host, which has [`HOST`].
fn quiet_tap() -> Tap {
    ip("tuntap add dev edge0 mode tap");
    std::fs::write("/proc/sys/net/ipv6/conf/edge0/disable_ipv6", "1").unwrap();
    ip("address add 192.0.2.1/24 dev edge0");
    let tap = Tap::open("edge0").unwrap();
    // Up before it is open it would have no carrier, and the kernel takes its time to see that one
    // came.
    ip("link set edge0 up");
    tap
}

#[test]
fn frames_go_both_ways_behind_their_headers() {
    if !ready() {
        return;
    }
    let mut tap = quiet_tap();
    assert_eq!(tap.name(), "edge0");
    let flags = OFlag::from_bits_retain(fcntl(&tap, FcntlArg::F_GETFL).unwrap());
    assert!(flags.contains(OFlag::O_NONBLOCK));
    let request = arp_request(GUEST, HOST);

    ip("link set edge0 down");
    assert!(send(&mut tap, &[0; VNET_HEADER], &request).unwrap(), "down");
    ip("link set edge0 up");
    assert!(send(&mut tap, &[0; 5], &[]).unwrap(), "a stump");
    assert!(
        send(&mut tap, &[0xff; VNET_HEADER], &request).unwrap(),
        "nonsense"
    );
    assert!(tap.send(&[]).unwrap(), "nothing");
    assert!(send(&mut tap, &[0; VNET_HEADER], &request).unwrap());

    let (mut header, mut reply) = ([0xee; VNET_HEADER], [0xee; 100]);
    let parts = [(&mut header[..]).into(), (&mut reply[..]).into()];
    assert_eq!(receive(&mut tap, &parts), VNET_HEADER + request.len());
    assert_eq!(header[..10], [0; 10]);
    assert_eq!(reply[..6], GUEST_MAC);
    assert_eq!(reply[20..22], [0, 2]);
    assert_eq!(reply[28..32], HOST.octets());
    assert_eq!(reply[request.len()..], [0xee; 100][request.len()..]);

    ip("link delete edge0");
    let error = tap.recv(&[(&mut reply[..]).into()]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    assert!(send(&mut tap, &[0; VNET_HEADER], &request).is_err());
}

#[test]
fn frames_longer_than_the_room_are_lost() {
    if !ready() {
        return;
    }
    let mut tap = quiet_tap();
    let request = arp_request(GUEST, HOST);
    let whole = VNET_HEADER + request.len();
    for (room, fits) in [
        (0, false),
        (VNET_HEADER, false),
        (whole - 1, false),
        (whole, true),
        (whole + 1, true),
    ] {
        let mut memory = vec![0; room];
        let parts: Vec<_> = memory.chunks_mut(5).map(VolatileSlice::from).collect();
        assert!(send(&mut tap, &[0; VNET_HEADER], &request).unwrap());
        let length = receive(&mut tap, &parts);
        assert_eq!(length > room, !fits, "{room}: {length}");
        assert_eq!(tap.recv(&parts).unwrap(), None);
        if fits {
            assert_eq!(length, whole);
            assert_eq!(memory[VNET_HEADER..][..6], GUEST_MAC);
        }
    }
}

#[test]
fn as_many_parts_as_the_kernel_takes() {
    if !ready() {
        return;
    }
    let mut tap = quiet_tap();
    let request = arp_request(GUEST, HOST);
    let whole = VNET_HEADER + request.len();
    let mut memory = [0; MAX_PARTS + 1];
    memory[VNET_HEADER..whole].copy_from_slice(&request);
    let parts: Vec<_> = memory.chunks_mut(1).map(VolatileSlice::from).collect();
    let too_many = tap.send(&parts).unwrap_err();
    assert_eq!(too_many.kind(), ErrorKind::InvalidInput);
    let too_many = tap.recv(&parts).unwrap_err();
    assert_eq!(too_many.kind(), ErrorKind::InvalidInput);

    assert!(tap.send(&parts[..MAX_PARTS]).unwrap());
    assert_eq!(receive(&mut tap, &parts[..MAX_PARTS]), whole);

    // A frame of just the room of that many parts may be one that was cut off.
    let empty = VolatileSlice::from(&mut [][..]);
    for (room, fits) in [(whole - 1, false), (whole, false), (whole + 1, true)] {
        let mut memory = vec![0; room];
        let mut parts = vec![empty; MAX_PARTS - 1];
        parts.push(VolatileSlice::from(&mut memory[..]));
        assert!(send(&mut tap, &[0; VNET_HEADER], &request).unwrap());
        let length = receive(&mut tap, &parts);
        assert_eq!(length > room, !fits, "{room}: {length}");
    }
}

#[test]
fn the_mtu_is_the_interfaces() {
    if !ready() {
        return;
    }
    let tap = quiet_tap();
    assert_eq!(tap.mtu().unwrap(), 1500);
    ip("link set edge0 mtu 65521");
    assert_eq!(tap.mtu().unwrap(), 65_521);
    ip("link delete edge0");
    let gone = tap.mtu();
    assert!(matches!(
        gone,
        Err(TapError::Setup {
            setting: "SIOCGIFMTU",
            ..
        })
    ));
}

#[test]
fn offloads_are_the_kernels() {
    if !ready() {
        return;
    }
    let tap = quiet_tap();
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        ufo: true,
    };
    tap.set_offloads(all).unwrap();
    tap.set_offloads(Offloads {
        checksum: true,
        ..Offloads::default()
    })
    .unwrap();
    tap.set_offloads(Offloads::default()).unwrap();
    let refused = tap.set_offloads(Offloads {
        tso4: true,
        ..Offloads::default()
    });
    assert!(matches!(
        refused,
        Err(TapError::Setup {
            setting: "TUNSETOFFLOAD",
            ..
        })
    ));
}

#[test]
fn taps_that_others_have_and_interfaces_that_are_none() {
    if !ready() {
        return;
    }
    for missing in [
        Tap::open("edge0"),
        Tap::open_queues("edge0", 1).map(|mut all| all.remove(0)),
    ] {
        let error = missing.unwrap_err();
        assert!(matches!(error, TapError::Missing { .. }), "{error}");
    }
    ip("tuntap add dev edge0 mode tap");
    let first = Tap::open("edge0").unwrap();
    assert!(first.as_raw_fd() > 2);
    assert!(matches!(Tap::open("edge0"), Err(TapError::Busy { .. })));
    drop(first);
    Tap::open("edge0").unwrap();
    assert!(matches!(
        Tap::open_queues("edge0", 2),
        Err(TapError::Kind { .. })
    ));

    ip("tuntap add dev edge1 mode tap multi_queue");
    assert_eq!(Tap::open_queues("edge1", 4).unwrap().len(), 4);
    assert!(matches!(Tap::open("edge1"), Err(TapError::Kind { .. })));

    ip("tuntap add dev edge2 mode tun");
    for name in ["edge2", "lo"] {
        assert!(
            matches!(Tap::open(name), Err(TapError::Kind { .. })),
            "{name}"
        );
    }
}

#[test]
fn a_tap_of_somebody_else() {
    const STRANGER: &str = "EDGEVMM_TEST_STRANGER";
    if std::env::var_os(STRANGER).is_some() {
        let error = Tap::open("edge0").unwrap_err();
        assert!(matches!(error, TapError::Permission { .. }), "{error}");
    } else if tools_are_there() && common::inside_fresh_network_as_root() {
        ip("tuntap add dev edge0 mode tap user 1");
        // A user namespace has no rights over a network from outside of it.
        common::run_this_test("-r", STRANGER);
    }
}
