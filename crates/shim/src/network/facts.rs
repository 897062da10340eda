//! What a network namespace has, as a CNI plugin left it: its interfaces, their addresses and
//! routes.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use edgevmm_config::{Gateway6, LeaseConfig, Network, Network6, RouteConfig};
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::libc::ARPHRD_ETHER;
use nix::net::if_::InterfaceFlags;

use super::resolver::Resolver;

/// The routes of the network namespace of the caller.
const ROUTES: &str = "/proc/thread-self/net/route";
const ROUTES6: &str = "/proc/thread-self/net/ipv6_route";
const ROUTE_UP: u32 = 1;
const ROUTE_REJECT: u32 = 0x200;
/// Routes that the kernel makes for addresses of its own.
const ROUTE_OWN: u32 = 0x8010_0000;

/// An interface that takes Ethernet frames.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// Whether it is up.
    pub up: bool,
    /// Its IPv4 addresses.
    pub addresses: Vec<Network>,
    /// Routes by it, those that win first.
    pub routes: Vec<RouteConfig>,
    /// Its IPv6 addresses, but for those of the link.
    pub addresses6: Vec<Network6>,
    /// Its IPv6 routes.
    pub routes6: Vec<Route6>,
}

/// An IPv6 route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route6 {
    network: Network6,
    gateway: Option<Ipv6Addr>,
}

/// The interfaces of the network namespace of the caller, up or not, the one with the default route first.
///
/// # Errors
///
/// When the kernel does not tell.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = Vec::new();
    let (mut addresses, mut addresses6) = (Vec::new(), Vec::new());
    for entry in getifaddrs()? {
        if let Some(interface) = ethernet(&entry) {
            interfaces.push(interface);
        } else if let Some(address) = address(&entry) {
            addresses.push((entry.interface_name, address));
        } else if let Some(address) = address6(&entry) {
            addresses6.push((entry.interface_name, address));
        }
    }
    let routes = parse_routes(&fs::read_to_string(ROUTES).unwrap_or_default());
    let routes6 = parse_routes6(&fs::read_to_string(ROUTES6).unwrap_or_default());
    for interface in &mut interfaces {
        let own = addresses6.iter();
        let own = own.filter(|(name, _)| *name == interface.name);
        interface.addresses6 = own.map(|(_, address)| *address).collect();
        let own = routes6.iter().filter(|(name, _)| *name == interface.name);
        interface.routes6 = own.map(|(_, route)| *route).collect();
        let own = addresses.iter().filter(|(name, _)| *name == interface.name);
        interface.addresses = own.map(|(_, address)| *address).collect();
        let own = routes.iter().filter(|(name, _)| *name == interface.name);
        interface.routes = own.map(|(_, route)| *route).collect();
    }
    // The one by which all the world is reached is the guest's first.
    interfaces.sort_by_key(|interface| {
        let (gateway, gateway6) = (interface.gateway(), interface.gateway6());
        (gateway.is_none(), gateway6.is_none(), interface.index)
    });
    Ok(interfaces)
}

fn ethernet(entry: &InterfaceAddress) -> Option<Interface> {
    let link = entry.address.as_ref()?.as_link_addr()?;
    let wanted = !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
    (wanted && link.hatype() == ARPHRD_ETHER).then_some(Interface {
        name: entry.interface_name.clone(),
        index: u32::try_from(link.ifindex()).ok()?,
        mac: link.addr()?,
        up: entry.flags.contains(InterfaceFlags::IFF_UP),
        ..Interface::default()
    })
}

fn address(entry: &InterfaceAddress) -> Option<Network> {
    let address = entry.address.as_ref()?.as_sockaddr_in()?.ip();
    let mask = entry.netmask.as_ref()?.as_sockaddr_in()?.ip();
    let prefix = prefix(mask);
    Some(Network { address, prefix })
}

