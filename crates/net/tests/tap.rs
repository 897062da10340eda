//! Taps in a network namespace of their own.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use common::{GUEST_MAC, arp_request, installed, skip};
use edgevmm_net::{Offloads, Tap, TapError, VNET_HEADER};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};

fn ready() -> bool {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        skip(&format!("cannot open /dev/net/tun: {error}"));
        return false;
    }
    if !installed("ip") {
        skip("iproute2 is not installed");
        return false;
    }
    common::inside_fresh_network()
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// The next ARP frame behind its header.
fn receive_arp(tap: &mut Tap) -> ([u8; VNET_HEADER], Vec<u8>) {
    for _ in 0..100 {
        let mut header = [0xee; VNET_HEADER];
        let mut frame = [0; 2000];
        let parts = &mut [IoSliceMut::new(&mut header), IoSliceMut::new(&mut frame)];
        match tap.recv(parts).unwrap() {
            Some(length) if frame[12..14] == common::ARP.to_be_bytes() => {
                return (header, frame[..length - VNET_HEADER].to_vec());
            }
            Some(_) => {}
            None => {
                poll(&mut [PollFd::new(tap.as_fd(), PollFlags::POLLIN)], 100_u8).unwrap();
            }
        }
    }
    panic!("no ARP frame");
}

#[test]
fn frames_go_both_ways_behind_their_headers() {
    if !ready() {
        return;
    }
    let mut tap = Tap::open("edge0").unwrap();
    assert_eq!(tap.name(), "edge0");
    let flags = OFlag::from_bits_retain(fcntl(&tap, FcntlArg::F_GETFL).unwrap());
    assert!(flags.contains(OFlag::O_NONBLOCK));
    let host = Ipv4Addr::new(192, 0, 2, 1);
    let guest = Ipv4Addr::new(192, 0, 2, 2);
    let request = arp_request(guest, host);
    let header = [0; VNET_HEADER];

    assert!(
        tap.send(&[IoSlice::new(&header), IoSlice::new(&request)])
            .unwrap(),
        "down: dropped"
    );
    ip("address add 192.0.2.1/24 dev edge0");
    ip("link set edge0 up");
    assert!(
        tap.send(&[IoSlice::new(&header[..5]), IoSlice::new(&[])])
            .unwrap(),
        "a stump"
    );
    assert!(
        tap.send(&[IoSlice::new(&[0xff; VNET_HEADER]), IoSlice::new(&request)])
            .unwrap()
    );
    assert!(
        tap.send(&[IoSlice::new(&header), IoSlice::new(&request)])
            .unwrap()
    );

    let (header, reply) = receive_arp(&mut tap);
    assert_eq!(header[..10], [0; 10]);
    assert_eq!(reply[..6], GUEST_MAC);
    assert_eq!(reply[20..22], [0, 2]);
    assert_eq!(reply[28..32], host.octets());

    ip("link delete edge0");
    let error = tap.recv(&mut [IoSliceMut::new(&mut [0; 100])]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    assert!(
        tap.send(&[IoSlice::new(&[0; VNET_HEADER]), IoSlice::new(&request)])
            .is_err()
    );
}

#[test]
fn offloads_are_the_kernels() {
    if !ready() {
        return;
    }
    let tap = Tap::open("edge0").unwrap();
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
fn a_network_of_somebody_else() {
    const STRANGER: &str = "EDGEVMM_TEST_STRANGER";
    if std::env::var_os(STRANGER).is_some() {
        let error = Tap::open("edge0").unwrap_err();
        assert!(matches!(error, TapError::Permission { .. }), "{error}");
    } else if ready() {
        // A second user namespace has no rights over the network of the first.
        common::run_this_test("-r", STRANGER);
    }
}
