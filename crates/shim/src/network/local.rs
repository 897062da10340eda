//! Connections of a pod to its own loopback, which lead to the guest. `kubectl port-forward` makes
//! them, and so do other containers of the pod.
//!
//! A guest that has the pod's own address can't be reached by it from inside the pod, where it is
//! the kernel's. So the kernel knows the guest by another address, `GUEST`, that is translated
//! where packets enter and leave the tap: the guest sees `POD` connect to its own address.

use std::net::Ipv4Addr;

use super::nft::{self, Chain, Family, If, Rule, Then};
use super::traffic::{self, Action, Match, Way};
use super::{NetworkError, Place, link};

/// The pod's kernel as the guest sees it: what answers its DHCP, too.
const POD: Ipv4Addr = Ipv4Addr::new(169, 254, 101, 118);
/// The guest as the pod's kernel sees it.
const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 101, 119);
/// Bits of the network of the two.
const PREFIX: u8 = 31;
const WHAT: &str = "lead the pod's loopback to the guest";
const NEEDS: &str = "the kernel needs cls_u32, act_nat, act_skbedit, nft_nat and nft_masq";

/// Leads the loopback to a guest that has the pod's `address`.
pub fn to_bridged(place: &mut Place<'_>, address: Ipv4Addr) -> Result<(), NetworkError> {
    let (tap, mac) = (place.tap_index, place.interface.mac);
    place.set("ipv4", "route_localnet", "1");
    // The guest may ask for POD's MAC address, from what is the kernel's own address.
    place.set("ipv4", "accept_local", "1");
    let answer = Action::Source(address, GUEST);
    let question = Action::Destination(GUEST, address);
    for message in [
        link::add_address(tap, POD.into(), PREFIX),
        link::add_neighbour(tap, GUEST.into(), mac),
        traffic::add_filter(tap, Way::In, 2, Match::To(POD), answer),
        traffic::add_filter(tap, Way::In, 3, Match::Asks(POD), Action::Accept),
        traffic::add_filter(tap, Way::Out, 1, Match::To(GUEST), question),
    ] {
        place.ask(WHAT, NEEDS, message)?;
    }
    let replaced = nft::replace(Family::Inet, &rules(&place.tap, GUEST));
    replaced.map_err(|source| place.refused(WHAT, NEEDS, source))
}

/// Rules that lead the loopback to `guest`, by `tap`, and keep the guest from using the pod's own.
pub fn rules(tap: &str, guest: Ipv4Addr) -> Vec<Rule> {
    let from = || If::From(tap.to_owned());
    let own = vec![If::Tcp, If::DestinationLoopback];
    let sent = vec![If::To(tap.to_owned()), If::SourceLoopback];
    vec![
        (Chain::Guard, vec![from(), If::SourceLoopback], Then::Drop),
        (
            Chain::Guard,
            vec![from(), If::DestinationLoopback],
            Then::Drop,
        ),
        (Chain::Own, own, Then::Destination(guest.into())),
        (Chain::Sent, sent, Then::Masquerade),
    ]
}
