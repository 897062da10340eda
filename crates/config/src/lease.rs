//! The address that a guest gets on a tap, when it asks.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What a guest's DHCP client is told on an interface whose network has no DHCP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Its address and network.
    pub address: Network,
    /// Where it sends what belongs elsewhere.
    pub gateway: Option<Ipv4Addr>,
    /// Further routes.
    pub routes: Vec<RouteConfig>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Domains to look names up in.
    pub search: Vec<String>,
    /// The guest's name.
    pub hostname: Option<String>,
}

/// An address with the bits of its network, written `10.42.0.7/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of the network, up to 32.
    pub prefix: u8,
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
    #[error("`{0}` is not an address with the bits of its network: write it like 10.42.0.7/24")]
    Network(String),
    /// A route's gateway.
    #[error("`{0}` is not a route: write NETWORK/BITS@GATEWAY, like 10.42.0.0/16@10.42.0.1")]
    Route(String),
}

impl FromStr for Network {
    type Err = NetworkTextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('/').and_then(|(address, prefix)| {
            let plain = prefix.bytes().all(|digit| digit.is_ascii_digit());
            let prefix = prefix
                .parse()
                .ok()
                .filter(|prefix| plain && *prefix <= 32)?;
            Some((address.parse().ok()?, prefix))
        });
        match parts {
            Some((address, prefix)) => Ok(Self { address, prefix }),
            None => Err(NetworkTextError::Network(text.to_owned())),
        }
    }
}

impl fmt::Display for Network {
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

as_text!(Network, RouteConfig);

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
