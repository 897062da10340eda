//! A pod's network as its machine's.
//!
//! A CNI plugin leaves interfaces with addresses in the pod's network namespace. For each of them a
//! tap is made there, which the VMM opens, and the guest takes the interface's place:
//!
//! - `bridge`: every frame received by the interface is sent to the tap and the other way (tc), so
//!   the guest has the pod's MAC and IP addresses, which the VMM tells it. The pod's kernel
//!   sees none of these frames, so its addresses may stay where they are for others to see.
//! - `masquerade`: the guest is 10.0.2.2 behind the pod's address (nf_tables).
//!
//! What the guest sends as somebody else is lost (guard.rs).
//!
//! `lan` adds one of the node's networks to the pod's before. In both modes, connections of the pod to
//! its own loopback, by which `kubectl port-forward` comes, lead to the guest. All of it is in the
//! namespace and goes with it, but a container that starts again finds what the last one had, and
//! removes it. Nothing is done in the host's namespace.
//!
//! When a machine has ended the pod's kernel gets its interfaces back ([`tear_down`]).
//!
//! Left out: static neighbours, rules and further tables of routes; IPv6 routes but the default one and
//! that to the own network; the loopback of a pod without IPv4.

mod bridge;
mod facts;
mod guard;
mod lan;
mod link;
mod local;
mod masquerade;
mod neighbour;
mod netlink;
mod nft;
mod resolver;
mod traffic;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use edgevmm_config::NetConfig;
use edgevmm_net::{Tap, TapError, interface_mtu};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use facts::Interface;
use guard::Own;
pub use lan::is_name as is_interface;
use lan::{Lan, LanError};
use netlink::{Message, Socket};
pub use resolver::RESOLV_CONF;
use resolver::Resolver;

/// Rank of the filter that keeps a guest to its addresses: what it may not send is no exception either.
const GUARD: u16 = 1;
const WHAT_GUARDED: &str = "keep the guest to its addresses";
const NEEDS_GUARDED: &str = "the kernel needs sch_ingress and cls_bpf, or the pod the annotation \
     edgevmm.io/spoof: allow";
/// What names of our taps begin with; the interface's index follows.
const TAP: &str = "evm";
/// What the kernel calls a tap's driver.
const TAP_KIND: &str = "tun";

/// How a machine is connected to its pod's network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// The guest has the pod's addresses.
    #[default]
    Bridge,
    /// The guest is behind the pod's address.
    Masquerade,
    /// Not at all.
    None,
}

/// What a machine's network shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// How it is connected; where nothing was said, by `bridge`.
    pub mode: Option<Mode>,
    /// Whether it is in a pod, which expects a network.
    pub pod: bool,
    /// Interface of the node to whose network it is connected too, and who it is there.
    pub lan: Option<(String, String)>,
    /// Whether the guest may send as others.
    pub spoof: bool,
    /// The pod's resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// The guest's name.
    pub hostname: Option<String>,
}

