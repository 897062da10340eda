//! What the operator asks of the API server, from that server's audit log.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// What is written: the operator's requests, by name only.
pub(super) fn policy(user: &str) -> String {
    format!(
        "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived, ResponseStarted]\nrules:\n\
         - {{level: Metadata, users: ['{user}']}}\n- {{level: None}}\n"
    )
}

/// A request of the operator's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// Like `patch`.
    pub verb: String,
    /// The group of what is asked for; empty for the first one.
    pub group: String,
    /// What is asked for, with its part, like `pods/status`.
    pub resource: String,
    /// Its namespace, if it has one.
    pub namespace: Option<String>,
    /// Its name, if one is given.
    pub name: Option<String>,
    /// How it was answered.
    pub code: u64,
}

/// All requests for objects so far. One that lasts, like a watch, is there once it has ended.
pub(super) fn read(log: &Path) -> Result<Vec<Request>> {
    let text = match fs::read_to_string(log) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.with_context(|| format!("Can't read {}", log.display()))?,
    };
    // The last line may not be whole yet.
    let whole = text.rfind('\n').and_then(|end| text.get(..end));
    let events = whole.unwrap_or_default().lines();
    let events = events.map(serde_json::from_str::<Value>);
    let mut requests = Vec::new();
    for event in events {
        requests.extend(request(&event?));
    }
    Ok(requests)
}

fn request(event: &Value) -> Option<Request> {
    let object = event.get("objectRef")?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let part = object["subresource"].as_str();
    let resource = object["resource"].as_str()?;
    Some(Request {
        verb: text(&event["verb"])?,
        group: text(&object["apiGroup"]).unwrap_or_default(),
        resource: part.map_or_else(|| resource.to_owned(), |part| format!("{resource}/{part}")),
        namespace: text(&object["namespace"]),
        name: text(&object["name"]),
        code: event["responseStatus"]["code"].as_u64().unwrap_or(0),
    })
}
