//! What keeps the cluster as its objects say. Each controller hears of changes by watching, and
//! decides by the objects alone, so it may be stopped and started at any time.

pub mod instance;
pub mod machine;
mod patch;

use std::time::Duration;

use edgevmm_kubevirt::guarded::Unreadable;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use kube::{Client, Resource};
use tracing::warn;

/// Seconds until what failed for a reason that no watch tells the end of is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Objects that a controller keeps at a time: each has a connection of its own for what it asks.
const AT_ONCE: u16 = 8;
/// Objects of a page of a list: each page is in memory as a whole before it is read.
const PAGE: u32 = 100;

/// How a controller goes about it.
fn pace() -> kube::runtime::controller::Config {
    kube::runtime::controller::Config::default().concurrency(AT_ONCE)
}

/// How objects are listed and watched.
fn watched() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

/// How soon a watch that broke begins anew: each a little later than the last time, but within seconds,
/// as nothing happens meanwhile. One process that asks that often is no burden to the API server.
#[derive(Debug, Default)]
struct Patience {
    failures: u32,
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1).min(8);
        Some(Duration::from_millis(250) * self.failures)
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// How long all watches of a controller are held up by one that broke. What kube does when nothing is
/// said adds up to minutes.
#[derive(Debug)]
struct NoWait;

impl Iterator for NoWait {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

impl Backoff for NoWait {
    fn reset(&mut self) {}
}

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
