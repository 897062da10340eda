//! Answers a guest's DHCP, and its search for IPv6 routers, with the one address of each kind that it is
//! meant to have.
//!
//! A guest whose interface is bridged to a network where the address is given by somebody else, as
//! a pod's is, learns it the way it learns any: it asks. Its question never gets to that network;
//! [`Responder::answer`] takes it out of the guest's frames, and the answer is the next frame the
//! guest receives. So there is no server, no socket and no state: the whole protocol is a function
//! of the frame and the leases.
//!
//! Implemented is a server for one client (RFC 2131, options of RFC 2132, 3397 and 3442). Leases
//! have no end, for there is nobody else to give the address to. Left out: relays, BOOTP without
//! DHCP's message type, and options that the client puts into the name fields (nothing here depends on
//! them).
//!
//! IPv6 is the same with DHCPv6 (dhcp6.rs) for the address and router advertisements (nd.rs) for the
//! rest. A router has to be known by an address of the link, which a pod's gateway need not be known
//! by: then the responder lends it its own, and answers for it with the gateway's MAC address.

mod dhcp;
mod dhcp6;
mod frame;
mod frame6;
mod nd;
mod options;

use std::net::{Ipv4Addr, Ipv6Addr};

pub use frame::MAX_FRAME;
use frame6::{Envelope, Question};

/// A MAC address.
pub type Mac = [u8; 6];

/// What a guest is told about its interface's IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The interface's address; questions from others stay unanswered.
    pub mac: Mac,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of its network, up to 32.
    pub prefix: u8,
    /// Where it sends what belongs elsewhere. It may lie outside of the guest's network.
    pub gateway: Option<Ipv4Addr>,
    /// Further routes.
    pub routes: Vec<Route>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Domains to look names up in, the first of them the guest's own.
    pub search: Vec<String>,
    /// The guest's name, without a domain.
    pub hostname: Option<String>,
    /// Bytes of the longest packet.
    pub mtu: Option<u16>,
}

/// A route besides the one to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// First address of the network.
    pub network: Ipv4Addr,
    /// Its bits, up to 32.
    pub prefix: u8,
    /// Where packets for it go; straight to the receiver if absent.
    pub gateway: Option<Ipv4Addr>,
}

/// What a guest is told about its interface's IPv6.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease6 {
    /// The interface's address; questions from others pass.
    pub mac: Mac,
    /// The guest's address.
    pub address: Ipv6Addr,
    /// Bits of the network on the link, up to 128, which stands for none.
    pub prefix: u8,
    /// Where it sends what belongs elsewhere.
    pub router: Option<Router>,
    /// Name servers.
    pub dns: Vec<Ipv6Addr>,
    /// Domains to look names up in.
    pub search: Vec<String>,
    /// Bytes of the longest packet.
    pub mtu: Option<u16>,
}

/// A router, which a guest knows by an address of the link only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Router {
    /// It has this one, and answers for itself.
    Present(Ipv6Addr),
    /// It is known by its MAC address only, and the responder answers for it.
    Absent {
        /// The MAC address.
        mac: Mac,
        /// Its address, by which the network is asked whether the MAC address still holds; nobody is
        /// asked when absent.
        address: Option<Ipv6Addr>,
    },
}

/// What is to be done with a frame of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is none of the responder's business: send it on.
    Pass,
    /// It was for the responder, which has nothing to say.
    Swallow,
    /// It was for the responder, and its answer has this many bytes.
    Answer(usize),
    /// As [`Verdict::Answer`], and after it an [`advertisement`](Responder::advertise) is due.
    AnswerAndAdvertise(usize),
    /// As [`Verdict::Answer`], and the network is to be [asked](Responder::look_for_router) for the
    /// router.
    AnswerAndLook(usize),
}

/// What a frame of the network says of the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// What was known.
    Same,
    /// Another MAC address: an [`advertisement`](Responder::advertise) is due.
    Changed,
}

/// Bytes at the start of a frame that tell whether the responder wants it: up to a port behind the
/// longest header of IPv4, and up to the end of the address that a neighbour is asked for.
pub const HEAD: usize = 14 + 64;

/// Bytes at the start of a frame of the network that tell what it says of the router.
pub const ROUTER_HEAD: usize = nd::ANSWER;

