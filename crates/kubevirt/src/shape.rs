//! How large a machine is: processors and memory, of the fields that may say it.

use crate::api::disks::Amounts;
use crate::api::domain::Domain;
use crate::api::instance::Topology;
use crate::quantity::units;

/// Sockets, cores and threads: what `cpu` says, else a socket for each processor of the limit or
/// request, else one.
#[must_use]
pub fn topology(domain: &Domain) -> Topology {
    let cpu = domain.cpu.clone().unwrap_or_default();
    if cpu.cores.is_none() && cpu.sockets.is_none() && cpu.threads.is_none() {
        let resources = &domain.resources;
        let amount = amount(resources.limits.as_ref(), "cpu")
            .or_else(|| amount(resources.requests.as_ref(), "cpu"));
        let sockets = amount.and_then(|count| u32::try_from(count).ok());
        return Topology {
            cores: 1,
            sockets: sockets.unwrap_or(1).max(1),
            threads: 1,
        };
    }
    Topology {
        cores: cpu.cores.unwrap_or(1),
        sockets: cpu.sockets.unwrap_or(1),
        threads: cpu.threads.unwrap_or(1),
    }
}

/// The guest's memory in bytes: what `memory.guest` says, else the request, else the limit.
#[must_use]
pub fn guest_memory(domain: &Domain) -> Option<u64> {
    let guest = domain
        .memory
        .as_ref()
        .and_then(|memory| memory.guest.as_ref());
    match guest {
        Some(guest) => units(guest),
        None => amount(domain.resources.requests.as_ref(), "memory")
            .or_else(|| amount(domain.resources.limits.as_ref(), "memory")),
    }
}

fn amount(amounts: Option<&Amounts>, name: &str) -> Option<u64> {
    units(amounts?.get(name)?)
}
