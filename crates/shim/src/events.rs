//! Tells containerd what happens to tasks, in order, also when containerd is away for a while.

use std::path::PathBuf;
use std::time::Duration;

use prost::Message;
use prost_types::Any;
use tokio::sync::{mpsc, watch};

use crate::proto::events::{
    Envelope, ForwardRequest, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit,
    TaskOom, TaskPaused, TaskResumed, TaskStart,
};
use crate::proto::{any, now};
use crate::ttrpc;

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// Events kept for a containerd that is away. A pod makes a handful in its life.
const MAX_WAITING: usize = 1024;
/// How long an event may take.
const CALL_TIME: Duration = Duration::from_secs(5);
/// Tries for each event: with the pauses between them as long as a containerd takes to be replaced.
const TRIES: u32 = 60;
/// Time between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// What can happen to a task.
#[derive(Debug, Clone)]
pub enum Event {
    /// It was made.
    Create(TaskCreate),
    /// It runs.
    Start(TaskStart),
    /// A program is to be run in it.
    ExecAdded(TaskExecAdded),
    /// The program runs.
    ExecStarted(TaskExecStarted),
    /// It, or a program in it, has ended.
    Exit(TaskExit),
    /// It is no more.
    Delete(TaskDelete),
    /// Its vCPUs were halted.
    Paused(TaskPaused),
    /// They go on.
    Resumed(TaskResumed),
    /// The kernel ended it for want of memory.
    Oom(TaskOom),
}

impl Event {
    fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => "/tasks/create",
            Self::Start(_) => "/tasks/start",
            Self::ExecAdded(_) => "/tasks/exec-added",
            Self::ExecStarted(_) => "/tasks/exec-started",
            Self::Exit(_) => "/tasks/exit",
            Self::Delete(_) => "/tasks/delete",
            Self::Paused(_) => "/tasks/paused",
            Self::Resumed(_) => "/tasks/resumed",
            Self::Oom(_) => "/tasks/oom",
        }
    }

    fn pack(&self) -> Any {
        match self {
            Self::Create(event) => any("containerd.events.TaskCreate", event),
            Self::Start(event) => any("containerd.events.TaskStart", event),
            Self::ExecAdded(event) => any("containerd.events.TaskExecAdded", event),
            Self::ExecStarted(event) => any("containerd.events.TaskExecStarted", event),
            Self::Exit(event) => any("containerd.events.TaskExit", event),
            Self::Delete(event) => any("containerd.events.TaskDelete", event),
            Self::Paused(event) => any("containerd.events.TaskPaused", event),
            Self::Resumed(event) => any("containerd.events.TaskResumed", event),
            Self::Oom(event) => any("containerd.events.TaskOOM", event),
        }
    }
}

/// Where events go.
#[derive(Debug, Clone)]
pub struct Events {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
    /// Events that are not sent yet.
    waiting: watch::Sender<usize>,
}

impl Events {
    /// Those of a namespace, sent to containerd's ttrpc socket by a task of their own.
    pub fn new(namespace: &str, containerd: PathBuf) -> Self {
        let (queue, receiver) = mpsc::channel(MAX_WAITING);
        let events = Self {
            namespace: namespace.to_owned(),
            queue,
            waiting: watch::Sender::new(0),
        };
        let waiting = events.waiting.clone();
        tokio::spawn(forward(receiver, waiting, namespace.to_owned(), containerd));
        events
    }

    /// Returns once all that was told is sent, or has found nobody for too long.
    pub async fn sent(&self) {
        let mut waiting = self.waiting.subscribe();
        // Fails when nothing more can be told, which is the same.
        let _ = waiting.wait_for(|count| *count == 0).await;
    }

    /// Tells an event. Never waits: what is too much for the queue is lost.
    pub fn tell(&self, event: &Event) {
        let envelope = Envelope {
            timestamp: Some(now()),
            namespace: self.namespace.clone(),
            topic: event.topic().to_owned(),
            event: Some(event.pack()),
        };
        if self.queue.try_send(envelope).is_ok() {
            self.waiting.send_modify(|count| *count += 1);
        }
    }
}

async fn forward(
    mut queue: mpsc::Receiver<Envelope>,
    waiting: watch::Sender<usize>,
    namespace: String,
    containerd: PathBuf,
) {
    while let Some(envelope) = queue.recv().await {
        let request = ForwardRequest {
            envelope: Some(envelope),
        };
        for _ in 0..TRIES {
            let payload = request.encode_to_vec();
            let call = ttrpc::call(&containerd, SERVICE, "Forward", payload, &namespace);
            if let Ok(Ok(Ok(_))) = tokio::time::timeout(CALL_TIME, call).await {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        waiting.send_modify(|count| *count = count.saturating_sub(1));
    }
}
