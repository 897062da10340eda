//! Network interfaces.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::MacAddr;
use crate::lease::{Gateway6, LeaseConfig, Network, Network6, RouteConfig};

/// A network interface.
///
/// Files and flags write it flat: `type: user`, or `tap: NAME` which implies its type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "FlatNet", into = "FlatNet")]
pub struct NetConfig {
    /// Its host end.
    pub backend: NetBackendConfig,
    /// MAC address; derived from the machine's UUID when absent.
    pub mac: Option<MacAddr>,
    /// Place in the firmware's boot order, lowest first. When absent it is not booted from.
    pub bootindex: Option<u32>,
}

/// Host end of a network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetBackendConfig {
    /// A tap device of the host.
    Tap {
        /// Interface name.
        tap: String,
        /// What the guest is told of its addresses. If absent its questions go to the tap's network.
        lease: Option<Box<LeaseConfig>>,
    },
    /// A network of its own behind the host's sockets, without privileges.
    User {
        /// Host ports that lead to the guest.
        forwards: Vec<PortForward>,
        /// The guest reaches the host's loopback services by its gateway's address.
        host_loopback: bool,
    },
}

impl NetConfig {
    /// A user network without port forwards.
    #[must_use]
    pub const fn user() -> Self {
        let backend = NetBackendConfig::User {
            forwards: Vec::new(),
            host_loopback: false,
        };
        Self {
            backend,
            mac: None,
            bootindex: None,
        }
    }
}

/// Why an interface's keys don't fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetConfigError {
    /// Neither `type` nor `tap` is there.
    #[error("a network interface needs `type` (user, tap): write type=user or tap=NAME")]
    NoType,
    /// Something to tell a guest, but not its address.
    #[error("`{0}` is told together with an address: add {1}")]
    NoAddress(&'static str, &'static str),
    /// A tap interface lacks its name.
    #[error("a tap interface needs the name of its device: write tap=NAME")]
    NoTap,
    /// The key belongs to the other type.
    #[error("`{key}` does not belong to a network interface of type {kind}: leave it out")]
    ForeignKey {
        /// The key.
        key: &'static str,
        /// The interface's type.
        kind: &'static str,
    },
}

/// The written form of a [`NetConfig`]. Kept flat because serde can't refuse unknown keys in
/// flattened enums.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FlatNet {
    #[serde(rename = "type")]
    kind: Option<NetKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    forwards: Vec<PortForward>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    host_loopback: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootindex: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<Network>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    routes: Vec<RouteConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address6: Option<Network6>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway6: Option<Gateway6>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dns: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    search: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hostname: Option<String>,
}

impl FlatNet {
    /// The keys that tell a guest something and are given, with whether they need an IPv4 address, or
    /// one of IPv6.
    fn told(&self) -> impl Iterator<Item = (&'static str, Option<bool>)> {
        [
            ("address", None, self.address.is_some()),
            ("address6", None, self.address6.is_some()),
            ("gateway", Some(false), self.gateway.is_some()),
            ("routes", Some(false), !self.routes.is_empty()),
            ("gateway6", Some(true), self.gateway6.is_some()),
            ("dns", None, !self.dns.is_empty()),
            ("search", None, !self.search.is_empty()),
            ("hostname", None, self.hostname.is_some()),
        ]
        .into_iter()
        .filter_map(|(key, needs, given)| given.then_some((key, needs)))
    }

