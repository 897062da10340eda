//! An interface on a network of the node itself, `edgevmm.io/lan`: a macvlan above the node's
//! interface, made right in the pod's network namespace, where it is one more interface for the guest
//! to take the place of. It goes with the namespace.
//!
//! Whoever may make pods would reach any network of the node by it, so the node has to allow it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use edgevmm_net::interface_mtu;
use nix::net::if_::if_nametoindex;
use uuid::Uuid;

use super::facts::{self, Interface};
use super::link;
use super::netlink::Socket;

/// The node's interfaces that pods may be connected to, a name on each line.
const ALLOWED: &str = "/etc/edgevmm/lan";
/// Name of the interface in the pod.
pub const NAME: &str = "lan0";

/// Why a machine can't be connected to a network of the node.
#[derive(Debug, thiserror::Error)]
pub enum LanError {
    /// It may not.
    #[error(
        "Pods may not be connected to {0} of this node: the node allows it by a line `{0}` in \
         {ALLOWED}"
    )]
    Forbidden(String),
    /// The node has none of that name.
    #[error("This node has no interface {0} that is up: edgevmm.io/lan names one of the node's")]
    Missing(String),
    /// The kernel refuses.
    #[error(
        "Can't connect the pod to {0}: the kernel needs macvlan, and the interface must be up and in \
         no bridge (name the bridge instead)"
    )]
    Kernel(String, #[source] io::Error),
}

/// A network of the node.
#[derive(Debug)]
pub struct Lan {
    below: Interface,
    mtu: u16,
    mac: [u8; 6],
    /// To the kernel in the node's own namespace.
    kernel: Socket,
}

impl Lan {
    /// The network at the interface `name` of the namespace that the caller is in, the node's, where
    /// `who` has a MAC address of its own.
    ///
    /// # Errors
    ///
    /// When the node does not have or allow it.
    pub fn open(name: &str, who: &str) -> Result<Self, LanError> {
        if !is_allowed(name, &fs::read_to_string(ALLOWED).unwrap_or_default()) {
            return Err(LanError::Forbidden(name.to_owned()));
        }
        let failed = |error| LanError::Kernel(name.to_owned(), error);
        let interfaces = facts::interfaces().map_err(failed)?;
        let mut interfaces = interfaces.into_iter().filter(|other| other.up);
        let found = interfaces.find(|other| other.name == name);
        let below = found.ok_or_else(|| LanError::Missing(name.to_owned()))?;
        Ok(Self {
            mac: mac(who, below.mac),
            mtu: interface_mtu(name).map_err(failed)?,
            kernel: Socket::route().map_err(failed)?,
            below,
        })
    }

    /// Makes an interface on it in the namespace that the caller is in now, unless there is one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn join(&mut self) -> Result<(), LanError> {
        self.make()
            .map_err(|error| LanError::Kernel(self.below.name.clone(), error))
    }

    fn make(&mut self) -> io::Result<()> {
        if if_nametoindex(NAME).is_err() {
            let here = File::open("/proc/thread-self/ns/net")?;
            let make = link::add_macvlan(NAME, self.mac, self.below.index, here.as_fd());
            self.kernel.request(make)?;
        }
        // The guest is there, and not the pod's kernel beside it.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"), "1");
        let index = if_nametoindex(NAME)?;
        Socket::route()?.request(link::bring_up(index, self.mtu))
    }
}

fn is_allowed(name: &str, list: &str) -> bool {
    list.lines().any(|line| line.trim() == name)
}

/// The address that `who` always has above the interface with the address `below`: pods of the same
/// name on other nodes have others.
fn mac(who: &str, below: [u8; 6]) -> [u8; 6] {
    let key = [who.as_bytes(), &below].concat();
    let [a, b, c, d, e, ..] = *Uuid::new_v5(&Uuid::NAMESPACE_OID, &key).as_bytes();
    let local = 2;
    [local, a, b, c, d, e]
}

/// Whether a name can be an interface's.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'%' | b':');
    (1..16).contains(&name.len()) && name.bytes().all(plain) && !matches!(name, "." | "..")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_what_the_node_allows_is_opened() {
        assert!(is_allowed("eth1", "eth7\n eth1\n"));
        assert!(!is_allowed("eth1", "eth10\n#eth1\n") && !is_allowed("eth1", ""));
        assert!(matches!(
            Lan::open("no-such", "a"),
            Err(LanError::Forbidden(_))
        ));
    }

    #[test]
    fn addresses_stay_and_are_their_own() {
        assert_eq!(mac("a", [1; 6]), mac("a", [1; 6]));
        assert_ne!(mac("a", [1; 6]), mac("b", [1; 6]));
        assert_ne!(mac("a", [1; 6]), mac("a", [2; 6]));
        assert_eq!(mac("a", [1; 6])[0], 2);
    }

    #[test]
    fn names_are_short_and_plain() {
        assert!(is_name("eth1.20") && is_name("enp0s31f6"));
        for name in ["", "..", "a/b", "a b", "0123456789abcdef", "e%d"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
