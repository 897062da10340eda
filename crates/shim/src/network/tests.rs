//! In a network namespace of the test's own, with a tap for the interface of a pod.

#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;

use edgevmm_config::{Gateway6, LeaseConfig, MacAddr, NetBackendConfig};
use nix::sched::unshare;
use nix::unistd::{geteuid, gettid};

use super::frames::Ends;
use super::*;

/// The first interface's addresses, and its gateway's.
const ADDRESS: &str = "10.42.1.7";
const ADDRESS6: &str = "fd00:10::7";
const GATEWAY6: &str = "fd00:10::1";
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Does something in a namespace that has `names` as interfaces, the first of them with addresses,
/// unless this machine can't.
fn in_namespace(names: &'static [&str], test: fn()) {
    let thread = thread::spawn(move || {
        if !geteuid().is_root() || unshare(CloneFlags::CLONE_NEWNET).is_err() {
            eprintln!("SKIPPED: network namespaces are root's");
            return;
        }
        let mut kernel = Socket::route().unwrap();
        for name in names {
            Tap::make(name).unwrap();
            let index = if_nametoindex(*name).unwrap();
            kernel.request(link::bring_up(index, 1400)).unwrap();
            if *name == names[0] {
                let gateway6 = ip(GATEWAY6);
                for message in [
                    link::add_address(index, ip(ADDRESS), 24),
                    link::add_address(index, ip(ADDRESS6), 64),
                    link::add_neighbour(index, gateway6, GATEWAY_MAC),
                    default_route(index, GATEWAY6.parse().unwrap()),
                ] {
                    kernel.request(message).unwrap();
                }
            }
        }
        test();
    });
    thread.join().unwrap();
}

/// The interfaces that are up: a kernel may give each namespace some that are not.
fn up() -> Vec<Interface> {
    let mut interfaces = facts::interfaces().unwrap();
    interfaces.retain(|interface| interface.up);
    interfaces
}

/// Takes an interface down.
fn down(name: &str) -> Message {
    let numbers = [0, if_nametoindex(name).unwrap(), 0, 1];
    let header: Vec<u8> = numbers.into_iter().flat_map(u32::to_ne_bytes).collect();
    Message::new(16, netlink::ACK, &header)
}

fn default_route(index: u32, gateway: Ipv6Addr) -> Message {
    let (new_route, inet6, main, boot, universe, unicast) = (24, 10, 254, 3, 0, 1);
    let header = [inet6, 0, 0, 0, main, boot, universe, unicast, 0, 0, 0, 0];
    let mut message = Message::new(new_route, netlink::ACK | netlink::CREATE, &header);
    message.add(5, &gateway.octets());
    message.add(4, &index.to_ne_bytes());
    message
}

fn lease(net: &NetConfig) -> Option<&LeaseConfig> {
    match &net.backend {
        NetBackendConfig::Tap { lease, .. } => lease.as_deref(),
        NetBackendConfig::User { .. } => None,
    }
}

/// The interfaces of a wish, unless this machine's kernel lacks what they need.
fn connected(mode: Mode) -> Option<Vec<NetConfig>> {
    wished(&Wish {
        mode: Some(mode),
        pod: true,
        ..Wish::default()
    })
}

fn wished(wish: &Wish) -> Option<Vec<NetConfig>> {
    let node = Node {
        namespace: (0, 0),
        lan: None,
    };
    match set_up(wish, node) {
        Err(NetworkError::Kernel { source, needs, .. }) if !needs.is_empty() => {
            eprintln!("SKIPPED: {needs} ({source})");
            None
        }
        result => Some(result.unwrap()),
    }
}

#[test]
fn a_guest_takes_the_place_of_each_interface() {
    in_namespace(&["eth0", "net1"], || {
        let all = up();
        for _ in 0..2 {
            let Some(nets) = connected(Mode::Bridge) else {
                return;
            };
            assert_eq!(nets.len(), 2);
            let first = lease(&nets[0]).unwrap();
            assert_eq!(first.address, "10.42.1.7/24".parse().ok());
            assert_eq!(first.address6, "fd00:10::7/64".parse().ok());
            let gateway6 = Gateway6::Mac(MacAddr(GATEWAY_MAC), GATEWAY6.parse().ok());
            assert_eq!(first.gateway6, Some(gateway6));
            assert_eq!(lease(&nets[1]), None);
            for (net, interface) in nets.iter().zip(&all) {
                assert_eq!(net.mac.map(|mac| mac.0), Some(interface.mac));
                let tap = format!("evm{}", interface.index);
                assert_eq!(interface_mtu(&tap).unwrap(), 1400);
            }
        }
    });
}

