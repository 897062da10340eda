//! A tap whose guest learns its address from us (edgevmm-lease).

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use edgevmm_config::{Gateway6, LeaseConfig, MacAddr};
use edgevmm_devices::virtio::net::{GuestOffloads, NetBackend};
use edgevmm_lease::{
    HEAD, Heard, Lease, Lease6, MAX_FRAME, ROUTER_HEAD, Responder, Route, Router, Verdict,
};
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
            Gateway6::Mac(mac, address) => Router::Absent {
                mac: mac.0,
                address,
            },
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
pub(super) struct LeasedTap<B = TapBackend> {
    tap: B,
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
    /// Whether the network was asked for the router, whose answer is watched for.
    looks: bool,
}

impl<B: NetBackend> LeasedTap<B> {
    pub(super) fn new(tap: B, responder: Responder) -> Self {
        Self {
            tap,
            responder,
            question: vec![0; MAX_FRAME].into(),
            answer: vec![0; VNET_HEADER + MAX_FRAME].into(),
            answer_len: None,
            advertise: false,
            looks: false,
        }
    }

    /// Whether the frame in `parts` was for the responder, which keeps its answer.
    fn takes(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        let mut head = [0; HEAD];
        let len = copy(parts, VNET_HEADER, &mut head);
        if !head.get(..len).is_some_and(Responder::wants) {
            return Ok(false);
        }
        let len = copy(parts, VNET_HEADER, &mut self.question);
        let question = self.question.get(..len).unwrap_or_default();
        let room = self.answer.get_mut(VNET_HEADER..).unwrap_or_default();
        let len = match self.responder.answer(question, room) {
            Verdict::Pass => return Ok(false),
            Verdict::Swallow => return Ok(true),
            Verdict::Answer(len) => len,
            Verdict::AnswerAndAdvertise(len) => {
                self.advertise = true;
                len
            }
            Verdict::AnswerAndLook(len) => {
                self.look_for_router()?;
                len
            }
        };
        self.answer_len = Some(VNET_HEADER + len);
        Ok(true)
    }

    /// Asks the network for the router. A question that is lost is asked again with the guest's next.
    fn look_for_router(&mut self) -> io::Result<()> {
        let mut frame = [0; VNET_HEADER + ROUTER_HEAD];
        let room = frame.get_mut(VNET_HEADER..).unwrap_or_default();
        let Some(len) = self.responder.look_for_router(room) else {
            return Ok(());
        };
        let frame = frame.get_mut(..VNET_HEADER + len).unwrap_or_default();
        self.tap.send(&[VolatileSlice::from(frame)])?;
        self.looks = true;
        Ok(())
    }

    /// Looks at a frame of the network that the guest gets in `parts`.
    fn hear(&mut self, parts: &[VolatileSlice<'_>]) {
        let mut head = [0; ROUTER_HEAD];
        let len = copy(parts, VNET_HEADER, &mut head);
        let heard = self.responder.hear(head.get(..len).unwrap_or_default());
        self.looks = heard == Heard::Nothing;
        self.advertise |= heard == Heard::Changed;
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

impl<B: NetBackend> NetBackend for LeasedTap<B> {
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
            let received = self.tap.recv(parts)?;
            if self.looks && received.is_some() {
                self.hear(parts);
            }
            return Ok(received);
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
        if self.takes(parts)? {
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
    #![allow(clippy::unwrap_used)]
    use std::collections::VecDeque;
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    /// A network: frames that it got, and those that it has.
    #[derive(Debug)]
    struct Wire {
        got: Vec<Vec<u8>>,
        has: VecDeque<Vec<u8>>,
        fd: File,
    }

    impl NetBackend for Wire {
        fn poll_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }

        fn vnet_header(&self) -> bool {
            true
        }

        fn set_offloads(&mut self, _: GuestOffloads) -> io::Result<()> {
            Ok(())
        }

        fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
            let Some(frame) = self.has.pop_front() else {
                return Ok(None);
            };
            let bytes = [&[0; VNET_HEADER][..], &frame].concat();
            parts[0].copy_from(&bytes);
            Ok(Some(bytes.len()))
        }

        fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
            let mut frame = vec![0; 2048];
            let len = copy(parts, VNET_HEADER, &mut frame);
            frame.truncate(len);
            self.got.push(frame);
            Ok(true)
        }
    }

    /// The next frame for the guest.
    fn next(tap: &mut LeasedTap<Wire>) -> Option<Vec<u8>> {
        let mut room = vec![0; 2048];
        let len = tap.recv(&[VolatileSlice::from(&mut room[..])]).unwrap()?;
        Some(room[VNET_HEADER..len].to_vec())
    }

    #[test]
    fn a_guest_hears_at_once_of_a_router_that_changed() {
        let own = MacAddr([2, 0, 0, 0, 0, 7]);
        let (old, new) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let lease = LeaseConfig {
            address6: "fd00::7/64".parse().ok(),
            gateway6: "02:00:00:00:00:01@fd00::1".parse().ok(),
            ..LeaseConfig::default()
        };
        let wire = Wire {
            got: Vec::new(),
            has: VecDeque::new(),
            fd: File::open("/dev/null").unwrap(),
        };
        let mut tap = LeasedTap::new(wire, responder(&lease, own, 1500));
        // Who has the address that the responder lends?
        let lent: std::net::Ipv6Addr = "fe80::65:64ff:fe67:6501".parse().unwrap();
        let gateway: std::net::Ipv6Addr = "fd00::1".parse().unwrap();
        let asks = |target: std::net::Ipv6Addr, kind| {
            let mut frame = [&[0x33; 6][..], &own.0, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32]].concat();
            frame.extend([58, 255]);
            frame.extend([&gateway.octets()[..], &gateway.octets(), &[kind, 0, 0, 0]].concat());
            frame.extend([&[0; 4][..], &target.octets(), &[2, 1]].concat());
            frame
        };
        let question = [&[0; VNET_HEADER][..], &asks(lent, 135), &old].concat();
        let answers = |mac: [u8; 6]| [&asks(gateway, 136)[..], &mac].concat();
        for (mac, changed) in [(old, false), (new, true), (new, false)] {
            let mut bytes = question.clone();
            assert!(tap.send(&[VolatileSlice::from(&mut bytes[..])]).unwrap());
            let asked = tap.tap.got.pop().unwrap();
            assert_eq!(asked[62..78], gateway.octets());
            assert!(next(&mut tap).is_some() && !tap.has_own_frame());
            // Others go by.
            tap.tap
                .has
                .extend([vec![7; 60], answers(mac), answers(old)]);
            assert_eq!(next(&mut tap).unwrap(), [7; 60]);
            assert_eq!(next(&mut tap).unwrap(), answers(mac));
            assert_eq!(tap.has_own_frame(), changed);
            if changed {
                let advertised = next(&mut tap).unwrap();
                assert_eq!(
                    (advertised[54], &advertised[70..78]),
                    (134, &[1, 1, 2, 0, 0, 0, 0, 2][..])
                );
            }
            // Nobody listens until it is asked again.
            assert_eq!(next(&mut tap).unwrap(), answers(old));
            assert!(!tap.has_own_frame() && next(&mut tap).is_none());
        }
    }

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