/// Answers the questions of one interface.
#[derive(Debug, Clone)]
pub struct Responder {
    lease: Option<Lease>,
    lease6: Option<Lease6>,
}

impl Responder {
    /// A responder that gives out these leases; without one, its questions pass.
    #[must_use]
    pub const fn new(lease: Option<Lease>, lease6: Option<Lease6>) -> Self {
        Self { lease, lease6 }
    }

    /// Whether a frame that starts with `head`, of which the first [`HEAD`] bytes suffice, may be
    /// for the responder.
    #[must_use]
    pub fn wants(head: &[u8]) -> bool {
        frame::is_question(head) || frame6::is_question(head)
    }

    /// Takes an Ethernet frame of the guest and writes the answer, if there is one, to the front of
    /// `answer`, which needs [`MAX_FRAME`] bytes to hold any.
    ///
    /// The frame must be a copy that the guest can't change any more.
    #[must_use]
    pub fn answer(&self, frame: &[u8], answer: &mut [u8]) -> Verdict {
        if let Some(lease) = self.lease.as_ref().filter(|_| frame::is_question(frame)) {
            return self.answer4(lease, frame, answer);
        }
        match (&self.lease6, frame6::question(frame)) {
            (Some(lease), Some((mac, from, question))) if mac == lease.mac => {
                answer6(lease, from, question, answer)
            }
            _ => Verdict::Pass,
        }
    }

    /// Writes what a router says of itself unasked to the front of `frame`, as [`Responder::answer`]
    /// does. Returns its length if there is anything to say.
    #[must_use]
    pub fn advertise(&self, frame: &mut [u8]) -> Option<usize> {
        nd::advertise(self.lease6.as_ref()?, frame)
    }

    /// Writes a question of the guest's to the network, which MAC address its router has, to the front of
    /// `frame`. Returns its length if the router can be asked for.
    #[must_use]
    pub fn look_for_router(&self, frame: &mut [u8]) -> Option<usize> {
        nd::look(self.lease6.as_ref()?, frame)
    }

    /// Takes note of what a frame of the network says of the router, of which the first
    /// [`ROUTER_HEAD`] bytes suffice.
    pub fn hear(&mut self, head: &[u8]) -> Heard {
        let lease = self.lease6.as_mut();
        lease.map_or(Heard::Nothing, |lease| nd::hear(lease, head))
    }

    fn answer4(&self, lease: &Lease, frame: &[u8], answer: &mut [u8]) -> Verdict {
        let reply = frame::question(frame, self.server())
            .map(|message| dhcp::reply(message, lease, self.server()));
        match reply {
            // Somebody else's server, by its address: a lease of another network.
            None => Verdict::Pass,
            Some(None) => Verdict::Swallow,
            Some(Some(reply)) => {
                frame::wrap(&reply, self.server(), answer).map_or(Verdict::Swallow, Verdict::Answer)
            }
        }
    }

    /// The address that the server goes by. It is nobody's on the guest's network, so that what is
    /// sent to it reaches nobody but the responder.
    const fn server(&self) -> Ipv4Addr {
        Ipv4Addr::new(169, 254, 101, 118)
    }
}

fn answer6(lease: &Lease6, from: Ipv6Addr, question: Question<'_>, answer: &mut [u8]) -> Verdict {
    let answered = match question {
        Question::Routers => nd::advertise(lease, answer),
        Question::Own => {
            // The guest asks again while it sends, so a router that changed is noticed in time.
            let answered = nd::answer(lease, lease.mac, from, answer);
            return answered.map_or(
                Verdict::Swallow,
                match nd::address(lease) {
                    Some(_) => Verdict::AnswerAndLook,
                    None => Verdict::Answer,
                },
            );
        }
        Question::Dhcp(message) => {
            let Some((reply, again)) = dhcp6::reply(message, lease) else {
                return Verdict::Swallow;
            };
            let (mac, to) = (lease.mac, from);
            let from = frame6::OWN;
            let len = Envelope { mac, to, from }.wrap_dhcp(&reply, answer);
            if let Some(len) = len.filter(|_| again) {
                return Verdict::AnswerAndAdvertise(len);
            }
            len
        }
    };
    answered.map_or(Verdict::Swallow, Verdict::Answer)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests6;
