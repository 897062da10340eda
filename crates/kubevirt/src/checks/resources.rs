//! Checks of what the pod asks for. A cluster refuses the pod else, long after the instance was taken.

use super::Report;
use crate::api::disks::Amounts;
use crate::api::domain::Resources;
use crate::quantity::{thousandths, units};

/// Least request of memory, in bytes, as with KubeVirt.
const MIN_MEMORY: u64 = 1_000_000;

/// `guest` is the guest's memory in bytes.
pub(super) fn check(resources: &Resources, guest: Option<u64>, report: &mut Report<'_>) {
    for (field, amounts) in [
        ("requests", &resources.requests),
        ("limits", &resources.limits),
    ] {
        for (name, amount) in amounts.iter().flatten() {
            if thousandths(&amount.0).is_none() {
                let field = format!("{field}.{name}");
                report.refuse(&field, "write an amount of 0 or more, like 2 or 512Mi");
            }
        }
    }
    let of = |amounts: &Option<Amounts>, name: &str| {
        let amount = amounts.as_ref()?.get(name)?;
        thousandths(&amount.0)
    };
    for name in ["cpu", "memory"] {
        let limit = of(&resources.limits, name);
        let request = of(&resources.requests, name);
        if limit
            .zip(request)
            .is_some_and(|(limit, request)| request > limit)
        {
            report.refuse(&format!("requests.{name}"), "more than the limit");
        }
    }
    let bytes = |amounts: &Option<Amounts>| units(amounts.as_ref()?.get("memory")?);
    if bytes(&resources.requests).is_some_and(|bytes| bytes < MIN_MEMORY) {
        report.refuse("requests.memory", "too little: ask for 1M or more");
    }
    let limit = bytes(&resources.limits);
    if limit.zip(guest).is_some_and(|(limit, guest)| limit < guest) {
        report.refuse("limits.memory", "less than the guest's memory");
    }
}
