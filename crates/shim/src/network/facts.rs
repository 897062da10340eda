//! What a network namespace has, as a CNI plugin left it: its interfaces, their addresses and
//! routes.

use std::fs;
use std::io;
use std::net::Ipv4Addr;

use edgevmm_config::{LeaseConfig, Network, RouteConfig};
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::libc::ARPHRD_ETHER;
use nix::net::if_::InterfaceFlags;

use super::resolver::Resolver;

/// The routes of the network namespace of the caller.
const ROUTES: &str = "/proc/thread-self/net/route";
const ROUTE_UP: u32 = 1;
const ROUTE_REJECT: u32 = 0x200;

/// An interface that is up and takes Ethernet frames.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 addresses.
    pub addresses: Vec<Network>,
    /// Routes by it, those that win first.
    pub routes: Vec<RouteConfig>,
}

/// The interfaces of the network namespace of the caller, the one with the default route first.
///
/// # Errors
///
/// When the kernel does not tell.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = Vec::new();
    let mut addresses = Vec::new();
    for entry in getifaddrs()? {
        if let Some(interface) = ethernet(&entry) {
            interfaces.push(interface);
        } else if let Some(address) = address(&entry) {
            addresses.push((entry.interface_name, address));
        }
    }
    let routes = parse_routes(&fs::read_to_string(ROUTES).unwrap_or_default());
    for interface in &mut interfaces {
        let own = addresses.iter().filter(|(name, _)| *name == interface.name);
        interface.addresses = own.map(|(_, address)| *address).collect();
        let own = routes.iter().filter(|(name, _)| *name == interface.name);
        interface.routes = own.map(|(_, route)| *route).collect();
    }
    // The one by which all the world is reached is the guest's first.
    interfaces.sort_by_key(|interface| (interface.gateway().is_none(), interface.index));
    Ok(interfaces)
}

fn ethernet(entry: &InterfaceAddress) -> Option<Interface> {
    let wanted = entry.flags.contains(InterfaceFlags::IFF_UP)
        && !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
    let link = entry.address.as_ref()?.as_link_addr()?;
    (wanted && link.hatype() == ARPHRD_ETHER).then_some(Interface {
        name: entry.interface_name.clone(),
        index: u32::try_from(link.ifindex()).ok()?,
        mac: link.addr()?,
        ..Interface::default()
    })
}

fn address(entry: &InterfaceAddress) -> Option<Network> {
    let address = entry.address.as_ref()?.as_sockaddr_in()?.ip();
    let mask = entry.netmask.as_ref()?.as_sockaddr_in()?.ip();
    let prefix = prefix(mask);
    Some(Network { address, prefix })
}

fn prefix(mask: Ipv4Addr) -> u8 {
    u8::try_from(mask.to_bits().leading_ones()).unwrap_or(32)
}

/// Routes of a text like /proc/net/route (proc(5)) with the names of their interfaces, the ones
/// that win first.
fn parse_routes(text: &str) -> Vec<(String, RouteConfig)> {
    let mut routes: Vec<(u32, String, RouteConfig)> =
        text.lines().filter_map(parse_route).collect();
    routes.sort_by_key(|(metric, ..)| *metric);
    let routes = routes.into_iter();
    routes.map(|(_, name, route)| (name, route)).collect()
}

fn parse_route(line: &str) -> Option<(u32, String, RouteConfig)> {
    let mut fields = line.split_ascii_whitespace();
    let name = fields.next()?.to_owned();
    let address = |text| {
        // The bytes of the address, as a number of this processor's.
        let number = u32::from_str_radix(text, 16).ok()?;
        Some(Ipv4Addr::from(number.to_ne_bytes()))
    };
    let network = address(fields.next()?)?;
    let gateway = address(fields.next()?)?;
    let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
    let metric = fields.nth(2)?.parse().ok()?;
    let prefix = prefix(address(fields.next()?)?);
    let route = RouteConfig {
        network: Network {
            address: network,
            prefix,
        },
        gateway: Some(gateway).filter(|gateway| !gateway.is_unspecified()),
    };
    (flags & (ROUTE_UP | ROUTE_REJECT) == ROUTE_UP).then_some((metric, name, route))
}