#[test]
fn a_guest_is_behind_the_first_interface() {
    in_namespace(&["eth0"], || {
        for _ in 0..2 {
            let Some(nets) = connected(Mode::Masquerade) else {
                return;
            };
            let lease = lease(&nets[0]).unwrap();
            assert_eq!(lease.address, "10.0.2.2/30".parse().ok());
            assert_eq!(lease.address6, "fd10:0:2::2/120".parse().ok());
            assert_eq!(lease.gateway6, "fe80::1".parse().ok());
            assert_eq!((nets.len(), nets[0].mac), (1, None));
            // The pod's kernel keeps what routers told it.
            let heeds = fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra");
            assert_eq!(heeds.unwrap(), "2\n");
        }
        // It need not be there.
        nft::remove().unwrap();
        nft::remove().unwrap();
    });
}

/// What the guest sends goes out as the pod's.
#[test]
fn a_guest_behind_an_interface_has_its_ipv6_address() {
    in_namespace(&["eth0"], || {
        if connected(Mode::Masquerade).is_none() {
            return;
        }
        let mut ends = Ends::open("eth0");
        let all = up();
        let mac = |name: &str| all.iter().find(|one| one.name == name).unwrap().mac;
        let to_kernel = [mac(&ends.tap), [2, 0, 0, 0, 0, 9]];
        let frame = ends.udp6(to_kernel, "fd10:0:2::2", GATEWAY6, 64);
        let mut sent = frame.clone();
        sent[..6].copy_from_slice(&GATEWAY_MAC);
        sent[6..12].copy_from_slice(&mac("eth0"));
        sent[21] = 63;
        sent[22..38].copy_from_slice(&ADDRESS6.parse::<Ipv6Addr>().unwrap().octets());
        assert!(ends.arrives(&frame, |frame| {
            // The checksum, and the port if that is in use, are the kernel's to choose.
            frame.get(..54) == Some(&sent[..54]) && frame.get(56..60) == Some(&sent[56..60])
        }));
    });
}

/// It has no other addresses, and no other interface's.
#[test]
fn a_guest_behind_an_interface_is_kept_there() {
    in_namespace(&["eth0", "net1"], || {
        let mut kernel = Socket::route().unwrap();
        let index = if_nametoindex("net1").unwrap();
        for message in [
            link::add_address(index, ip("fd00:20::7"), 64),
            link::add_neighbour(index, ip("fd00:20::1"), GATEWAY_MAC),
        ] {
            kernel.request(message).unwrap();
        }
        for spoof in [false, true] {
            let wish = Wish {
                mode: Some(Mode::Masquerade),
                pod: true,
                spoof,
                ..Wish::default()
            };
            if wished(&wish).is_none() {
                return;
            }
            let all = up();
            let mac = |name: &str| all.iter().find(|one| one.name == name).unwrap().mac;
            let (mut ends, mut more) = (Ends::open("eth0"), Ends::open("net1"));
            let own = [2, 0, 0, 0, 0, 9];
            let macs = [mac(&ends.tap), own];
            let is_sent = |frame: &[u8]| frame.ends_with(&[9; 4]);
            let good = ends.udp6(macs, "fd10:0:2::2", GATEWAY6, 64);
            assert!(ends.arrives(&good, is_sent));
            let ready = [GATEWAY_MAC, mac("net1")];
            let ready = more.udp6(ready, "fd00:20::7", "fd00:20::1", 64);
            assert!(more.arrives(&ready, |frame| frame == ready));
            assert!(ends.is_told(own, "10.0.2.2", "10.0.2.1"));

            ends.send(&ends.udp6(macs, "fd10:0:2::3", GATEWAY6, 64));
            assert_eq!(ends.hears(is_sent), spoof);
            for source in ["fd10:0:2::2", "fd00:20::7"] {
                ends.send(&ends.udp6(macs, source, "fd00:20::1", 64));
                assert!(!more.hears(is_sent), "{source}");
            }
        }
    });
}

