//! What keeps the cluster as its objects say. Each controller hears of changes by watching, and
//! decides by the objects alone, so it may be stopped and started at any time.

pub mod instance;
pub mod machine;
mod patch;

use std::time::Duration;

use edgevmm_kubevirt::guarded::Unreadable;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Client, Resource};
use tracing::warn;

/// Seconds until what failed for a reason that no watch tells the end of is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Why an object could not be kept as it says. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or was not there.
    #[error("The API server did not do what was asked")]
    Api(#[from] kube::Error),
    /// An object came without what each has.
    #[error("An object has no {0}")]
    Incomplete(&'static str),
    /// An object is not as its definition says.
    #[error("An object can't be read or written")]
    Json(#[from] serde_json::Error),
}

/// What all controllers use.
#[derive(Clone)]
pub struct Shared {
    /// The way to the API server.
    pub client: Client,
    /// Tells users what was done.
    pub recorder: Recorder,
    /// What pods are made of whose instance names no image.
    pub image: String,
}

impl Shared {
    /// Tells of `object` what happened. That nobody hears of it stops nothing.
    pub async fn tell<K>(&self, object: &K, kind: EventType, reason: &str, note: impl Into<String>)
    where
        K: Resource<DynamicType = ()>,
    {
        let event = Event {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(note.into()),
            action: reason.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            warn!(%error, reason, "Can't write an event");
        }
    }

    /// Tells of an object that nothing is done for it, as it can't be read.
    async fn tell_unreadable<K>(&self, object: &K, unreadable: &Unreadable)
    where
        K: Resource<DynamicType = ()>,
    {
        let metadata = &unreadable.metadata;
        let (namespace, name) = (&metadata.namespace, &metadata.name);
        warn!(kind = %K::kind(&()), namespace, name, "Can't read an object: {unreadable}");
        let note = format!("It can't be read, so nothing is done for it: {unreadable}");
        self.tell(object, EventType::Warning, "Unreadable", note)
            .await;
    }
}
