//! What becomes of a machine: what its controller is to do next, and what it tells of it.

mod printable;
mod start;
#[cfg(test)]
mod tests;

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use kube::ResourceExt;

use crate::api::machine::{StartFailure, StateAction, StateChange, Template};
use crate::api::{MachineStatus, Phase, RunStrategy, VirtualMachine, VirtualMachineInstance};
use crate::conditions::{remove, set};
use crate::status::READY;

pub use start::{Start, is_revision, start};

/// Finalizer of machines and of their instances, by which nothing goes unnoticed.
pub const FINALIZER: &str = "kubevirt.io/virtualMachineControllerFinalize";
/// Annotation of an instance: the generation of its machine that it is like.
pub const GENERATION: &str = "kubevirt.io/vm-generation";
/// Condition: something that was to be done failed.
pub const FAILURE: &str = "Failure";
/// Condition: the template is no longer what the instance was made of.
pub const RESTART_REQUIRED: &str = "RestartRequired";
/// Finalizer that a client asks for by deleting a machine without its instance.
const ORPHAN: &str = "orphan";

/// Seconds after the first start that failed; those after more of them grow with their square.
const FIRST_DELAY: i64 = 10;
/// Most of them.
const LONGEST_DELAY: i64 = 300;

/// What a machine is told that is to start.
const START: StateChange = StateChange {
    action: StateAction::Start,
    data: None,
    uid: None,
};

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Add the finalizer to the machine, or remove it.
    pub finalizer: Option<Finalizer>,
    /// The run strategy is to become this one.
    pub strategy: Option<RunStrategy>,
    /// What to do with the instance.
    pub action: Option<Action>,
    /// What to tell.
    pub status: MachineStatus,
    /// When to look again, though nothing changes.
    pub look_again: Option<Duration>,
}

/// What becomes of a machine's finalizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finalizer {
    /// It is missing.
    Add,
    /// Nothing is left to be done before the machine goes.
    Remove,
}

/// What to do with a machine's instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make one, whose guest may be held before its first instruction.
    Create {
        /// Whether it is.
        paused: bool,
    },
    /// Delete it.
    Delete,
    /// It has ended and is being deleted: take our finalizer from it.
    Release,
    /// It stays when the machine goes: take owner and finalizer from it.
    Orphan,
    /// Note that it is like this generation of the machine.
    Annotate(i64),
}

/// Decides what to do about a machine whose instance is `instance`. `started_with` is what that was
/// made of, which may be left out while the instance is of the machine's generation.
#[must_use]
pub fn decide(
    machine: &VirtualMachine,
    instance: Option<&VirtualMachineInstance>,
    started_with: Option<&Template>,
    now: &Time,
) -> Plan {
    let mut status = machine.status.clone().unwrap_or_default();
    trim(&mut status.state_change_requests, instance);
    count_failures(&mut status, instance, now);
    let mut plan = Plan {
        finalizer: None,
        strategy: None,
        action: None,
        status,
        look_again: None,
    };
    remove(&mut plan.status.conditions, FAILURE);
    if !instance.is_some_and(is_live) {
        remove(&mut plan.status.conditions, RESTART_REQUIRED);
    }
    let strategy = strategy(machine);
    if machine.metadata.deletion_timestamp.is_some() {
        end(machine, instance, &mut plan);
    } else {
        let missing = !machine.finalizers().iter().any(|it| it == FINALIZER);
        plan.finalizer = missing.then_some(Finalizer::Add);
        match strategy {
            Some(strategy) => follow(strategy, instance, &mut plan, now),
            None => fail(
                machine,
                &mut plan.status,
                "InvalidRunStrategy",
                "spec.running and spec.runStrategy are both there; only one of them may be",
                now,
            ),
        }
        if plan.action.is_none() && instance.is_some_and(is_live) {
            compare(machine, instance, started_with, &mut plan, now);
        }
    }
    tell(machine, strategy, instance, &mut plan.status, now);
    plan
}

/// Says in `status` that something that was to be done failed; since when, if it did before as well.
pub fn fail(
    machine: &VirtualMachine,
    status: &mut MachineStatus,
    reason: &str,
    message: &str,
    now: &Time,
) {
    let before = machine.status.iter().flat_map(|it| &it.conditions);
    let before = before
        .filter(|condition| condition.kind == FAILURE)
        .cloned();
    status
        .conditions
        .retain(|condition| condition.kind != FAILURE);
    status.conditions.extend(before);
    set(&mut status.conditions, FAILURE, true, reason, message, now);
}

/// The strategy that the machine asks for, unless it asks in two ways.
#[must_use]
pub fn strategy(machine: &VirtualMachine) -> Option<RunStrategy> {
    match (machine.spec.running, machine.spec.run_strategy) {
        (Some(_), Some(_)) => None,
        (Some(true), None) => Some(RunStrategy::Always),
        (_, strategy) => Some(strategy.unwrap_or_default()),
    }
}

