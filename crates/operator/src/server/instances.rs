//! Parts of VirtualMachineInstances that are one verb to the machine, or one question to its guest's
//! agent.

use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde::Deserialize;
use serde_json::json;

use edgevmm_kubevirt::api::{Phase, VirtualMachineInstance};
use edgevmm_kubevirt::conditions;
use edgevmm_kubevirt::status::PAUSED;

use super::answer::{Answer, Refusal, body, empty, json_answer};
use super::path::Part;
use super::{Server, agent};
use crate::control::{self, ControlError};

/// Longest that file systems are kept frozen, in seconds, which is what the machine allows.
const MAX_FREEZE: u64 = 3600;

/// How often a condition is written anew when the instance is changed meanwhile.
const TRIES: usize = 5;

/// What the verbs take.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Options {
    dry_run: Option<Vec<String>>,
    /// A duration of Go's, like `5m0s`.
    unfreeze_timeout: Option<String>,
}

/// Whether it is something to do.
pub fn is_verb(verb: &str, word: &str) -> bool {
    let verbs = [
        "pause",
        "unpause",
        "reset",
        "softreboot",
        "freeze",
        "unfreeze",
    ];
    verb == "update" && verbs.contains(&word)
}

/// Whether it is a question to the agent.
pub fn is_question(word: &str) -> bool {
    ["guestosinfo", "userlist", "filesystemlist"].contains(&word)
}

/// Where an instance is in its life.
pub fn phase(instance: &VirtualMachineInstance) -> Phase {
    let status = instance.status.as_ref();
    status.and_then(|status| status.phase).unwrap_or_default()
}

/// Whether a condition is so.
fn is(instance: &VirtualMachineInstance, condition: &str) -> bool {
    let conditions = instance.status.iter().flat_map(|status| &status.conditions);
    conditions
        .filter(|found| found.kind == condition)
        .any(|found| found.status == "True")
}

/// The instance of a path.
///
/// # Errors
/// There is none.
pub async fn get(server: &Server, part: &Part) -> Result<VirtualMachineInstance, Refusal> {
    let instances: Api<VirtualMachineInstance> =
        Api::namespaced(server.client.clone(), &part.namespace);
    let instance = instances.get_opt(&part.name).await?;
    instance.ok_or_else(|| {
        Refusal::not_found(format!("VirtualMachineInstance {:?} not found", part.name))
    })
}

/// Does something to a machine.
///
/// # Errors
/// It is in no state for it, or can't be told.
pub async fn act(
    server: &Server,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let options: Options = body(request.into_body()).await?;
    let instance = get(server, part).await?;
    check(&instance, &part.part)?;
    let seconds = freeze_seconds(options.unfreeze_timeout.as_deref())?.to_string();
    let words: &[&str] = match part.part.as_str() {
        "unpause" => &["resume"],
        "softreboot" => &["agent", "reboot"],
        "freeze" => &["agent", "freeze", "--thaw-after", &seconds],
        "unfreeze" => &["agent", "thaw"],
        same => &[same],
    };
    match options.dry_run.as_deref().unwrap_or_default() {
        [] => {}
        [all] if all == "All" => return Ok(empty(StatusCode::OK)),
        _ => return Err(Refusal::bad("dryRun can be [\"All\"] only")),
    }
    let pod = control::pod(&server.client, &instance).await?;
    control::verb(&server.client, &pod, words).await?;
    if let "pause" | "unpause" = part.part.as_str() {
        tell_paused(server, part, instance, part.part == "pause").await?;
    }
    Ok(empty(StatusCode::OK))
}

/// Writes into the status whether users have paused a machine, as nobody else learns of it.
async fn tell_paused(
    server: &Server,
    part: &Part,
    mut instance: VirtualMachineInstance,
    paused: bool,
) -> Result<(), Refusal> {
    let instances: Api<VirtualMachineInstance> =
        Api::namespaced(server.client.clone(), &part.namespace);
    for _ in 0..TRIES {
        let mut conditions = instance.status.unwrap_or_default().conditions;
        if paused {
            let (now, why) = (Time(Timestamp::now()), "VMI was paused by user");
            conditions::set(&mut conditions, PAUSED, true, "PausedByUser", why, &now);
        } else {
            conditions::remove(&mut conditions, PAUSED);
        }
        let patch = Patch::Merge(json!({
            "metadata": { "resourceVersion": instance.metadata.resource_version },
            "status": { "conditions": conditions },
        }));
        let params = PatchParams::default();
        match instances.patch(&part.name, &params, &patch).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
        instance = get(server, part).await?;
    }
    Err(Refusal::failed(
        "The VMI was changed by others all the time",
    ))
}

