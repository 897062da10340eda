//! A machine's state in one word, as lists show it. Words for what does not exist here (migrations,
//! receivers, claims that are still being filled) are left out.

use super::{has_ended, phase};
use crate::api::{MachineStatus, Phase, RunStrategy, VirtualMachine, VirtualMachineInstance};
use crate::conditions::holds;
use crate::status::{PAUSED, POD_SCHEDULED, SYNCHRONIZED};

/// The first that fits, in the order that clients know.
pub(super) fn status(
    machine: &VirtualMachine,
    strategy: Option<RunStrategy>,
    instance: Option<&VirtualMachineInstance>,
    status: &MachineStatus,
) -> &'static str {
    if machine.metadata.deletion_timestamp.is_some() {
        return "Terminating";
    }
    match instance {
        Some(instance) if !has_ended(instance) => living(strategy, instance),
        _ => {
            let starts = matches!(
                strategy,
                Some(RunStrategy::Always | RunStrategy::RerunOnFailure)
            );
            if starts && status.start_failure.is_some() {
                "CrashLoopBackOff"
            } else {
                "Stopped"
            }
        }
    }
}

fn living(strategy: Option<RunStrategy>, instance: &VirtualMachineInstance) -> &'static str {
    let is_leaving = instance.metadata.deletion_timestamp.is_some();
    if is_leaving || strategy == Some(RunStrategy::Halted) {
        return "Stopping";
    }
    let conditions = instance.status.iter().flat_map(|status| &status.conditions);
    let running = phase(instance) == Phase::Running;
    let status = instance.status.as_ref();
    if running && status.is_some_and(|status| holds(&status.conditions, PAUSED)) {
        return "Paused";
    }
    if running {
        return "Running";
    }
    let because = |kind: &str, reason: &str| {
        conditions.clone().any(|condition| {
            condition.kind == kind
                && condition.status == "False"
                && condition.reason.as_deref() == Some(reason)
        })
    };
    let words = [
        (SYNCHRONIZED, "FailedPvcNotFound", "ErrorPvcNotFound"),
        (POD_SCHEDULED, "Unschedulable", "ErrorUnschedulable"),
        (SYNCHRONIZED, "ErrImagePull", "ErrImagePull"),
        (SYNCHRONIZED, "ImagePullBackOff", "ImagePullBackOff"),
    ];
    let word = words.iter().find(|(kind, reason, _)| because(kind, reason));
    word.map_or("Starting", |(_, _, word)| word)
}