/// Whether the instance is one that runs, or will.
fn is_live(instance: &VirtualMachineInstance) -> bool {
    instance.metadata.deletion_timestamp.is_none() && !has_ended(instance)
}

fn phase(instance: &VirtualMachineInstance) -> Phase {
    let status = instance.status.as_ref();
    status.and_then(|status| status.phase).unwrap_or_default()
}

fn has_ended(instance: &VirtualMachineInstance) -> bool {
    phase(instance).is_final()
}

fn has_run(instance: &VirtualMachineInstance) -> bool {
    let status = instance.status.iter();
    let mut times = status.flat_map(|status| &status.phase_transition_timestamps);
    phase(instance) == Phase::Running || times.any(|time| time.phase == Phase::Running)
}

/// Drops requests that are done, or came too late.
fn trim(requests: &mut Vec<StateChange>, instance: Option<&VirtualMachineInstance>) {
    let uid = instance.and_then(ResourceExt::uid);
    while let Some(request) = requests.first() {
        let is_over = match request.action {
            StateAction::Stop => uid.is_none() || request.uid != uid,
            StateAction::Start => instance.is_some_and(is_live),
        };
        if !is_over {
            return;
        }
        requests.remove(0);
    }
}

/// Counts an instance that ended without having run, once.
fn count_failures(
    status: &mut MachineStatus,
    instance: Option<&VirtualMachineInstance>,
    now: &Time,
) {
    let Some(instance) = instance else { return };
    if has_run(instance) {
        status.start_failure = None;
        return;
    }
    // One that was told to end did not fail; what ended is deleted by ourselves.
    let counted = status.start_failure.as_ref();
    let uid = instance.uid();
    if !has_ended(instance) || counted.is_some_and(|it| it.last_failed_instance == uid) {
        return;
    }
    if instance.metadata.deletion_timestamp.is_some() {
        return;
    }
    let count = counted
        .map_or(0, |it| it.consecutive_fail_count)
        .saturating_add(1);
    status.start_failure = Some(StartFailure {
        consecutive_fail_count: count,
        last_failed_instance: uid,
        retry_after_timestamp: Some(Time(now.0 + delay(count, now))),
    });
}

/// How long to wait after so many failures: with up to half as much at random, so that machines that
/// failed together do not start together.
fn delay(count: i32, now: &Time) -> SignedDuration {
    let square = i64::from(count).saturating_mul(i64::from(count));
    let delay = FIRST_DELAY.saturating_mul(square).min(LONGEST_DELAY);
    let random = i64::from(now.0.subsec_nanosecond()) % (delay / 2).max(1);
    SignedDuration::from_secs(delay.saturating_add(random).min(LONGEST_DELAY))
}

/// How long until the next start, when the last ones failed.
fn time_left(status: &MachineStatus, now: &Time) -> Option<Duration> {
    let retry = status
        .start_failure
        .as_ref()?
        .retry_after_timestamp
        .as_ref()?;
    // A clock that was set back must not hold a machine for longer than any failure does.
    let left = (retry.0.duration_since(now.0)).min(SignedDuration::from_secs(LONGEST_DELAY));
    Duration::try_from(left).ok().filter(|left| !left.is_zero())
}

/// The machine is to go.
fn end(machine: &VirtualMachine, instance: Option<&VirtualMachineInstance>, plan: &mut Plan) {
    let ours = machine.finalizers().iter().any(|it| it == FINALIZER);
    let orphans = machine.finalizers().iter().any(|it| it == ORPHAN);
    match instance {
        Some(_) if orphans && ours => plan.action = Some(Action::Orphan),
        Some(instance) if !orphans => plan.action = stop(instance),
        _ => {}
    }
    if ours && (instance.is_none() || orphans) {
        plan.finalizer = Some(Finalizer::Remove);
    }
}

/// What is to be done for an instance to go.
fn stop(instance: &VirtualMachineInstance) -> Option<Action> {
    if instance.metadata.deletion_timestamp.is_none() {
        Some(Action::Delete)
    } else {
        release(instance)
    }
}

fn release(instance: &VirtualMachineInstance) -> Option<Action> {
    let ours = instance.finalizers().iter().any(|it| it == FINALIZER);
    let over = instance.metadata.deletion_timestamp.is_some() && has_ended(instance);
    (ours && over).then_some(Action::Release)
}

fn follow(
    strategy: RunStrategy,
    instance: Option<&VirtualMachineInstance>,
    plan: &mut Plan,
    now: &Time,
) {
    match instance {
        Some(instance) => keep(strategy, instance, plan),
        None => begin(strategy, plan, now),
    }
}

