//! DHCP options: a code, a length and that many bytes each (RFC 2132).

use std::net::Ipv4Addr;

use crate::{Lease, Route};

pub(crate) const MASK: u8 = 1;
pub(crate) const ROUTER: u8 = 3;
pub(crate) const DNS: u8 = 6;
pub(crate) const HOSTNAME: u8 = 12;
pub(crate) const DOMAIN: u8 = 15;
pub(crate) const MTU: u8 = 26;
pub(crate) const REQUESTED: u8 = 50;
pub(crate) const LEASE_TIME: u8 = 51;
pub(crate) const TYPE: u8 = 53;
pub(crate) const SERVER: u8 = 54;
pub(crate) const LONGEST: u8 = 57;
pub(crate) const SEARCH: u8 = 119;
pub(crate) const ROUTES: u8 = 121;
const PAD: u8 = 0;
const END: u8 = 255;

/// The first option `code` in the options of a message. Repeated ones are not put together: none
/// that is looked for is long.
pub(crate) fn find(mut options: &[u8], code: u8) -> Option<&[u8]> {
    loop {
        let (&found, rest) = options.split_first()?;
        match found {
            PAD => options = rest,
            END => return None,
            _ => {
                let (&len, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(len.into())?;
                if found == code {
                    return Some(value);
                }
                options = rest;
            }
        }
    }
}

/// Options being written, within a limit.
#[derive(Debug)]
pub(crate) struct Options {
    bytes: Vec<u8>,
    limit: usize,
}

impl Options {
    /// Options of `limit` bytes at most, with the one that ends them.
    pub(crate) const fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    /// Adds an option unless there is no room for it, so the most important come first.
    pub(crate) fn add(&mut self, code: u8, value: &[u8]) {
        let Ok(len) = u8::try_from(value.len()) else {
            return;
        };
        if len > 0 && self.bytes.len() + value.len() + 2 < self.limit {
            self.bytes.extend([code, len]);
            self.bytes.extend(value);
        }
    }

    /// What the guest needs to know of its network, the most important first.
    pub(crate) fn describe(&mut self, lease: &Lease) {
        self.add(MASK, &mask(lease.prefix).octets());
        if has_routes(lease) {
            // Who heeds it heeds no other route.
            self.add(ROUTES, &routes(lease));
        }
        if let Some(gateway) = lease.gateway {
            self.add(ROUTER, &gateway.octets());
        }
        let dns: Vec<u8> = lease.dns.iter().flat_map(Ipv4Addr::octets).collect();
        self.add(DNS, &dns);
        if let Some(mtu) = lease.mtu {
            self.add(MTU, &mtu.to_be_bytes());
        }
        if let Some(hostname) = &lease.hostname {
            self.add(HOSTNAME, hostname.as_bytes());
        }
        if let Some(domain) = lease.search.first() {
            self.add(DOMAIN, domain.trim_end_matches('.').as_bytes());
        }
        self.add(SEARCH, &search(&lease.search));
    }

    /// All of them, ended.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes.push(END);
        self.bytes
    }
}

/// The mask of a network of `prefix` bits.
fn mask(prefix: u8) -> Ipv4Addr {
    let host = u32::BITS.saturating_sub(prefix.into());
    u32::MAX.checked_shl(host).unwrap_or(0).into()
}

/// Whether the plain router option would not do.
fn has_routes(lease: &Lease) -> bool {
    let own = mask(lease.prefix).to_bits();
    let outside = |gateway: Ipv4Addr| (gateway.to_bits() ^ lease.address.to_bits()) & own != 0;
    !lease.routes.is_empty() || lease.gateway.is_some_and(outside)
}

/// Classless routes (RFC 3442), those that the default one needs before it.
fn routes(lease: &Lease) -> Vec<u8> {
    let mut bytes = Vec::new();
    let own = mask(lease.prefix).to_bits();
    if let Some(gateway) = lease.gateway {
        let known = lease.routes.iter().any(|route| {
            let mask = mask(route.prefix).to_bits();
            route.gateway.is_none() && (route.network.to_bits() ^ gateway.to_bits()) & mask == 0
        });
        if (gateway.to_bits() ^ lease.address.to_bits()) & own != 0 && !known {
            push_route(&mut bytes, gateway, 32, None);
        }
    }
    for Route {
        network,
        prefix,
        gateway,
    } in &lease.routes
    {
        push_route(&mut bytes, *network, *prefix, *gateway);
    }
    if lease.gateway.is_some() {
        push_route(&mut bytes, Ipv4Addr::UNSPECIFIED, 0, lease.gateway);
    }
    bytes
}

fn push_route(bytes: &mut Vec<u8>, network: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) {
    let prefix = prefix.min(32);
    let significant = usize::from(prefix.div_ceil(8));
    bytes.push(prefix);
    bytes.extend(network.octets().into_iter().take(significant));
    bytes.extend(gateway.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
}

/// Domains as DNS writes them, without compression (RFC 3397); those that are no domain and those
/// beyond 255 bytes are left out.
pub(crate) fn search(domains: &[String]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for domain in domains {
        let mut name = Vec::new();
        let labels = domain.trim_end_matches('.').split('.');
        let sound = labels.into_iter().all(|label| {
            let len = u8::try_from(label.len())
                .ok()
                .filter(|len| (1..64).contains(len));
            name.extend(len);
            name.extend(label.as_bytes());
            len.is_some()
        });
        name.push(0);
        if sound && bytes.len() + name.len() <= 255 {
            bytes.extend(name);
        }
    }
    bytes
}