impl Interface {
    /// Where what belongs elsewhere goes.
    pub fn gateway(&self) -> Option<Ipv4Addr> {
        let mut defaults = self.routes.iter().filter(|route| route.network.prefix == 0);
        defaults.find_map(|route| route.gateway)
    }

    /// What a guest that takes the place of this interface is told. `None` without an address: the
    /// guest's questions go to the network then.
    pub fn lease(&self, resolver: &Resolver) -> Option<LeaseConfig> {
        let mut address = *self.addresses.first()?;
        let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix.min(32)));
        let network = address.address.to_bits() & mask.unwrap_or(0);
        let own = |route: &&RouteConfig| {
            let to = route.network;
            route.gateway.is_none()
                && (to.address.to_bits(), to.prefix) == (network, address.prefix)
        };
        let more = self.routes.iter().filter(|route| !own(route));
        let more = more.filter(|route| route.network.prefix > 0);
        let mut routes: Vec<_> = more.copied().collect();
        // A gateway is reached by one of those without, which a guest must know before.
        routes.sort_by_key(|route| route.gateway.is_some());
        if !self.routes.iter().any(|route| own(&route)) {
            // The others of its network are reached by a gateway, as plugins like `ptp` have it: a guest
            // that were told of the network would ask for their MAC addresses in vain.
            address.prefix = 32;
        }
        Some(LeaseConfig {
            address,
            gateway: self.gateway(),
            routes,
            dns: resolver.servers.clone(),
            search: resolver.search.clone(),
            hostname: resolver.hostname.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As flannel leaves it, and another interface.
    const TEXT: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
net1\t00000000\t0105A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t00000000\t01012A0A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t00002A0A\t01012A0A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t00012A0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t000AFEA9\t00000000\t0200\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\tzz\t\n";

    fn interface(text: &str, name: &str, address: &str) -> Interface {
        let routes = parse_routes(text).into_iter();
        let own = routes.filter(|(of, _)| of == name);
        Interface {
            name: name.to_owned(),
            addresses: vec![address.parse().unwrap()],
            routes: own.map(|(_, route)| route).collect(),
            ..Interface::default()
        }
    }

    #[test]
    fn routes_are_those_of_the_interface_but_its_own_network() {
        let names: Vec<_> = parse_routes(TEXT)
            .into_iter()
            .map(|route| route.0)
            .collect();
        assert_eq!(names, ["eth0", "eth0", "eth0", "net1"]);
        let lease = interface(TEXT, "eth0", "10.42.1.7/24")
            .lease(&Resolver::default())
            .unwrap();
        assert_eq!(lease.gateway, Some(Ipv4Addr::new(10, 42, 1, 1)));
        assert_eq!(lease.address.prefix, 24);
        assert_eq!(lease.routes, ["10.42.0.0/16@10.42.1.1".parse().unwrap()]);
        // A route to a gateway outside of the own network stays.
        let lease = interface(TEXT, "eth0", "10.42.1.7/32")
            .lease(&Resolver::default())
            .unwrap();
        assert!(lease.routes.contains(&"10.42.1.0/24".parse().unwrap()));
    }

    #[test]
    fn a_network_behind_a_gateway_is_not_the_own() {
        // As the plugin `ptp` leaves it.
        let text = "\
eth0\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000F40A\t0100F40A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t0100F40A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
";
        let lease = interface(text, "eth0", "10.244.0.5/24")
            .lease(&Resolver::default())
            .unwrap();
        assert_eq!(lease.address, "10.244.0.5/32".parse().unwrap());
        assert_eq!(lease.gateway, Some(Ipv4Addr::new(10, 244, 0, 1)));
        let routes = ["10.244.0.1/32", "10.244.0.0/24@10.244.0.1"];
        assert_eq!(lease.routes, routes.map(|route| route.parse().unwrap()));
    }

    #[test]
    fn the_loopback_is_none() {
        let interfaces = interfaces().unwrap();
        assert!(interfaces.iter().all(|interface| interface.name != "lo"));
    }
}