/// There is an instance: it stays, or goes.
fn keep(strategy: RunStrategy, instance: &VirtualMachineInstance, plan: &mut Plan) {
    if instance.metadata.deletion_timestamp.is_some() {
        plan.action = release(instance);
        return;
    }
    let requests = &mut plan.status.state_change_requests;
    let asked = requests.first().map(|request| request.action);
    let ended = has_ended(instance);
    let goes = match strategy {
        RunStrategy::Halted => true,
        _ if asked == Some(StateAction::Stop) => true,
        RunStrategy::Always | RunStrategy::RerunOnFailure => ended,
        RunStrategy::Manual => ended && asked == Some(StateAction::Start),
        RunStrategy::Once => false,
    };
    if !goes {
        return;
    }
    plan.action = Some(Action::Delete);
    let failed = strategy == RunStrategy::RerunOnFailure && phase(instance) == Phase::Failed;
    if failed && asked.is_none() {
        requests.push(START);
    }
}

/// There is no instance: one is made, or not.
fn begin(strategy: RunStrategy, plan: &mut Plan, now: &Time) {
    let status = &mut plan.status;
    let asked = status.state_change_requests.first();
    let asked = asked.filter(|request| request.action == StateAction::Start);
    let data = asked.and_then(|request| request.data.as_ref());
    let paused = data
        .and_then(|data| data.get("paused"))
        .is_some_and(|it| it == "true");
    let is_new = status.run_strategy != Some(strategy);
    let starts = match strategy {
        RunStrategy::Halted => {
            status.start_failure = None;
            plan.strategy = asked.map(|_| RunStrategy::Always);
            return;
        }
        RunStrategy::Always => true,
        RunStrategy::RerunOnFailure => is_new || asked.is_some(),
        RunStrategy::Manual => asked.is_some(),
        RunStrategy::Once => is_new,
    };
    if !starts {
        return;
    }
    let waits = matches!(strategy, RunStrategy::Always | RunStrategy::RerunOnFailure);
    plan.look_again = waits.then(|| time_left(status, now)).flatten();
    let is_asked = asked.is_some();
    if plan.look_again.is_none() {
        plan.action = Some(Action::Create { paused });
    } else if strategy == RunStrategy::RerunOnFailure && !is_asked {
        // By then the strategy is no longer a new one.
        plan.status.state_change_requests.push(START);
    }
}

/// Whether the template still is what the instance was made of.
fn compare(
    machine: &VirtualMachine,
    instance: Option<&VirtualMachineInstance>,
    started_with: Option<&Template>,
    plan: &mut Plan,
    now: &Time,
) {
    let Some(instance) = instance else { return };
    if is_of_generation(machine, instance) {
        remove(&mut plan.status.conditions, RESTART_REQUIRED);
        return;
    }
    let Some(started_with) = started_with else {
        return;
    };
    if started_with.spec == machine.spec.template.spec {
        remove(&mut plan.status.conditions, RESTART_REQUIRED);
        plan.action = machine.metadata.generation.map(Action::Annotate);
    } else {
        set(
            &mut plan.status.conditions,
            RESTART_REQUIRED,
            true,
            "RestartRequired",
            "a non-live-updatable field was changed in the template spec",
            now,
        );
    }
}

/// Whether the instance is known to be like the machine as it is now.
#[must_use]
pub fn is_of_generation(machine: &VirtualMachine, instance: &VirtualMachineInstance) -> bool {
    generation_of(instance) == machine.metadata.generation
}

fn generation_of(instance: &VirtualMachineInstance) -> Option<i64> {
    instance.annotations().get(GENERATION)?.parse().ok()
}

fn tell(
    machine: &VirtualMachine,
    strategy: Option<RunStrategy>,
    instance: Option<&VirtualMachineInstance>,
    status: &mut MachineStatus,
    now: &Time,
) {
    status.created = Some(instance.is_some());
    status.run_strategy = strategy.or(status.run_strategy);
    status.desired_generation = machine.metadata.generation;
    if let Some(instance) = instance {
        status.observed_generation = generation_of(instance).or(status.observed_generation);
    }
    let conditions = instance.and_then(|instance| instance.status.as_ref());
    let conditions = conditions
        .map(|status| &*status.conditions)
        .unwrap_or_default();
    let ours = |kind: &str| matches!(kind, FAILURE | RESTART_REQUIRED);
    let ready = status
        .conditions
        .iter()
        .find(|it| it.kind == READY)
        .cloned();
    status.conditions.retain(|condition| ours(&condition.kind));
    let others = conditions.iter().filter(|condition| !ours(&condition.kind));
    status.conditions.extend(others.cloned());
    if !conditions.iter().any(|condition| condition.kind == READY) {
        let (reason, message) = match instance {
            Some(_) => ("VMIConditionMissing", "VMI is missing the Ready condition"),
            None => ("VMINotExists", "VMI does not exist"),
        };
        status.conditions.extend(ready);
        set(&mut status.conditions, READY, false, reason, message, now);
    }
    status.ready = Some(crate::conditions::holds(&status.conditions, READY));
    let printable = printable::status(machine, strategy, instance, status);
    status.printable_status = Some(printable.to_owned());
}
