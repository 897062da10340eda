//! Conditions: what is so, since when, and why.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::api::Condition;

/// Says that `kind` is so, or not. The time stays where the status does.
pub fn set(
    conditions: &mut Vec<Condition>,
    kind: &str,
    holds: bool,
    reason: &str,
    message: &str,
    now: &Time,
) {
    let status = if holds { "True" } else { "False" };
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let new = Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        last_probe_time: None,
        last_transition_time: Some(now.clone()),
        reason: text(reason),
        message: text(message),
    };
    match conditions
        .iter_mut()
        .find(|condition| condition.kind == kind)
    {
        Some(old) => {
            let since = (old.status == status).then(|| old.last_transition_time.clone());
            *old = Condition {
                last_transition_time: since.flatten().or(new.last_transition_time),
                ..new
            };
        }
        None => conditions.push(new),
    }
}

/// Says nothing more of `kind`.
pub fn remove(conditions: &mut Vec<Condition>, kind: &str) {
    conditions.retain(|condition| condition.kind != kind);
}

/// Whether `kind` is so.
#[must_use]
pub fn holds(conditions: &[Condition], kind: &str) -> bool {
    let mut of_kind = conditions.iter().filter(|condition| condition.kind == kind);
    of_kind.any(|condition| condition.status == "True")
}
