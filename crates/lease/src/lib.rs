//! Answers a guest's DHCP with the one address that it is meant to have.
//!
//! A guest whose interface is bridged to a network where the address is given by somebody else, as
//! a pod's is, learns it the way it learns any: it asks. Its question never gets to that network;
//! [`Responder::answer`] takes it out of the guest's frames, and the answer is the next frame the
//! guest receives. So there is no server, no socket and no state: the whole protocol is a function
//! of the frame and the [`Lease`].
//!
//! Implemented is a server for one client (RFC 2131, options of RFC 2132, 3397 and 3442). Leases
//! have no end, for there is nobody else to give the address to. Left out: relays, BOOTP without
//! DHCP's message type, options that the client puts into the name fields (nothing here depends on
//! them), and IPv6.

mod dhcp;
mod frame;
mod options;

use std::net::Ipv4Addr;

pub use frame::MAX_FRAME;

/// A MAC address.
pub type Mac = [u8; 6];

/// What a guest is told about its interface.
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

/// What is to be done with a frame of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is none of the responder's business: send it on.
    Pass,
    /// It was for the responder, which has nothing to say.
    Swallow,
    /// It was for the responder, and its answer has this many bytes.
    Answer(usize),
}

/// Bytes at the start of a frame that tell whether the responder wants it.
pub const HEAD: usize = 14 + 60 + 4;

/// Answers the questions of one interface.
#[derive(Debug, Clone)]
pub struct Responder {
    lease: Lease,
}

impl Responder {
    /// A responder that gives out `lease`.
    #[must_use]
    pub const fn new(lease: Lease) -> Self {
        Self { lease }
    }

    /// Whether a frame that starts with `head`, of which the first [`HEAD`] bytes suffice, may be
    /// for the responder.
    #[must_use]
    pub fn wants(head: &[u8]) -> bool {
        frame::is_question(head)
    }

    /// Takes an Ethernet frame of the guest and writes the answer, if there is one, to the front of
    /// `answer`, which needs [`MAX_FRAME`] bytes to hold any.
    ///
    /// The frame must be a copy that the guest can't change any more.
    #[must_use]
    pub fn answer(&self, frame: &[u8], answer: &mut [u8]) -> Verdict {
        if !Self::wants(frame) {
            return Verdict::Pass;
        }
        let reply = frame::question(frame, self.server())
            .map(|message| dhcp::reply(message, &self.lease, self.server()));
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

#[cfg(test)]
mod tests;
