//! A guest behind a pod's address, as KubeVirt's interfaces of that kind: 10.0.2.2, with the pod's
//! kernel as its gateway. All connections to the pod lead to it.

use std::fs;
use std::net::Ipv4Addr;

use edgevmm_config::{LeaseConfig, NetBackendConfig, NetConfig, Network};

use super::nft::{self, Chain, If, Rule, Then};
use super::resolver::Resolver;
use super::{NetworkError, Place, link, local};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// No more than the two, as others may have addresses close to them.
const PREFIX: u8 = 30;
const WHAT: &str = "translate addresses";
const NEEDS: &str = "the kernel needs nft_chain_nat, nft_nat and nft_masq";

/// Connects the tap of a place to its interface. Returns the machine's interface.
pub fn connect(place: &mut Place<'_>, resolver: &Resolver) -> Result<NetConfig, NetworkError> {
    place.set("ipv4", "route_localnet");
    let forward = fs::write("/proc/sys/net/ipv4/ip_forward", "1");
    forward.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    let address = link::add_address(place.tap_index, GATEWAY, PREFIX);
    place.ask(WHAT, NEEDS, address)?;
    let replaced = nft::replace(&rules(&place.interface.name, &place.tap));
    replaced.map_err(|source| place.refused(WHAT, NEEDS, source))?;
    let lease = LeaseConfig {
        address: Network {
            address: GUEST,
            prefix: PREFIX,
        },
        gateway: Some(GATEWAY),
        routes: Vec::new(),
        dns: resolver.servers.clone(),
        search: resolver.search.clone(),
        hostname: resolver.hostname.clone(),
    };
    Ok(NetConfig {
        backend: NetBackendConfig::Tap {
            tap: place.tap.clone(),
            lease: Some(Box::new(lease)),
        },
        mac: None,
        bootindex: None,
    })
}

fn rules(interface: &str, tap: &str) -> Vec<Rule> {
    let from = vec![If::From(interface.to_owned())];
    let to = vec![If::To(interface.to_owned())];
    let mut rules = local::rules(tap, GUEST);
    rules.push((Chain::Received, from, Then::Destination(GUEST)));
    rules.push((Chain::Sent, to, Then::Masquerade));
    rules
}