    /// What the guest is told, if anything.
    fn lease(self) -> Result<Option<Box<LeaseConfig>>, NetConfigError> {
        let (has4, has6) = (self.address.is_some(), self.address6.is_some());
        let lacking = self.told().find(|(_, needs)| match needs {
            Some(false) => !has4,
            Some(true) => !has6,
            None => !has4 && !has6,
        });
        if let Some((key, needs)) = lacking {
            let example = match needs {
                Some(true) => "address6=fd00::7/64",
                _ => "address=10.42.0.7/24",
            };
            return Err(NetConfigError::NoAddress(key, example));
        }
        Ok((has4 || has6).then(|| {
            Box::new(LeaseConfig {
                address: self.address,
                gateway: self.gateway,
                routes: self.routes,
                address6: self.address6,
                gateway6: self.gateway6,
                dns: self.dns,
                search: self.search,
                hostname: self.hostname,
            })
        }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NetKind {
    Tap,
    User,
}

impl TryFrom<FlatNet> for NetConfig {
    type Error = NetConfigError;

    fn try_from(mut flat: FlatNet) -> Result<Self, Self::Error> {
        let (mac, bootindex) = (flat.mac, flat.bootindex);
        let told = flat.told().next();
        let implied = flat.tap.as_ref().map(|_| NetKind::Tap);
        let foreign = |key, kind| Err(NetConfigError::ForeignKey { key, kind });
        let backend = match flat.kind.or(implied).ok_or(NetConfigError::NoType)? {
            NetKind::Tap if !flat.forwards.is_empty() => return foreign("forwards", "tap"),
            NetKind::Tap if flat.host_loopback => return foreign("host_loopback", "tap"),
            NetKind::Tap => {
                let tap = flat.tap.take().ok_or(NetConfigError::NoTap)?;
                let lease = flat.lease()?;
                NetBackendConfig::Tap { tap, lease }
            }
            NetKind::User if flat.tap.is_some() => return foreign("tap", "user"),
            NetKind::User => match told {
                Some((key, _)) => return foreign(key, "user"),
                None => NetBackendConfig::User {
                    forwards: flat.forwards,
                    host_loopback: flat.host_loopback,
                },
            },
        };
        Ok(Self {
            backend,
            mac,
            bootindex,
        })
    }
}

impl From<NetConfig> for FlatNet {
    fn from(net: NetConfig) -> Self {
        let flat = Self {
            mac: net.mac,
            bootindex: net.bootindex,
            ..Self::default()
        };
        match net.backend {
            NetBackendConfig::Tap { tap, lease } => {
                let flat = Self {
                    kind: Some(NetKind::Tap),
                    tap: Some(tap),
                    ..flat
                };
                match lease {
                    None => flat,
                    Some(lease) => Self {
                        address: lease.address,
                        gateway: lease.gateway,
                        routes: lease.routes,
                        address6: lease.address6,
                        gateway6: lease.gateway6,
                        dns: lease.dns,
                        search: lease.search,
                        hostname: lease.hostname,
                        ..flat
                    },
                }
            }
            NetBackendConfig::User {
                forwards,
                host_loopback,
            } => Self {
                kind: Some(NetKind::User),
                forwards,
                host_loopback,
                ..flat
            },
        }
    }
}

/// A host port that leads to the guest, written `[tcp|udp:][ADDRESS:]HOST:GUEST`.
///
/// An IPv6 address stands in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForward {
    /// Host address to listen at; all when absent.
    pub address: Option<IpAddr>,
    /// Host port.
    pub host: u16,
    /// Guest port.
    pub guest: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// Transport of a port forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// Why a text isn't a port forward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortForwardError {
    /// Parts are missing or too many.
    #[error("`{0}` is not a port forward: write [tcp|udp:][ADDRESS:]HOST:GUEST, like 2222:22")]
    Syntax(String),
    /// A port isn't one.
    #[error("`{port}` in port forward `{text}` is not a port: write a number from 1 to 65535")]
    Port {
        /// The port as written.
        port: String,
        /// The whole text.
        text: String,
    },
    /// The address isn't one.
    #[error("`{address}` in port forward `{text}` is not an IP address: write 127.0.0.1 or [::1]")]
    Address {
        /// The address as written.
        address: String,
        /// The whole text.
        text: String,
    },
}

impl FromStr for PortForward {
    type Err = PortForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || PortForwardError::Syntax(text.to_owned());
        let (protocol, rest) = if let Some(rest) = text.strip_prefix("udp:") {
            (Protocol::Udp, rest)
        } else {
            (Protocol::Tcp, text.strip_prefix("tcp:").unwrap_or(text))
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(syntax)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => (Some(parse_address(address, text)?), host),
            None => (None, rest),
        };
        let host = parse_port(host, text)?;
        Ok(Self {
            address,
            host,
            guest: parse_port(guest, text)?,
            protocol,
        })
    }
}

fn parse_port(port: &str, text: &str) -> Result<u16, PortForwardError> {
    let digits = port.bytes().all(|digit| digit.is_ascii_digit());
    port.parse()
        .ok()
        .filter(|number| digits && *number != 0)
        .ok_or_else(|| PortForwardError::Port {
            port: port.to_owned(),
            text: text.to_owned(),
        })
}

fn parse_address(address: &str, text: &str) -> Result<IpAddr, PortForwardError> {
    let bracketed = address
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    match bracketed {
        Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => address.parse().ok().map(IpAddr::V4),
    }
    .ok_or_else(|| PortForwardError::Address {
        address: address.to_owned(),
        text: text.to_owned(),
    })
}

impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.protocol == Protocol::Udp {
            f.write_str("udp:")?;
        }
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

impl Serialize for PortForward {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortForward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(ForwardVisitor)
    }
}

/// Takes texts.
struct ForwardVisitor;

impl de::Visitor<'_> for ForwardVisitor {
    type Value = PortForward;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port forward like 2222:22")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<PortForward, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn forward(address: Option<&str>, protocol: Protocol) -> PortForward {
        let address = address.map(|address| address.parse().unwrap());
        PortForward {
            address,
            host: 2222,
            guest: 22,
            protocol,
        }
    }

    #[test]
    fn forwards_parse() {
        for (text, expected) in [
            ("2222:22", forward(None, Protocol::Tcp)),
            ("tcp:2222:22", forward(None, Protocol::Tcp)),
            ("udp:2222:22", forward(None, Protocol::Udp)),
            (
                "127.0.0.1:2222:22",
                forward(Some("127.0.0.1"), Protocol::Tcp),
            ),
            ("udp:[::1]:2222:22", forward(Some("::1"), Protocol::Udp)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn broken_forwards_say_which_part() {
        for (text, expected) in [
            ("22", "is not a port forward"),
            ("", "is not a port forward"),
            ("0:22", "`0` in port forward"),
            ("2222:+22", "`+22` in port forward"),
            ("2222:65536", "`65536` in port forward"),
            ("localhost:2222:22", "`localhost` in port forward"),
            ("::1:2222:22", "`::1` in port forward"),
            ("sctp:2222:22", "`sctp` in port forward"),
        ] {
            let error = text.parse::<PortForward>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn json_is_flat_and_strict() {
        let net: NetConfig = serde_json::from_str(r#"{"tap":"tap0"}"#).unwrap();
        let (tap, lease) = ("tap0".into(), None);
        assert_eq!(net.backend, NetBackendConfig::Tap { tap, lease });
        let text = serde_json::to_string(&net).unwrap();
        assert_eq!(text, r#"{"type":"tap","tap":"tap0"}"#);
        assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), net);

        let net: NetConfig =
            serde_json::from_str(r#"{"type":"user","forwards":["2222:22"]}"#).unwrap();
        let forwards = vec![forward(None, Protocol::Tcp)];
        assert_eq!(
            net.backend,
            NetBackendConfig::User {
                forwards,
                host_loopback: false
            }
        );

        for text in [
            r#"{}"#,
            r#"{"type":"tap"}"#,
            r#"{"type":"user","tap":"tap0"}"#,
            r#"{"tap":"tap0","forwards":["2222:22"]}"#,
            r#"{"tap":"tap0","host_loopback":true}"#,
            r#"{"tap":"tap0","gateway":"10.42.0.1"}"#,
            r#"{"tap":"tap0","address6":"fd00::7/64","gateway":"10.42.0.1"}"#,
            r#"{"tap":"tap0","address":"10.42.0.7/24","gateway6":"fe80::1"}"#,
            r#"{"tap":"tap0","address6":"fd00::7/64","gateway6":"fd00::1"}"#,
            r#"{"tap":"tap0","address":"10.42.0.7"}"#,
            r#"{"type":"user","address":"10.42.0.7/24"}"#,
            r#"{"type":"user","speed":1}"#,
            r#"{"type":"bridge"}"#,
        ] {
            assert!(serde_json::from_str::<NetConfig>(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn display_parses_to_the_same(
            address: Option<IpAddr>, host in 1u16.., guest in 1u16.., udp: bool,
        ) {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let forward = PortForward { address, host, guest, protocol };
            prop_assert_eq!(forward.to_string().parse(), Ok(forward));
        }

        #[test]
        fn no_text_panics(text in "[a-z0-9:.\\[\\]\u{e9}]*") {
            let _ = text.parse::<PortForward>();
        }
    }
}
