//! The way to a machine: `edgevmm-ctl` in its pod, run through the API server as `kubectl exec` does,
//! so there is no daemon on nodes and no socket to guard.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachParams, AttachedProcess, ListParams};
use kube::{Api, Client, ResourceExt};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use edgevmm_kubevirt::api::VirtualMachineInstance;
use edgevmm_kubevirt::pod::{CONTAINER, CREATED_BY};

/// The program.
const PROGRAM: &str = "edgevmm-ctl";
/// Most that a verb may write: what a guest tells is its own choice.
const MAX_OUTPUT: u64 = 2 << 20;
/// Most that a verb may complain.
const MAX_COMPLAINT: u64 = 4 << 10;
/// How long a verb may take; freezing file systems may last a minute by itself.
const PATIENCE: Duration = Duration::from_secs(75);
/// How long opening a console may take.
const OPENING: Duration = Duration::from_secs(20);

/// Why a machine can't be told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no pod that runs.
    #[error("The machine has no pod that runs")]
    NoPod,
    /// The API server or the node doesn't take it.
    #[error("The machine's pod can't be reached")]
    Unreachable(#[source] kube::Error),
    /// The connection broke.
    #[error("The connection to the machine's pod broke")]
    Broken,
    /// It took too long.
    #[error("The machine's pod did not answer in time")]
    Late,
    /// The machine, or its guest agent, says no.
    #[error("{0}")]
    Refused(String),
}

/// The pod that runs an instance's machine. Labels are anybody's to write, so it has to be owned by
/// the instance as well.
///
/// # Errors
/// There is none, or the API server can't be asked.
pub async fn pod(client: &Client, instance: &VirtualMachineInstance) -> Result<Pod, ControlError> {
    let uid = instance.uid().ok_or(ControlError::NoPod)?;
    let namespace = instance.namespace().ok_or(ControlError::NoPod)?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let params = ListParams::default()
        .labels(&format!("{CREATED_BY}={uid}"))
        .limit(16);
    let found = pods
        .list(&params)
        .await
        .map_err(ControlError::Unreachable)?;
    let mut running = found.into_iter().filter(|pod| runs_for(pod, &uid));
    running.next().ok_or(ControlError::NoPod)
}

fn runs_for(pod: &Pod, uid: &str) -> bool {
    let owned = |pod: &Pod| {
        let mut owners = pod.owner_references().iter();
        owners.any(|owner| owner.uid == uid && owner.controller == Some(true))
    };
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    owned(pod) && phase == Some("Running")
}

/// Runs a verb, and returns what it writes.
///
/// # Errors
/// The machine can't be reached, or refuses.
pub async fn verb(client: &Client, pod: &Pod, words: &[&str]) -> Result<Vec<u8>, ControlError> {
    let run = run(client, pod, words);
    timeout(PATIENCE, run)
        .await
        .map_err(|_| ControlError::Late)?
}

async fn run(client: &Client, pod: &Pod, words: &[&str]) -> Result<Vec<u8>, ControlError> {
    let mut process = exec(client, pod, words, false).await?;
    let (Some(stdout), Some(stderr), Some(status)) =
        (process.stdout(), process.stderr(), process.take_status())
    else {
        return Err(ControlError::Broken);
    };
    let (output, complaint, status) =
        tokio::join!(all(stdout, MAX_OUTPUT), all(stderr, MAX_COMPLAINT), status);
    match exit_code(&status.ok_or(ControlError::Broken)?) {
        Some(0) => Ok(output),
        Some(_) => Err(ControlError::Refused(reason(&complaint))),
        None => Err(ControlError::Broken),
    }
}

/// Reads all, keeps the first, so that the other end is never held up.
async fn all(mut from: impl AsyncRead + Unpin, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = (&mut from).take(most).read_to_end(&mut bytes).await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    bytes
}

/// The exit code that a status tells of; none when the program could not be run.
fn exit_code(status: &Status) -> Option<i32> {
    if status.status.as_deref() == Some("Success") {
        return Some(0);
    }
    let causes = status.details.as_ref()?.causes.as_ref()?;
    let code = |cause: &&_| is_exit_code(cause);
    causes.iter().find(code)?.message.as_ref()?.parse().ok()
}

fn is_exit_code(cause: &k8s_openapi::apimachinery::pkg::apis::meta::v1::StatusCause) -> bool {
    cause.reason.as_deref() == Some("ExitCode")
}

/// The line of a complaint that says what was wrong, without what could control a terminal.
fn reason(complaint: &[u8]) -> String {
    let text = String::from_utf8_lossy(complaint);
    let line = text.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("The machine refuses, and does not say why");
    let line = line.strip_prefix("error: ").unwrap_or(line);
    line.chars().filter(|char| !char.is_control()).collect()
}

/// Opens the console, as a process whose input and output it is.
///
/// # Errors
/// The machine can't be reached.
pub async fn console(client: &Client, pod: &Pod) -> Result<AttachedProcess, ControlError> {
    let open = exec(client, pod, &["console", "--history", "0"], true);
    timeout(OPENING, open)
        .await
        .map_err(|_| ControlError::Late)?
}

async fn exec(
    client: &Client,
    pod: &Pod,
    words: &[&str],
    stdin: bool,
) -> Result<AttachedProcess, ControlError> {
    let namespace = pod.namespace().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let command = std::iter::once(PROGRAM).chain(words.iter().copied());
    let command: Vec<_> = command.collect();
    let params = AttachParams {
        container: Some(CONTAINER.to_owned()),
        stdin,
        // The console's notices are for people at a terminal.
        stderr: !stdin,
        ..AttachParams::default()
    };
    let process = pods.exec(&pod.name_any(), command, &params).await;
    process.map_err(ControlError::Unreachable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn status(value: serde_json::Value) -> Option<i32> {
        exit_code(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn exit_codes_are_read() {
        assert_eq!(status(json!({ "status": "Success" })), Some(0));
        let failure = json!({
            "status": "Failure", "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": "2" }] },
        });
        assert_eq!(status(failure), Some(2));
        let failure = json!({ "status": "Failure", "message": "no such container" });
        assert_eq!(status(failure), None);
    }

    #[test]
    fn reasons_are_one_harmless_line() {
        let complaint = b"\nerror: There is no \x1b[31magent\nhint: install it";
        assert_eq!(reason(complaint), "There is no [31magent");
        assert!(!reason(b"").is_empty());
    }

    #[test]
    fn a_pod_has_to_be_owned() {
        let pod = |owner: serde_json::Value, phase: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "name": "p", "ownerReferences": owner },
                "status": { "phase": phase },
            }))
            .unwrap()
        };
        let owner = |uid: &str, controller: bool| {
            json!([{ "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                     "name": "a", "uid": uid, "controller": controller }])
        };
        assert!(runs_for(&pod(owner("1", true), "Running"), "1"));
        assert!(!runs_for(&pod(owner("1", true), "Succeeded"), "1"));
        assert!(!runs_for(&pod(owner("1", false), "Running"), "1"));
        assert!(!runs_for(&pod(owner("2", true), "Running"), "1"));
        assert!(!runs_for(&pod(json!([]), "Running"), "1"));
    }
}
