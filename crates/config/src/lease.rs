//! The address that a guest gets on a tap, when it asks.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::MacAddr;

/// What a guest is told when it asks, by DHCP or for IPv6 routers, on an interface whose network has
/// nobody who answers that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Its IPv4 address and network; without it, such questions go to the network.
    pub address: Option<Network>,
    /// Where it sends what belongs elsewhere.
    pub gateway: Option<Ipv4Addr>,
    /// Further routes.
    pub routes: Vec<RouteConfig>,
    /// Its IPv6 address, and the network on the link; without it, such questions go to the network.
    pub address6: Option<Network6>,
    /// Where it sends what belongs elsewhere.
    pub gateway6: Option<Gateway6>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Domains to look names up in.
    pub search: Vec<String>,
    /// The guest's name.
    pub hostname: Option<String>,
}

/// An address with the bits of its network, written `10.42.0.7/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network<A = Ipv4Addr> {
    /// The address.
    pub address: A,
    /// Bits of the network, up to those of an address.
    pub prefix: u8,
}

/// An IPv6 address with the bits of its network, written `fd00::7/64`.
pub type Network6 = Network<Ipv6Addr>;

/// An IPv6 router, which guests know by an address of the link only: that address, or the router's MAC
/// address, for which one is made up, written `MAC` or `MAC@ADDRESS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gateway6 {
    /// Its address of the link.
    Link(Ipv6Addr),
    /// Its MAC address, and its own address, by which it is found again when the other changes.
    Mac(MacAddr, Option<Ipv6Addr>),
}

/// Addresses of a kind.
trait Address: FromStr + fmt::Display {
    const BITS: u8;
    /// A network of them.
    const LIKE: &'static str;
}

impl Address for Ipv4Addr {
    const BITS: u8 = 32;
    const LIKE: &'static str = "10.42.0.7/24";
}

impl Address for Ipv6Addr {
    const BITS: u8 = 128;
    const LIKE: &'static str = "fd00::7/64";
}

/// A route, written `NETWORK/BITS` or `NETWORK/BITS@GATEWAY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteConfig {
    /// Where it leads.
    pub network: Network,
    /// Where packets for it go; straight to the receiver if absent.
    pub gateway: Option<Ipv4Addr>,
}

/// Why a text is no network or route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkTextError {
    /// A network.
    #[error("`{0}` is not an address with the bits of its network: write it like {1}")]
    Network(String, &'static str),
    /// A route's gateway.
    #[error("`{0}` is not a route: write NETWORK/BITS@GATEWAY, like 10.42.0.0/16@10.42.0.1")]
    Route(String),
    /// An IPv6 router.
    #[error(
        "`{0}` is not an IPv6 router: write its link-local address, like fe80::1, or its MAC address, \
         with @ and its IPv6 address if it may change"
    )]
    Gateway6(String),
}

impl<A: Address> FromStr for Network<A> {
    type Err = NetworkTextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('/').and_then(|(address, prefix)| {
            let plain = prefix.bytes().all(|digit| digit.is_ascii_digit());
            let prefix = prefix
                .parse()
                .ok()
                .filter(|prefix| plain && *prefix <= A::BITS)?;
            Some((address.parse().ok()?, prefix))
        });
        match parts {
            Some((address, prefix)) => Ok(Self { address, prefix }),
            None => Err(NetworkTextError::Network(text.to_owned(), A::LIKE)),
        }
    }
}

impl<A: fmt::Display> fmt::Display for Network<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for RouteConfig {
    type Err = NetworkTextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, gateway) = match text.split_once('@') {
            Some((network, gateway)) => {
                let gateway = gateway.parse();
                let gateway = gateway.map_err(|_| NetworkTextError::Route(text.to_owned()))?;
                (network, Some(gateway))
            }
            None => (text, None),
        };
        let network = network.parse()?;
        Ok(Self { network, gateway })
    }
}

impl fmt::Display for RouteConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.network.fmt(f)?;
        match self.gateway {
            Some(gateway) => write!(f, "@{gateway}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Gateway6 {
    type Err = NetworkTextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NetworkTextError::Gateway6(text.to_owned());
        if let Some((mac, address)) = text.split_once('@') {
            let parts = mac.parse().ok().zip(address.parse().ok());
            let (mac, address) = parts.ok_or_else(wrong)?;
            return Ok(Self::Mac(mac, Some(address)));
        }
        if let Ok(mac) = text.parse() {
            return Ok(Self::Mac(mac, None));
        }
        let address = text.parse().ok().filter(Ipv6Addr::is_unicast_link_local);
        address.map(Self::Link).ok_or_else(wrong)
    }
}

impl fmt::Display for Gateway6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(address) => address.fmt(f),
            Self::Mac(mac, None) => mac.fmt(f),
            Self::Mac(mac, Some(address)) => write!(f, "{mac}@{address}"),
        }
    }
}

/// Reads and writes a type as its text.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

as_text!(Network, Network6, RouteConfig, Gateway6);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn networks_and_routes_are_read_as_they_are_written() {
        for text in ["10.42.0.7/24", "0.0.0.0/0", "169.254.1.1/32"] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
            assert_eq!(text.parse::<RouteConfig>().unwrap().to_string(), text);
            let route = format!("{text}@10.42.0.1");
            assert_eq!(route.parse::<RouteConfig>().unwrap().to_string(), route);
        }
    }

    #[test]
    fn those_of_ipv6_are_too() {
        for text in ["fd00::7/64", "::/0", "fe80::1/128"] {
            assert_eq!(text.parse::<Network6>().unwrap().to_string(), text);
        }
        for text in ["fe80::1", "0a:58:0a:f4:00:01", "0a:58:0a:f4:00:01@fd00::1"] {
            assert_eq!(text.parse::<Gateway6>().unwrap().to_string(), text);
        }
        for text in ["fd00::7", "fd00::7/129", "10.0.0.1/24"] {
            let error = text.parse::<Network6>().unwrap_err().to_string();
            assert!(error.contains("like fd00::7/64"), "{error}");
        }
        for text in ["fd00::1", "10.0.0.1", "", "@fd00::1", "0a:58:0a:f4:00:01@"] {
            assert!(text.parse::<Gateway6>().is_err(), "{text}");
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        for text in [
            "",
            "10.42.0.7",
            "10.42.0.7/33",
            "10.42.0.7/+4",
            "10.42.0/24",
            "::1/64",
        ] {
            let error = text.parse::<Network>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
        for text in ["10.0.0.0/8@", "10.0.0.0/8@gate", "10.0.0.0@10.0.0.1"] {
            assert!(text.parse::<RouteConfig>().is_err(), "{text}");
        }
    }
}