/// Why a machine can't have its pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is none of its own.
    #[error(
        "A machine can't be in the host's network: leave hostNetwork out, or do without a network \
         by the annotation edgevmm.io/network: none"
    )]
    Host,
    /// It can't be in the node's.
    #[error(transparent)]
    Lan(#[from] LanError),
    /// The kernel does not tell what there is.
    #[error("Can't find out which interfaces the pod has")]
    Facts(#[source] io::Error),
    /// There can be no tap.
    #[error("Can't make a tap for {interface}")]
    Tap {
        /// Name of the pod's interface.
        interface: String,
        /// Why.
        source: TapError,
    },
    /// The kernel refuses.
    #[error("Can't {what} for {interface}: {needs}")]
    Kernel {
        /// What was asked for.
        what: &'static str,
        /// Name of the pod's interface.
        interface: String,
        /// What the kernel needs for it.
        needs: &'static str,
        /// What it says.
        source: io::Error,
    },
}

/// What is seen of the node's own network before a pod's is entered.
#[derive(Debug)]
pub struct Node {
    namespace: (u64, u64),
    lan: Option<Lan>,
}

impl Node {
    /// Looks around in the network namespace that the caller is in, the node's.
    ///
    /// # Errors
    ///
    /// When there is no /proc, or not the network that is wished for.
    pub fn look(wish: &Wish) -> Result<Self, NetworkError> {
        let namespace = namespace().map_err(NetworkError::Facts)?;
        let lan = wish.lan.as_ref().map(|(name, who)| Lan::open(name, who));
        let lan = lan.transpose()?;
        Ok(Self { namespace, lan })
    }
}

/// The network namespace that the caller is in, to be compared.
fn namespace() -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata("/proc/thread-self/ns/net")?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Connects a machine to the network namespace that the caller is in, which is the `node`'s or a
/// pod's. Returns the machine's interfaces.
///
/// # Errors
///
/// When it can't be done; what was done is found and removed by the next call.
pub fn set_up(wish: &Wish, node: Node) -> Result<Vec<NetConfig>, NetworkError> {
    let mode = wish.mode.unwrap_or_default();
    if mode == Mode::None && wish.lan.is_none() {
        return Ok(Vec::new());
    }
    if namespace().map_err(NetworkError::Facts)? == node.namespace {
        // Outside of pods it is what `ctr run` gives who did not ask for anything.
        if wish.pod || wish.mode.is_some() || wish.lan.is_some() {
            return Err(NetworkError::Host);
        }
        eprintln!("The container is in the host's network: its machine has none");
        return Ok(Vec::new());
    }
    if let Some(mut lan) = node.lan {
        lan.join()?;
    }
    let mut kernel = Socket::route().map_err(NetworkError::Facts)?;
    let mut interfaces = clear(&mut kernel).map_err(NetworkError::Facts)?;
    let wanted = |interface: &Interface| mode != Mode::None || interface.name == lan::NAME;
    interfaces.retain(|interface| interface.up && wanted(interface));
    if interfaces.is_empty() && wish.pod {
        eprintln!("The pod's network has no interfaces: its machine has none");
    }
    connect(wish, mode, &mut kernel, &interfaces)
}

/// Connects a machine to interfaces of its pod.
fn connect(
    wish: &Wish,
    mode: Mode,
    kernel: &mut Socket,
    interfaces: &[Interface],
) -> Result<Vec<NetConfig>, NetworkError> {
    let resolver = Resolver::read(wish.resolv_conf.as_deref(), wish.hostname.as_deref());
    let mut nets = Vec::new();
    for interface in interfaces {
        let mut place = Place::make(kernel, interface)?;
        // Names and what comes by the loopback are the first one's.
        let first = nets.is_empty();
        let resolver = if first {
            &resolver
        } else {
            &Resolver::default()
        };
        nets.push(match mode {
            Mode::Masquerade if first => masquerade::connect(&mut place, resolver, wish.spoof)?,
            _ => bridge::connect(&mut place, resolver, first, wish.spoof)?,
        });
    }
    Ok(nets)
}

/// Gives the kernel of a pod whose machine has ended its interfaces back, in the network namespace at
/// `path`: for the pod's other containers, and so that probes are refused rather than unanswered.
///
/// # Errors
///
/// When it can't be done; the next machine there does it then.
pub fn tear_down(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    // A thread that may enter another namespace and is of no more use then.
    let thread = thread::Builder::new().spawn(move || {
        let here = namespace()?;
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        if namespace()? == here {
            return Ok(());
        }
        clear(&mut Socket::route()?).map(drop)
    })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

/// Whether an interface can be a tap of ours, by its name.
fn has_our_name(interface: &Interface) -> bool {
    let rest = interface.name.strip_prefix(TAP).unwrap_or_default();
    !rest.is_empty() && rest.bytes().all(|digit| digit.is_ascii_digit())
}

/// Removes what an earlier machine had in the namespace that the caller is in, also of interfaces that
/// are down by now. Returns the interfaces that are not ours. Its taps are what it is known by, so they
/// are the last to go.
fn clear(kernel: &mut Socket) -> io::Result<Vec<Interface>> {
    let (mut old, mut interfaces) = (Vec::new(), Vec::new());
    for interface in facts::interfaces()? {
        let ours = has_our_name(&interface)
            && link::kind(kernel, interface.index)?.as_deref() == Some(TAP_KIND);
        let list = if ours { &mut old } else { &mut interfaces };
        list.push(interface);
    }
    if old.is_empty() {
        return Ok(interfaces);
    }
    // Without nf_tables there are no rules either.
    let _ = nft::remove();
    let filters = interfaces
        .iter()
        .map(|nic| traffic::delete_filters(nic.index));
    let delete = old.iter().map(|tap| link::delete(tap.index));
    for message in filters.chain(delete) {
        link::unless_gone(kernel, message)?;
    }
    Ok(interfaces)
}

/// An interface of the pod, and the tap that is made for it.
struct Place<'a> {
    kernel: &'a mut Socket,
    interface: &'a Interface,
    tap: String,
    tap_index: u32,
}

impl<'a> Place<'a> {
    /// Makes the tap, with the interface's MTU, and brings it up.
    fn make(kernel: &'a mut Socket, interface: &'a Interface) -> Result<Self, NetworkError> {
        let tap = format!("{TAP}{}", interface.index);
        Tap::make(&tap).map_err(|source| NetworkError::Tap {
            interface: interface.name.clone(),
            source,
        })?;
        let tap_index = if_nametoindex(tap.as_str());
        let tap_index = tap_index.map_err(|error| NetworkError::Facts(error.into()))?;
        let mut place = Self {
            kernel,
            interface,
            tap,
            tap_index,
        };
        // The guest is to hear its network only, not also the pod's kernel.
        place.set("ipv6", "disable_ipv6", "1");
        let mtu = interface_mtu(&interface.name).map_err(NetworkError::Facts)?;
        place.ask("bring up the tap", "", link::bring_up(tap_index, mtu))?;
        Ok(place)
    }

    /// Has the kernel lose what the guest sends and is not its own.
    fn guard(&mut self, own: &Own) -> Result<(), NetworkError> {
        let tap = self.tap_index;
        let program = traffic::add_program(tap, GUARD, &guard::program(own));
        for message in [traffic::add_filters(tap), program] {
            self.ask(WHAT_GUARDED, NEEDS_GUARDED, message)?;
        }
        Ok(())
    }

    /// Has the kernel do something.
    fn ask(
        &mut self,
        what: &'static str,
        needs: &'static str,
        message: Message,
    ) -> Result<(), NetworkError> {
        let asked = self.kernel.request(message);
        asked.map_err(|source| self.refused(what, needs, source))
    }

    fn refused(&self, what: &'static str, needs: &'static str, source: io::Error) -> NetworkError {
        NetworkError::Kernel {
            what,
            interface: self.interface.name.clone(),
            needs,
            source,
        }
    }

    /// Sets a switch of the tap's, if the kernel has it.
    fn set(&mut self, family: &str, switch: &str, value: &str) {
        let path = format!("/proc/sys/net/{family}/conf/{}/{switch}", self.tap);
        let _ = fs::write(path, value);
    }
}

#[cfg(test)]
mod frames;
#[cfg(test)]
mod tests;
