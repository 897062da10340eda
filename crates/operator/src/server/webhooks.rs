//! What the API server asks about objects before it takes them (AdmissionReview v1). Nothing depends on
//! it being asked, as it is not while the operator is down: the controllers check again, and take from
//! an instance's status nothing that they did not write.

use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use edgevmm_kubevirt::pod::FINALIZER;
use edgevmm_kubevirt::{checks, defaults};

use super::Settings;
use super::answer::{Answer, Refusal, body, json_answer};

/// Labels of instances that say what only the operator knows.
const RESERVED: [&str; 6] = [
    "kubevirt.io/created-by",
    "kubevirt.io/migrationJobUID",
    "kubevirt.io/migrationTargetNodeName",
    "kubevirt.io/nodeName",
    "kubevirt.io/outdatedLauncherImage",
    "kubevirt.io/schedulable",
];

/// Reviews that are read at a time, as each may be large.
static TURNS: Semaphore = Semaphore::const_new(4);

/// How long a review may take to come.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is decided: an instance's patch, or why it is not taken.
type Decision = Result<Option<Value>, String>;

/// Answers a review.
///
/// # Errors
/// It is none.
pub async fn review(settings: &Settings, request: Request<Incoming>) -> Result<Answer, Refusal> {
    let path = request.uri().path().to_owned();
    let turn = TURNS.acquire().await;
    let _turn = turn.map_err(|_| Refusal::bad("The operator is ending"))?;
    // Who is slow with a review takes the turn of others.
    let review = timeout(PATIENCE, body::<Value, _>(request.into_body())).await;
    let review = review.map_err(|_| Refusal::bad("The body did not come in time"))??;
    let asked = review.get("request").filter(|asked| asked.is_object());
    let asked = asked.ok_or_else(|| Refusal::bad("The body has to be an AdmissionReview"))?;
    let own = asked.pointer("/userInfo/username").and_then(Value::as_str) == Some(&settings.user);
    let decision = match path.as_str() {
        _ if own => Ok(None),
        "/mutate/instances" => Ok(mutate(asked)),
        "/validate/instances" => instance(asked),
        "/validate/machines" => machine(asked),
        _ => return Err(Refusal::not_found(format!("There is nothing at {path:?}"))),
    };
    Ok(json_answer(StatusCode::OK, &answer(asked, decision)))
}

fn answer(asked: &Value, decision: Decision) -> Value {
    let mut response = json!({ "uid": asked.get("uid"), "allowed": decision.is_ok() });
    match decision {
        Ok(None) => {}
        Ok(Some(patch)) => {
            response["patchType"] = "JSONPatch".into();
            response["patch"] = BASE64.encode(patch.to_string()).into();
        }
        Err(message) => {
            response["status"] = json!({ "code": 422, "reason": "Invalid", "message": message });
        }
    }
    json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response })
}

/// Writes defaults into a new instance that is right, and protects the status of any.
fn mutate(asked: &Value) -> Option<Value> {
    let mut patch: Vec<Value> = protect(asked).into_iter().collect();
    let created = object(asked, "oldObject").is_none();
    if created {
        patch.extend(finalizer(asked));
    }
    let spec = asked.pointer("/object/spec").filter(|_| created);
    if let Some(Ok(mut spec)) = spec.map(checks::instance) {
        defaults::fill(&mut spec);
        patch.push(json!({ "op": "replace", "path": "/spec", "value": spec }));
    }
    (!patch.is_empty()).then(|| patch.into())
}

/// Has a new instance stay until its pod is gone, which the controller does else.
fn finalizer(asked: &Value) -> Option<Value> {
    let there = asked.pointer("/object/metadata/finalizers");
    let there = there
        .and_then(Value::as_array)
        .filter(|all| !all.is_empty());
    let Some(there) = there else {
        let path = "/metadata/finalizers";
        return Some(json!({ "op": "add", "path": path, "value": [FINALIZER] }));
    };
    let missing = !there.iter().any(|name| name == FINALIZER);
    missing.then(|| json!({ "op": "add", "path": "/metadata/finalizers/-", "value": FINALIZER }))
}

/// Leaves an instance's status as it was: it has no part of its own that users could be kept from.
fn protect(asked: &Value) -> Option<Value> {
    let new = asked.pointer("/object/status");
    let old = asked.pointer("/oldObject/status");
    match (new, old) {
        (new, old) if new == old => None,
        (Some(_), None) => Some(json!({ "op": "remove", "path": "/status" })),
        (_, Some(old)) => Some(json!({ "op": "add", "path": "/status", "value": old })),
        (None, None) => None,
    }
}

fn instance(asked: &Value) -> Decision {
    let (Some(new), old) = (object(asked, "object"), object(asked, "oldObject")) else {
        return Ok(None);
    };
    reserved(new, old, "/metadata/labels")?;
    match old {
        Some(old) if old.get("spec") != new.get("spec") => {
            Err("spec: an instance can't be changed: change its VirtualMachine".to_owned())
        }
        Some(_) => Ok(None),
        None => {
            let spec = new.get("spec").unwrap_or(&Value::Null);
            let checked = checks::instance(spec);
            checked.map_err(|problems| checks::summary(&problems))?;
            Ok(None)
        }
    }
}

