//! The way to a machine's loop: requests, and what is told of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use edgevmm_api::ExitRecord;
use edgevmm_devices::platform::{MachineControl, MachineRequest};
use tokio::sync::{mpsc, oneshot, watch};

use crate::kvm::vcpu::Outcome;

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// vCPUs run.
    Running,
    /// vCPUs are halted, by a call or because of trouble.
    Paused,
    /// The power button is pressed and the deadline runs, or the last writes go out.
    Stopping,
    /// The guest ended.
    Stopped,
}

/// What the API tells of a machine.
#[derive(Debug, Clone)]
pub struct Status {
    /// What it is doing.
    pub phase: Phase,
    /// What keeps the guest from going on: a device that needs help from outside.
    pub trouble: Option<String>,
    /// Resets since the start.
    pub resets: u64,
    /// When the guest was started, by the wall clock.
    pub started: SystemTime,
    /// When the guest was started, by the monotonic clock.
    pub since: Instant,
    /// How it ended, once stopped.
    pub exit: Option<ExitRecord>,
}

/// A request that can't be carried out now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It does not fit what the machine is doing.
    #[error("The machine is {0}")]
    Phase(&'static str),
    /// The machine is gone.
    #[error("The machine has ended")]
    Gone,
    /// It was tried and failed; the machine ends.
    #[error("{0}")]
    Failed(String),
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// Something that the loop takes up.
#[derive(Debug)]
pub(super) enum Event {
    /// Of the guest, in an epoch: what it asked for before a reset is void after it.
    Guest(u64, MachineRequest),
    /// Of a vCPU, likewise.
    Vcpu(u64, Outcome),
    /// Of a device that can't go on, likewise.
    Trouble(u64, String),
    Pause(Reply<()>),
    Resume(Reply<()>),
    Reset(Reply<()>),
    Stop(Option<Duration>, Option<Reply<Duration>>),
    Kill(Option<Reply<()>>),
}

impl Event {
    /// Answers what comes while the machine is taken apart.
    pub(super) fn answer_at_the_end(self, stop_timeout: Duration) {
        match self {
            Event::Guest(..)
            | Event::Vcpu(..)
            | Event::Trouble(..)
            | Event::Stop(_, None)
            | Event::Kill(None) => {}
            Event::Pause(reply) | Event::Resume(reply) | Event::Reset(reply) => {
                let _ = reply.send(Err(RequestError::Phase("stopping")));
            }
            Event::Stop(timeout, Some(reply)) => {
                let _ = reply.send(Ok(timeout.unwrap_or(stop_timeout)));
            }
            Event::Kill(Some(reply)) => {
                let _ = reply.send(Ok(()));
            }
        }
    }
}

/// The way to a machine's loop, from any thread.
#[derive(Debug, Clone)]
pub struct Handle {
    events: mpsc::UnboundedSender<Event>,
    status: watch::Receiver<Status>,
}

impl Handle {
    /// What the machine is doing now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits for the end.
    pub async fn ended(&mut self) -> Option<ExitRecord> {
        let stopped = self.status.wait_for(|s| s.exit.is_some()).await;
        stopped.ok().and_then(|status| status.exit.clone())
    }

    /// Waits until the machine is to stop, or has ended.
    pub async fn stopping(&mut self) {
        let ends = |status: &Status| matches!(status.phase, Phase::Stopping | Phase::Stopped);
        // Without a sender it has ended.
        let _ = self.status.wait_for(ends).await;
    }

    /// Presses the power button and sets the deadline; the configured one when absent. Does not
    /// wait.
    pub fn request_stop(&self, timeout: Option<Duration>) {
        let _ = self.events.send(Event::Stop(timeout, None));
    }

    /// Ends the machine by force. Does not wait.
    pub fn request_kill(&self) {
        let _ = self.events.send(Event::Kill(None));
    }

    /// Halts the vCPUs.
    ///
    /// # Errors
    /// Fails when the machine is stopping or gone.
    pub async fn pause(&self) -> Result<(), RequestError> {
        self.ask(Event::Pause).await
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// Fails when the machine is not paused.
    pub async fn resume(&self) -> Result<(), RequestError> {
        self.ask(Event::Resume).await
    }

    /// Resets the machine.
    ///
    /// # Errors
    /// Fails when the machine is gone or KVM refuses.
    pub async fn reset(&self) -> Result<(), RequestError> {
        self.ask(Event::Reset).await
    }

    /// Presses the power button and gives the timeout that counts.
    ///
    /// # Errors
    /// Fails when the machine is gone.
    pub async fn stop(&self, timeout: Option<Duration>) -> Result<Duration, RequestError> {
        self.ask(|reply| Event::Stop(timeout, Some(reply))).await
    }

    /// Ends the machine by force.
    ///
    /// # Errors
    /// Fails when the machine is gone.
    pub async fn kill(&self) -> Result<(), RequestError> {
        self.ask(|reply| Event::Kill(Some(reply))).await
    }

    async fn ask<T>(&self, event: impl FnOnce(Reply<T>) -> Event) -> Result<T, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.events
            .send(event(reply))
            .map_err(|_| RequestError::Gone)?;
        answer.await.map_err(|_| RequestError::Gone)?
    }
}

/// The mailbox of a machine that is not built yet.
#[derive(Debug)]
pub struct Mailbox {
    sender: mpsc::UnboundedSender<Event>,
    receiver: mpsc::UnboundedReceiver<Event>,
    /// Counts resets. It changes only while no vCPU runs.
    epoch: Arc<AtomicU64>,
}

impl Default for Mailbox {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Mailbox {
            sender,
            receiver,
            epoch: Arc::default(),
        }
    }
}

#[derive(Debug)]
struct GuestRequests {
    events: mpsc::UnboundedSender<Event>,
    epoch: Arc<AtomicU64>,
}

impl MachineControl for GuestRequests {
    fn request(&self, request: MachineRequest) {
        let epoch = self.epoch.load(Ordering::Acquire);
        let _ = self.events.send(Event::Guest(epoch, request));
    }

    fn pause(&self, reason: String) {
        let epoch = self.epoch.load(Ordering::Acquire);
        let _ = self.events.send(Event::Trouble(epoch, reason));
    }
}

impl Mailbox {
    /// Where devices file the guest's requests.
    pub fn control(&self) -> Arc<dyn MachineControl> {
        Arc::new(GuestRequests {
            events: self.sender.clone(),
            epoch: Arc::clone(&self.epoch),
        })
    }

    /// The way to the loop that will take what comes, the end that it takes it from, and the count
    /// of resets.
    pub(super) fn open(
        self,
        status: watch::Receiver<Status>,
    ) -> (Handle, mpsc::UnboundedReceiver<Event>, Arc<AtomicU64>) {
        let handle = Handle {
            events: self.sender,
            status,
        };
        (handle, self.receiver, self.epoch)
    }

    /// Where vCPUs report that they can't go on.
    pub fn vcpu_report(&self) -> crate::kvm::vcpu::Report {
        let (sender, epoch) = (self.sender.clone(), Arc::clone(&self.epoch));
        Arc::new(move |outcome| {
            let epoch = epoch.load(Ordering::Acquire);
            let _ = sender.send(Event::Vcpu(epoch, outcome));
        })
    }
}
