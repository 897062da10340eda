//! In a network namespace of the test's own, with a tap for the interface of a pod.

#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

use edgevmm_config::{LeaseConfig, NetBackendConfig};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use super::*;

/// Does something in a namespace that has `names` as interfaces, the first of them with an address
/// and an MTU; false when this machine can't.
fn in_namespace(names: &'static [&str], test: fn()) {
    let thread = std::thread::spawn(move || {
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
                let address = link::add_address(index, Ipv4Addr::new(10, 42, 1, 7), 24);
                kernel.request(address).unwrap();
            }
        }
        test();
    });
    thread.join().unwrap();
}

fn lease(net: &NetConfig) -> Option<&LeaseConfig> {
    match &net.backend {
        NetBackendConfig::Tap { lease, .. } => lease.as_deref(),
        NetBackendConfig::User { .. } => None,
    }
}

/// The interfaces of a wish, unless this machine's kernel lacks what they need.
fn connected(mode: Mode) -> Option<Vec<NetConfig>> {
    let mode = Some(mode);
    let wish = Wish {
        mode,
        pod: true,
        ..Wish::default()
    };
    let node = Node {
        namespace: (0, 0),
        lan: None,
    };
    match set_up(&wish, node) {
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
        let all = facts::interfaces().unwrap();
        for _ in 0..2 {
            let Some(nets) = connected(Mode::Bridge) else {
                return;
            };
            assert_eq!(nets.len(), 2);
            let address = "10.42.1.7/24".parse().unwrap();
            assert_eq!(lease(&nets[0]).map(|lease| lease.address), Some(address));
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
            assert_eq!(lease.address.to_string(), "10.0.2.2/30");
            assert_eq!((nets.len(), nets[0].mac), (1, None));
        }
        // It need not be there.
        nft::remove().unwrap();
        nft::remove().unwrap();
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
    for (name, ours) in [("evm7", true), ("evmtap1", false), ("eth0", false)] {
        let interface = Interface {
            name: name.to_owned(),
            ..Interface::default()
        };
        assert_eq!(is_ours(&interface), ours, "{name}");
    }
}
