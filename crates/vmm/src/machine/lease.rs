//! A tap whose guest learns its address from us (edgevmm-lease).

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use edgevmm_config::{Gateway6, LeaseConfig, MacAddr};
use edgevmm_devices::virtio::net::{GuestOffloads, NetBackend};
use edgevmm_lease::{HEAD, Lease, Lease6, MAX_FRAME, Responder, Route, Router, Verdict};
use edgevmm_net::VNET_HEADER;
use vm_memory::VolatileSlice;

use super::network::TapBackend;

/// What answers an interface with the address `mac` whose packets have up to `mtu` bytes.
pub(super) fn responder(config: &LeaseConfig, mac: MacAddr, mtu: u16) -> Responder {
    let routes = config.routes.iter().map(|route| Route {
        network: route.network.address,
        prefix: route.network.prefix,
        gateway: route.gateway,
    });
    let lease = config.address.map(|own| Lease {
        mac: mac.0,
        address: own.address,
        prefix: own.prefix,
        gateway: config.gateway,
        routes: routes.collect(),
        dns: servers(config, |server| match server {
            IpAddr::V4(server) => Some(server),
            IpAddr::V6(_) => None,
        }),
        search: config.search.clone(),
        hostname: config.hostname.clone(),
        mtu: Some(mtu),
    });
    let lease6 = config.address6.map(|own| Lease6 {
        mac: mac.0,
        address: own.address,
        prefix: own.prefix,
        router: config.gateway6.map(|gateway| match gateway {
            Gateway6::Link(address) => Router::Present(address),
            Gateway6::Mac(mac) => Router::Absent(mac.0),
        }),
        dns: servers(config, |server| match server {
            IpAddr::V4(_) => None,
            IpAddr::V6(server) => Some(server),
        }),
        search: config.search.clone(),
        mtu: Some(mtu),
    });
    Responder::new(lease, lease6)
}

/// The name servers of a kind.
fn servers<A>(config: &LeaseConfig, kind: impl Fn(IpAddr) -> Option<A>) -> Vec<A> {
    config.dns.iter().copied().filter_map(kind).collect()
}

/// A tap, before which a responder takes its questions out of what the guest sends.
#[derive(Debug)]
pub(super) struct LeasedTap {
    tap: TapBackend,
    responder: Responder,
    /// Where a question, as long as an answer at most, is copied to, so that the guest can't change
    /// it any more.
    question: Box<[u8]>,
    /// The newest answer, behind a header that asks for nothing.
    answer: Box<[u8]>,
    /// Its bytes with the header, until the guest has got it.
    answer_len: Option<usize>,
    /// Whether the guest is to hear of its router after that.
    advertise: bool,
}

impl LeasedTap {
    pub(super) fn new(tap: TapBackend, responder: Responder) -> Self {
        Self {
            tap,
            responder,
            question: vec![0; MAX_FRAME].into(),
            answer: vec![0; VNET_HEADER + MAX_FRAME].into(),
            answer_len: None,
            advertise: false,
        }
    }

    /// Whether the frame in `parts` was for the responder, which keeps its answer.
    fn takes(&mut self, parts: &[VolatileSlice<'_>]) -> bool {
        let mut head = [0; HEAD];
        let len = copy(parts, VNET_HEADER, &mut head);
        if !head.get(..len).is_some_and(Responder::wants) {
            return false;
        }
        let len = copy(parts, VNET_HEADER, &mut self.question);
        let question = self.question.get(..len).unwrap_or_default();
        let room = self.answer.get_mut(VNET_HEADER..).unwrap_or_default();
        match self.responder.answer(question, room) {
            Verdict::Pass => false,
            Verdict::Swallow => true,
            Verdict::Answer(len) => {
                self.answer_len = Some(VNET_HEADER + len);
                true
            }
            Verdict::AnswerAndAdvertise(len) => {
                self.answer_len = Some(VNET_HEADER + len);
                self.advertise = true;
                true
            }
        }
    }

    /// Length of the next frame of its own, with the header.
    fn take_own(&mut self) -> Option<usize> {
        if let Some(len) = self.answer_len.take() {
            return Some(len);
        }
        if !std::mem::take(&mut self.advertise) {
            return None;
        }
        let room = self.answer.get_mut(VNET_HEADER..).unwrap_or_default();
        Some(VNET_HEADER + self.responder.advertise(room)?)
    }
}

/// Copies what `parts` have after their first `skip` bytes, as far as there is room. Returns how
/// much that is.
fn copy(parts: &[VolatileSlice<'_>], mut skip: usize, room: &mut [u8]) -> usize {
    let mut done = 0;
    for part in parts {
        let before = skip.min(part.len());
        skip -= before;
        let Some(room) = room.get_mut(done..).filter(|room| !room.is_empty()) else {
            break;
        };
        if let Ok(part) = part.offset(before) {
            done += part.copy_to(room);
        }
    }
    done
}

impl NetBackend for LeasedTap {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.tap.poll_fd()
    }

    fn vnet_header(&self) -> bool {
        true
    }

    fn set_offloads(&mut self, offloads: GuestOffloads) -> io::Result<()> {
        self.tap.set_offloads(offloads)
    }

    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        let Some(len) = self.take_own() else {
            return self.tap.recv(parts);
        };
        let mut rest = self.answer.get(..len).unwrap_or_default();
        for part in parts {
            part.copy_from(rest);
            rest = rest.get(part.len()..).unwrap_or_default();
        }
        Ok(Some(len))
    }

    fn has_own_frame(&self) -> bool {
        self.answer_len.is_some() || self.advertise
    }

    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        if self.takes(parts) {
            return Ok(true);
        }
        self.tap.send(parts)
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.tap.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_copied_behind_the_header() {
        let (mut one, mut two, mut three) = ([1, 2], [3, 4, 5], [6, 7, 8, 9]);
        let parts = [
            VolatileSlice::from(&mut one[..]),
            VolatileSlice::from(&mut two[..]),
            VolatileSlice::from(&mut three[..]),
        ];
        for (skip, room, copied) in [
            (0, 20, &[1, 2, 3, 4, 5, 6, 7, 8, 9][..]),
            (3, 4, &[4, 5, 6, 7]),
            (5, 20, &[6, 7, 8, 9]),
            (2, 0, &[]),
            (12, 5, &[]),
        ] {
            let mut buffer = vec![0; room];
            let len = copy(&parts, skip, &mut buffer);
            assert_eq!(buffer.get(..len), Some(copied), "{skip}, {room}");
        }
    }
}