fn address6(entry: &InterfaceAddress) -> Option<Network6> {
    let address = entry.address.as_ref()?.as_sockaddr_in6()?.ip();
    let mask = entry.netmask.as_ref()?.as_sockaddr_in6()?.ip();
    let prefix = u8::try_from(mask.to_bits().leading_ones()).ok()?;
    let good = !address.is_unicast_link_local() && !address.is_loopback();
    good.then_some(Network { address, prefix })
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

/// As [`parse_routes`], of a text like /proc/net/ipv6_route.
fn parse_routes6(text: &str) -> Vec<(String, Route6)> {
    let mut routes: Vec<_> = text.lines().filter_map(parse_route6).collect();
    routes.sort_by_key(|(metric, ..)| *metric);
    let routes = routes.into_iter();
    routes.map(|(_, name, route)| (name, route)).collect()
}

fn parse_route6(line: &str) -> Option<(u32, String, Route6)> {
    let mut fields = line.split_ascii_whitespace();
    let address = |text| Some(Ipv6Addr::from(u128::from_str_radix(text, 16).ok()?));
    let network = Network {
        address: address(fields.next()?)?,
        prefix: u8::from_str_radix(fields.next()?, 16).ok()?,
    };
    let gateway = Some(address(fields.nth(2)?)?);
    let gateway = gateway.filter(|gateway| !gateway.is_unspecified());
    let metric = u32::from_str_radix(fields.next()?, 16).ok()?;
    let flags = u32::from_str_radix(fields.nth(2)?, 16).ok()?;
    let name = fields.next()?.to_owned();
    let wanted = flags & (ROUTE_UP | ROUTE_REJECT | ROUTE_OWN) == ROUTE_UP;
    wanted.then_some((metric, name, Route6 { network, gateway }))
}

impl Interface {
    /// Where IPv6 that belongs elsewhere goes.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        let mut defaults = self.routes6.iter();
        let default = defaults.find(|route| route.network.prefix == 0)?;
        default.gateway
    }

    /// Where what belongs elsewhere goes.
    pub fn gateway(&self) -> Option<Ipv4Addr> {
        let mut defaults = self.routes.iter().filter(|route| route.network.prefix == 0);
        defaults.find_map(|route| route.gateway)
    }

    /// What a guest that takes the place of this interface is told, with the router of its IPv6. `None`
    /// without an address: the guest's questions go to the network then.
    pub fn lease(&self, resolver: &Resolver, gateway6: Option<Gateway6>) -> Option<LeaseConfig> {
        let (address, address6) = (self.own_network(), self.own_network6());
        let lease = LeaseConfig {
            address,
            address6,
            dns: resolver.servers.clone(),
            search: resolver.search.clone(),
            hostname: resolver.hostname.clone(),
            ..LeaseConfig::default()
        };
        let routes = LeaseConfig {
            gateway: self.gateway().filter(|_| address.is_some()),
            routes: address.map_or_else(Vec::new, |own| self.more_routes(own)),
            gateway6: gateway6.filter(|_| address6.is_some()),
            ..lease
        };
        (address.is_some() || address6.is_some()).then_some(routes)
    }

    /// The address, with its network if that is on the link. Else the others of it are reached by a
    /// gateway, as plugins like `ptp` have it: a guest that were told of the network would ask for their
    /// MAC addresses in vain.
    fn own_network(&self) -> Option<Network> {
        let own = *self.addresses.first()?;
        let prefix = if self.routes.iter().any(|route| is_own(route, own)) {
            own.prefix
        } else {
            32
        };
        Some(Network { prefix, ..own })
    }

    /// As [`Interface::own_network`].
    fn own_network6(&self) -> Option<Network6> {
        let own = *self.addresses6.first()?;
        let network = first6(own);
        let on_link = |route: &Route6| {
            let to = route.network;
            route.gateway.is_none() && (first6(to), to.prefix) == (network, own.prefix)
        };
        let prefix = if self.routes6.iter().any(on_link) {
            own.prefix
        } else {
            128
        };
        Some(Network { prefix, ..own })
    }

    /// Routes besides that to the own network and the default one.
    fn more_routes(&self, own: Network) -> Vec<RouteConfig> {
        let more = self.routes.iter().filter(|route| !is_own(route, own));
        let more = more.filter(|route| route.network.prefix > 0);
        let mut routes: Vec<_> = more.copied().collect();
        // A gateway is reached by one of those without, which a guest must know before.
        routes.sort_by_key(|route| route.gateway.is_some());
        routes
    }
}

/// Whether a route leads right to the network of an address.
fn is_own(route: &RouteConfig, own: Network) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(own.prefix.min(32)));
    let network = own.address.to_bits() & mask.unwrap_or(0);
    let to = route.network;
    route.gateway.is_none() && (to.address.to_bits(), to.prefix) == (network, own.prefix)
}

/// First address of a network.
fn first6(network: Network6) -> u128 {
    let mask = u128::MAX.checked_shl(128 - u32::from(network.prefix.min(128)));
    network.address.to_bits() & mask.unwrap_or(0)
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
            .lease(&Resolver::default(), None)
            .unwrap();
        assert_eq!(lease.gateway, Some(Ipv4Addr::new(10, 42, 1, 1)));
        assert_eq!(lease.address.unwrap().prefix, 24);
        assert_eq!(lease.routes, ["10.42.0.0/16@10.42.1.1".parse().unwrap()]);
        // A route to a gateway outside of the own network stays.
        let lease = interface(TEXT, "eth0", "10.42.1.7/32")
            .lease(&Resolver::default(), None)
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
            .lease(&Resolver::default(), None)
            .unwrap();
        assert_eq!(lease.address, Some("10.244.0.5/32".parse().unwrap()));
        assert_eq!(lease.gateway, Some(Ipv4Addr::new(10, 244, 0, 1)));
        let routes = ["10.244.0.1/32", "10.244.0.0/24@10.244.0.1"];
        assert_eq!(lease.routes, routes.map(|route| route.parse().unwrap()));
    }

    /// As the plugin `bridge` leaves it, with the kernel's own.
    const TEXT6: &str = "\
fd001000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd001000000000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
fd001000000000000000000000000007 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001     eth0
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000002 00000000 00000001     eth0
short 40\n";

    #[test]
    fn ipv6_is_told_with_its_network_if_that_is_on_the_link() {
        let routes = parse_routes6(TEXT6).into_iter();
        let own = routes.filter(|(name, _)| name == "eth0");
        let mut interface = Interface {
            addresses6: vec!["fd00:1000::7/64".parse().unwrap()],
            routes6: own.map(|(_, route)| route).collect(),
            ..Interface::default()
        };
        assert_eq!(interface.routes6.len(), 4);
        assert_eq!(interface.gateway6(), Some("fd00:1000::1".parse().unwrap()));
        let router = "fe80::1".parse().ok();
        let lease = interface.lease(&Resolver::default(), router).unwrap();
        assert_eq!(lease.address6, Some("fd00:1000::7/64".parse().unwrap()));
        assert_eq!((lease.address, lease.gateway6), (None, router));
        interface.routes6.remove(0);
        let lease = interface.lease(&Resolver::default(), router).unwrap();
        assert_eq!(lease.address6, Some("fd00:1000::7/128".parse().unwrap()));
        interface.addresses6.clear();
        assert_eq!(interface.lease(&Resolver::default(), router), None);
    }

    #[test]
    fn the_loopback_is_none() {
        let interfaces = interfaces().unwrap();
        assert!(interfaces.iter().all(|interface| interface.name != "lo"));
    }
}
