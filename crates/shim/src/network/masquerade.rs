//! A guest behind a pod's address, as KubeVirt's interfaces of that kind: 10.0.2.2, and fd10:0:2::2 if
//! the pod has IPv6, with the pod's kernel as its gateway. All connections to the pod lead to it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use edgevmm_config::{Gateway6, LeaseConfig, NetBackendConfig, NetConfig, Network, Network6};

use super::guard::Own;
use super::nft::{self, Chain, Family, If, Rule, Then};
use super::resolver::Resolver;
use super::{NetworkError, Place, link, local};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// No more than the two, as others may have addresses close to them.
const PREFIX: u8 = 30;
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0, 2, 0, 0, 0, 0, 2);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0, 2, 0, 0, 0, 0, 1);
const PREFIX6: u8 = 120;
/// The gateway as routers have to be known.
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const WHAT: &str = "translate addresses";
const NEEDS: &str = "the kernel needs nft_chain_nat, nft_nat and nft_masq";

/// Connects the tap of a place to its interface. The guest `may_spoof` other addresses or not, but has
/// no way out by the pod's other interfaces. Returns the machine's interface.
pub fn connect(
    place: &mut Place<'_>,
    resolver: &Resolver,
    may_spoof: bool,
) -> Result<NetConfig, NetworkError> {
    if !may_spoof {
        place.guard(&Own {
            mac: None,
            addresses: vec![GUEST],
            addresses6: vec![GUEST6],
            router: Some(ROUTER),
        })?;
    }
    place.set("ipv4", "route_localnet", "1");
    let forward = fs::write("/proc/sys/net/ipv4/ip_forward", "1");
    forward.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    let address = link::add_address(place.tap_index, GATEWAY.into(), PREFIX);
    place.ask(WHAT, NEEDS, address)?;
    let mut rules = local::rules(&place.tap, GUEST);
    rules.extend(behind(place, GUEST.into()));
    let replaced = nft::replace(Family::Inet, &rules);
    replaced.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    let mut lease = LeaseConfig {
        address: Some(Network {
            address: GUEST,
            prefix: PREFIX,
        }),
        gateway: Some(GATEWAY),
        dns: resolver.servers.clone(),
        search: resolver.search.clone(),
        hostname: resolver.hostname.clone(),
        ..LeaseConfig::default()
    };
    if !place.interface.addresses6.is_empty() {
        match connect6(place) {
            Ok(()) => {
                lease.gateway6 = Some(Gateway6::Link(ROUTER));
                lease.address6 = Some(Network6 {
                    address: GUEST6,
                    prefix: PREFIX6,
                });
            }
            Err(error) => eprintln!("The guest has no IPv6: {}", crate::chain(&error)),
        }
    }
    Ok(NetConfig {
        backend: NetBackendConfig::Tap {
            tap: place.tap.clone(),
            lease: Some(Box::new(lease)),
        },
        mac: None,
        bootindex: None,
    })
}

/// The same for IPv6, of which there is none at the tap if that fails.
fn connect6(place: &mut Place<'_>) -> Result<(), NetworkError> {
    let routed = route6(place);
    if routed.is_err() {
        place.set("ipv6", "disable_ipv6", "1");
    }
    routed
}

fn route6(place: &mut Place<'_>) -> Result<(), NetworkError> {
    // Before anything is forwarded, which would leave with the guest's address.
    let rules = behind(place, GUEST6.into());
    let replaced = nft::replace(Family::Inet6, &rules);
    replaced.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    keep_routers(&place.interface.name);
    // The gateway's addresses are those below, and it is nobody's host.
    for (switch, value) in [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("disable_ipv6", "0"),
    ] {
        place.set("ipv6", switch, value);
    }
    let forward = fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1");
    forward.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    for (address, prefix) in [(GATEWAY6, PREFIX6), (ROUTER, 64)] {
        let address = link::add_address(place.tap_index, address.into(), prefix);
        place.ask(WHAT, NEEDS, address)?;
    }
    Ok(())
}

/// Has an interface that heeds router advertisements do so when it forwards, too: else the default
/// routes that it has by them would go.
fn keep_routers(interface: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/accept_ra");
    let heeds = fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1");
    if heeds {
        let _ = fs::write(path, "2");
    }
}

/// Rules that put a guest behind the address of its place's interface, and no other.
fn behind(place: &Place<'_>, guest: IpAddr) -> Vec<Rule> {
    let interface = || place.interface.name.clone();
    let from = vec![If::From(interface())];
    let to = vec![If::To(interface())];
    let astray = vec![If::From(place.tap.clone()), If::NotTo(interface())];
    vec![
        (Chain::Forwarded, astray, Then::Drop),
        (Chain::Received, from, Then::Destination(guest)),
        (Chain::Sent, to, Then::Masquerade),
    ]
}
