//! A guest in the place of a pod's interface, with its addresses.

use edgevmm_config::{Gateway6, MacAddr, NetBackendConfig, NetConfig};

use super::guard::Own;
use super::resolver::Resolver;
use super::traffic::{self, Action, Match, Way};
use super::{NetworkError, Place, local, neighbour};

/// Rank of the filter, after the exceptions (local.rs has these).
const REDIRECT: u16 = 9;
const WHAT: &str = "redirect frames";
const NEEDS: &str = "the kernel needs sch_ingress, cls_u32 and act_mirred";

/// Connects the tap of a place to its interface, and the pod's loopback to the guest if this is its
/// `first` interface. The guest `may_spoof` other addresses or not. Returns the machine's interface.
pub fn connect(
    place: &mut Place<'_>,
    resolver: &Resolver,
    first: bool,
    may_spoof: bool,
) -> Result<NetConfig, NetworkError> {
    // Asked for while the pod's kernel still hears the answer.
    let gateway6 = router(place);
    let (nic, tap) = (place.interface.index, place.tap_index);
    for index in [nic, tap] {
        place.ask(WHAT, NEEDS, traffic::add_filters(index))?;
    }
    if !may_spoof {
        place.guard(&own(place, gateway6))?;
    }
    for (from, to) in [(nic, tap), (tap, nic)] {
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
    let lease = place.interface.lease(resolver, gateway6);
    Ok(NetConfig {
        backend: NetBackendConfig::Tap {
            tap: place.tap.clone(),
            lease: lease.map(Box::new),
        },
        mac: Some(MacAddr(place.interface.mac)),
        bootindex: None,
    })
}

/// The router of the interface's IPv6 as a guest can know it. Plugins mostly give its address in the
/// pod's network, of which a guest is told its MAC address.
fn router(place: &mut Place<'_>) -> Option<Gateway6> {
    let (interface, kernel) = (place.interface, &mut *place.kernel);
    interface.addresses6.first()?;
    let address = interface.gateway6()?;
    if address.is_unicast_link_local() {
        return Some(Gateway6::Link(address));
    }
    let mac = neighbour::mac(kernel, interface.index, address);
    if mac.is_none() {
        eprintln!(
            "The guest has no IPv6 router: the pod's, {address}, does not answer at {}",
            interface.name
        );
    }
    mac.map(|mac| Gateway6::Mac(MacAddr(mac), Some(address)))
}

/// What the guest may send as.
fn own(place: &Place<'_>, gateway6: Option<Gateway6>) -> Own {
    let interface = place.interface;
    let (addresses, addresses6) = (interface.addresses.iter(), interface.addresses6.iter());
    Own {
        mac: Some(interface.mac),
        addresses: addresses.map(|network| network.address).collect(),
        addresses6: addresses6.map(|network| network.address).collect(),
        router: match gateway6 {
            Some(Gateway6::Link(router)) => Some(router),
            Some(Gateway6::Mac(..)) | None => None,
        },
    }
}