/// Refuses reserved labels at a path that were not there before.
fn reserved(new: &Value, old: Option<&Value>, path: &str) -> Result<(), String> {
    for label in RESERVED {
        let found = format!("{path}/{}", label.replace('/', "~1"));
        let now = new.pointer(&found);
        if now.is_some() && now != old.and_then(|old| old.pointer(&found)) {
            let path = path.trim_start_matches('/').replace('/', ".");
            return Err(format!("{path}: {label} is reserved"));
        }
    }
    Ok(())
}

fn machine(asked: &Value) -> Decision {
    let Some(new) = object(asked, "object") else {
        return Ok(None);
    };
    let before = object(asked, "oldObject");
    reserved(new, before, "/spec/template/metadata/labels")?;
    let (spec, old) = (new.get("spec"), asked.pointer("/oldObject/spec"));
    let Some(spec) = spec.filter(|_| spec != old) else {
        return Ok(None);
    };
    let checked = checks::machine(spec);
    checked.map_err(|problems| checks::summary(&problems))?;
    Ok(None)
}

fn object<'a>(asked: &'a Value, name: &str) -> Option<&'a Value> {
    asked.get(name).filter(|object| object.is_object())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_status_stays_as_it_was() {
        let status = |address: &str| json!({ "interfaces": [{ "ipAddress": address }] });
        let created = json!({ "object": { "status": status("127.0.0.1") }, "oldObject": null });
        let patch = protect(&created).unwrap();
        assert_eq!(patch, json!({ "op": "remove", "path": "/status" }));
        let changed = json!({
            "object": { "status": status("127.0.0.1") },
            "oldObject": { "status": status("10.42.0.7") },
        });
        assert_eq!(protect(&changed).unwrap()["value"], status("10.42.0.7"));
        let removed = json!({ "object": {}, "oldObject": { "status": status("10.42.0.7") } });
        assert_eq!(protect(&removed).unwrap()["op"], "add");
        let same = json!({ "object": { "status": {} }, "oldObject": { "status": {} } });
        assert_eq!(protect(&same), None);
    }

    #[test]
    fn instances_keep_their_spec_and_reserved_labels() {
        let old = json!({ "metadata": {}, "spec": { "hostname": "a" } });
        let mut new = old.clone();
        new["metadata"]["labels"] = json!({ "app": "web", "kubevirt.io/size": "small" });
        let asked = |new: &Value| json!({ "object": new, "oldObject": old });
        assert_eq!(instance(&asked(&new)), Ok(None));
        new["metadata"]["labels"]["kubevirt.io/nodeName"] = "other".into();
        instance(&asked(&new)).unwrap_err();
        let mut new = old.clone();
        new["spec"]["hostname"] = "b".into();
        instance(&asked(&new)).unwrap_err();
        new["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        instance(&asked(&new)).unwrap_err();
    }

    #[test]
    fn new_instances_are_checked_and_get_defaults() {
        let domain = json!({ "memory": { "guest": "64Mi" }, "devices": {} });
        let asked = json!({ "object": { "spec": { "domain": domain } } });
        assert_eq!(instance(&asked), Ok(None));
        let patch = mutate(&asked).unwrap();
        assert_eq!(patch[0]["value"], json!([FINALIZER]));
        assert_eq!(patch[1]["path"], "/spec");
        assert_eq!(patch[1]["value"]["domain"]["memory"]["guest"], "64Mi");
        let asked = json!({ "object": { "spec": { "domain": domain, "surprise": 1 } } });
        let message = instance(&asked).unwrap_err();
        assert!(message.contains("surprise"), "{message}");
        let patch = mutate(&asked).unwrap();
        assert_eq!(patch.as_array().unwrap().len(), 1, "what is wrong stays so");
    }

    #[test]
    fn new_instances_stay_until_their_pod_is_gone() {
        let patch = |finalizers: Value| {
            let object = json!({ "metadata": { "finalizers": finalizers } });
            finalizer(&json!({ "object": object }))
        };
        assert_eq!(patch(json!(null)).unwrap()["value"], json!([FINALIZER]));
        let added = patch(json!(["other"])).unwrap();
        assert_eq!(added["path"], "/metadata/finalizers/-");
        assert_eq!(patch(json!(["other", FINALIZER])), None);
    }

    #[test]
    fn answers_are_reviews() {
        let answer = answer(&json!({ "uid": "u" }), Err("no".to_owned()));
        assert_eq!(answer["response"]["uid"], "u");
        assert_eq!(answer["response"]["allowed"], false);
        assert_eq!(answer["response"]["status"]["message"], "no");
    }

    #[test]
    fn templates_have_no_reserved_labels() {
        let labels = json!({ "app": "web", "kubevirt.io/nodeName": "other" });
        let template = json!({ "metadata": { "labels": labels }, "spec": {
            "domain": { "memory": { "guest": "64Mi" }, "devices": {} } } });
        let asked = json!({ "object": { "spec": { "template": template } } });
        let message = machine(&asked).unwrap_err();
        assert!(
            message.starts_with("spec.template.metadata.labels"),
            "{message}"
        );
    }

    #[test]
    fn run_strategies_exclude_running() {
        let both = json!({ "object": { "spec": { "running": true, "runStrategy": "Always" } } });
        machine(&both).unwrap_err();
    }
}