#[test]
fn a_guest_is_kept_to_its_addresses() {
    in_namespace(&["eth0", "net1"], || {
        let mac = |name| {
            let all = up();
            all.iter().find(|one| one.name == name).unwrap().mac
        };
        for spoof in [false, true] {
            let wish = Wish {
                pod: true,
                spoof,
                ..Wish::default()
            };
            if wished(&wish).is_none() {
                return;
            }
            let own = mac("eth0");
            let mut ends = Ends::open("eth0");
            let first = ends.good(own).swap_remove(0).1;
            assert!(ends.arrives(&first, |frame| frame == first));
            for (name, frame) in ends.good(own) {
                assert!(ends.crosses(&frame), "{name}");
            }
            for (name, frame) in ends.bad(own) {
                assert_eq!(ends.crosses(&frame), spoof, "{name}");
            }
            // One without addresses has its MAC address only.
            let own = mac("net1");
            let mut ends = Ends::open("net1");
            let first = ends.anything(own).swap_remove(0).0;
            assert!(ends.arrives(&first, |frame| frame == first));
            for (frame, crosses) in ends.anything(own) {
                assert_eq!(ends.crosses(&frame), spoof || crosses);
            }
        }
    });
}

/// Tears the network of this namespace down as seen from another one.
fn torn_down() {
    let path = format!("/proc/self/task/{}/ns/net", gettid());
    thread::scope(|scope| {
        let host = File::open("/proc/self/ns/net").unwrap();
        let torn = scope.spawn(move || {
            setns(host, CloneFlags::CLONE_NEWNET).unwrap();
            tear_down(Path::new(&path))
        });
        torn.join().unwrap().unwrap();
    });
}

#[test]
fn a_pod_has_its_interfaces_back() {
    in_namespace(&["eth0"], || {
        for mode in [Mode::Bridge, Mode::Masquerade] {
            let all = up();
            assert_eq!(all.len(), 1);
            if connected(mode).is_none() {
                return;
            }
            assert_eq!(up().len(), 2);
            for _ in 0..2 {
                torn_down();
            }
            assert_eq!(up(), all);
        }
        // The kernel hears the network again, which is asked for the pod's address.
        let mut eth0 = Ends::only("eth0");
        assert!(eth0.answers(ADDRESS));
    });
}

#[test]
fn a_pod_has_interfaces_back_that_are_down_meanwhile() {
    in_namespace(&["eth0"], || {
        let index = if_nametoindex("eth0").unwrap();
        let tap = format!("evm{index}");
        let mut kernel = Socket::route().unwrap();
        for taken_down in ["eth0", &tap] {
            if connected(Mode::Bridge).is_none() {
                return;
            }
            kernel.request(down(taken_down)).unwrap();
            torn_down();
            assert!(if_nametoindex(tap.as_str()).is_err(), "{taken_down}");
            kernel.request(link::bring_up(index, 1400)).unwrap();
            assert!(Ends::only("eth0").answers(ADDRESS), "{taken_down}");
        }
    });
}

#[test]
fn the_hosts_network_is_left_alone() {
    let wish = |mode, pod| Wish {
        mode,
        pod,
        ..Wish::default()
    };
    let here = || Node::look(&Wish::default()).unwrap();
    for (mode, pod) in [(None, true), (Some(Mode::Bridge), false)] {
        let error = set_up(&wish(mode, pod), here()).unwrap_err();
        assert!(matches!(error, NetworkError::Host), "{error}");
    }
    for (mode, pod) in [(None, false), (Some(Mode::None), true)] {
        assert_eq!(set_up(&wish(mode, pod), here()).unwrap(), []);
    }
}

#[test]
fn only_names_of_ours_are_ours() {
    for (name, ours) in [
        ("evm7", true),
        ("evm", false),
        ("evmtap1", false),
        ("eth0", false),
        ("7", false),
    ] {
        let interface = Interface {
            name: name.to_owned(),
            ..Interface::default()
        };
        assert_eq!(has_our_name(&interface), ours, "{name}");
    }
}

#[test]
fn only_taps_are_ours() {
    in_namespace(&["eth0"], || {
        let mut kernel = Socket::route().unwrap();
        let below = if_nametoindex("eth0").unwrap();
        let here = File::open("/proc/thread-self/ns/net").unwrap();
        let macvlan = link::add_macvlan("evm7", [2, 0, 0, 0, 0, 7], below, here.as_fd());
        if let Err(error) = kernel.request(macvlan) {
            eprintln!("SKIPPED: the kernel needs macvlan ({error})");
            return;
        }
        let index = if_nametoindex("evm7").unwrap();
        let kind = link::kind(&mut kernel, index).unwrap();
        assert_eq!(kind.as_deref(), Some("macvlan"));
        assert_eq!(link::kind(&mut kernel, 9999).unwrap(), None);
        Tap::make("evm8").unwrap();
        let left = clear(&mut kernel).unwrap();
        assert!(left.iter().any(|interface| interface.index == index));
        assert!(if_nametoindex("evm7").is_ok() && if_nametoindex("evm8").is_err());
    });
}
