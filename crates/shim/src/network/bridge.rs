//! A guest in the place of a pod's interface, with its addresses.

use edgevmm_config::{MacAddr, NetBackendConfig, NetConfig};

use super::local;
use super::resolver::Resolver;
use super::traffic::{self, Action, Match, Way};
use super::{NetworkError, Place};

/// The rank of the filter that redirects; those of exceptions are lower.
const REDIRECT: u16 = 9;
const WHAT: &str = "redirect frames";
const NEEDS: &str = "the kernel needs sch_ingress, cls_u32 and act_mirred";

/// Connects the tap of a place to its interface, and the pod's loopback to the guest if this is its
/// `first` interface. Returns the machine's interface.
pub fn connect(
    place: &mut Place<'_>,
    resolver: &Resolver,
    first: bool,
) -> Result<NetConfig, NetworkError> {
    let (nic, tap) = (place.interface.index, place.tap_index);
    for (from, to) in [(nic, tap), (tap, nic)] {
        place.ask(WHAT, NEEDS, traffic::add_filters(from))?;
        let redirect = Action::Redirect(to);
        let filter = traffic::add_filter(from, Way::In, REDIRECT, Match::All, redirect);
        place.ask(WHAT, NEEDS, filter)?;
    }
    let address = place.interface.addresses.first();
    if let Some(address) = address.filter(|_| first)
        && let Err(error) = local::to_bridged(place, address.address)
    {
        eprintln!("Port forwarding does not work: {}", crate::chain(&error));
    }
    Ok(NetConfig {
        backend: NetBackendConfig::Tap {
            tap: place.tap.clone(),
            lease: place.interface.lease(resolver).map(Box::new),
        },
        mac: Some(MacAddr(place.interface.mac)),
        bootindex: None,
    })
}