/// Asks the guest's agent.
///
/// # Errors
/// There is none that answers.
pub async fn ask(server: &Server, part: &Part) -> Result<Answer, Refusal> {
    let instance = get(server, part).await?;
    if phase(&instance) != Phase::Running {
        return Err(not_running());
    }
    let pod = control::pod(&server.client, &instance).await?;
    let question = agent::Question::of(&part.part)
        .ok_or_else(|| Refusal::not_found("There is no such question"))?;
    let words = ["agent", "--json", question.verb()];
    let told = control::verb(&server.client, &pod, &words).await;
    let told = told.map_err(|error| Refusal::failed(error.to_string()))?;
    let told = serde_json::from_slice(&told)
        .map_err(|_| Refusal::failed("The machine's answer can't be read"))?;
    let answer = question.answer(&told);
    Ok(json_answer(StatusCode::OK, &answer))
}

fn not_running() -> Refusal {
    Refusal::conflict("VMI is not running")
}

fn check(instance: &VirtualMachineInstance, verb: &str) -> Result<(), Refusal> {
    if phase(instance) != Phase::Running {
        return Err(not_running());
    }
    let paused = is(instance, PAUSED);
    match verb {
        "pause" if paused => Err(Refusal::conflict("VMI is already paused")),
        "pause" if instance.spec.liveness_probe.is_some() => Err(Refusal::forbidden(
            "Pausing VMIs with LivenessProbe is currently not supported",
        )),
        "unpause" if !paused => Err(Refusal::conflict("VMI is not paused")),
        "softreboot" | "freeze" | "unfreeze" | "reset" if paused => {
            Err(Refusal::conflict("VMI is paused"))
        }
        _ => Ok(()),
    }
}

/// Seconds until the machine thaws by itself.
fn freeze_seconds(timeout: Option<&str>) -> Result<u64, Refusal> {
    let Some(timeout) = timeout else {
        return Ok(MAX_FREEZE);
    };
    let seconds = go_seconds(timeout)
        .ok_or_else(|| Refusal::bad(format!("{timeout:?} is no duration: write it like 5m0s")))?;
    // None is for ever in KubeVirt; a guest that is frozen for ever would be lost.
    Ok(if seconds == 0 {
        MAX_FREEZE
    } else {
        seconds.min(MAX_FREEZE)
    })
}

/// Whole seconds of a duration as Go writes it, rounded up: `1h2m3.5s`.
fn go_seconds(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at_checked(end)?;
        let end = after.find(|c: char| c.is_ascii_digit());
        let (unit, after) = after.split_at_checked(end.unwrap_or(after.len()))?;
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * seconds;
        rest = after;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = total.ceil() as u64;
    (!text.is_empty()).then_some(whole)
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::NoPod | ControlError::Refused(_) => Self::conflict(error.to_string()),
            ControlError::Unreachable(source) => {
                tracing::warn!("Can't reach a machine's pod: {source}");
                Self::failed("The machine's pod can't be reached")
            }
            ControlError::Broken | ControlError::Late => Self::failed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::Value;

    fn instance(phase: &str, paused: bool, probe: &Value) -> VirtualMachineInstance {
        let conditions = if paused {
            json!([{ "type": "Paused", "status": "True" }])
        } else {
            json!([])
        };
        serde_json::from_value(json!({
            "metadata": { "name": "a" },
            "spec": { "domain": { "devices": {} }, "livenessProbe": probe },
            "status": { "phase": phase, "conditions": conditions },
        }))
        .unwrap()
    }

    #[test]
    fn verbs_need_the_right_state() {
        let code = |phase, paused, verb| {
            let checked = check(&instance(phase, paused, &Value::Null), verb);
            checked.err().map(|refusal| refusal.code.as_u16())
        };
        assert_eq!(code("Running", false, "pause"), None);
        assert_eq!(code("Running", true, "pause"), Some(409));
        assert_eq!(code("Running", true, "unpause"), None);
        assert_eq!(code("Running", false, "unpause"), Some(409));
        assert_eq!(code("Scheduled", false, "pause"), Some(409));
        assert_eq!(code("Running", true, "softreboot"), Some(409));
        assert_eq!(code("Succeeded", false, "reset"), Some(409));
    }

    #[test]
    fn a_probe_that_would_end_a_paused_machine_forbids_pausing() {
        let harmed = instance("Running", false, &json!({ "tcpSocket": { "port": 22 } }));
        assert_eq!(check(&harmed, "pause").unwrap_err().code.as_u16(), 403);
        let harmed = instance("Running", false, &json!({ "guestAgentPing": {} }));
        assert_eq!(check(&harmed, "pause").unwrap_err().code.as_u16(), 403);
    }

    #[test]
    fn durations_are_go_s() {
        for (text, seconds) in [
            ("5m0s", 300),
            ("1h0m0s", 3600),
            ("1.5s", 2),
            ("10ms", 1),
            ("0", 0),
        ] {
            assert_eq!(go_seconds(text), Some(seconds), "{text}");
        }
        for text in ["", "5", "m", "-5m", "5d", "..s", "5m7"] {
            assert_eq!(go_seconds(text), None, "{text}");
        }
        assert_eq!(freeze_seconds(Some("9999999h")).unwrap(), MAX_FREEZE);
        assert_eq!(freeze_seconds(None).unwrap(), MAX_FREEZE);
    }
}
