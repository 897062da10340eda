//! A machine's life from the first instruction to the end: one loop takes requests from the
//! guest, the API and signals, one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use edgevmm_api::{ExitReason, ExitRecord};
use edgevmm_devices::platform::{MachineControl, MachineRequest};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::kvm::vcpu::Outcome;
use crate::machine::Machine;

/// The power button is pressed again this often while a stop waits: a guest that was still in its
/// boot loader at the first press has an operating system by a later one.
const PRESS_AGAIN: Duration = Duration::from_secs(10);

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

type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// Something that the loop takes up.
#[derive(Debug)]
enum Event {
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
    fn answer_at_the_end(self, stop_timeout: Duration) {
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

    /// Where vCPUs report that they can't go on.
    pub fn vcpu_report(&self) -> crate::kvm::vcpu::Report {
        let (sender, epoch) = (self.sender.clone(), Arc::clone(&self.epoch));
        Arc::new(move |outcome| {
            let epoch = epoch.load(Ordering::Acquire);
            let _ = sender.send(Event::Vcpu(epoch, outcome));
        })
    }
}

/// A running machine and its loop.
#[derive(Debug)]
pub struct Life {
    machine: Machine,
    events: mpsc::UnboundedReceiver<Event>,
    epoch: Arc<AtomicU64>,
    status: watch::Sender<Status>,
    stop_timeout: Duration,
    /// When a stop becomes a kill, and when the button is pressed again.
    deadline: Option<(Instant, Instant)>,
}

/// How a machine goes on after an event.
enum Next {
    Go,
    End(ExitRecord),
}

impl Life {
    /// The life of `machine`, whose devices and vCPUs report to `mailbox`.
    pub fn new(machine: Machine, mailbox: Mailbox, stop_timeout: Duration) -> (Life, Handle) {
        let (status, watcher) = watch::channel(Status {
            phase: Phase::Running,
            trouble: None,
            resets: 0,
            started: SystemTime::now(),
            since: Instant::now(),
            exit: None,
        });
        let handle = Handle {
            events: mailbox.sender,
            status: watcher,
        };
        let life = Life {
            machine,
            events: mailbox.receiver,
            epoch: mailbox.epoch,
            status,
            stop_timeout,
            deadline: None,
        };
        (life, handle)
    }

    /// Lets the guest run to its end and tears the machine down: no vCPU runs and all disks are
    /// flushed when this returns.
    pub async fn run(mut self) -> ExitRecord {
        // Without the signal a helper's end shows by its effect only.
        let mut children = signal(SignalKind::child()).ok();
        self.machine.resume();
        let record = loop {
            let next = tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.take(event),
                    None => Next::End(ExitRecord::now(ExitReason::Killed, "")),
                },
                () = sleep_until(self.deadline) => self.deadline_passed(),
                () = child_ended(children.as_mut()) => {
                    self.machine.check_helpers();
                    Next::Go
                }
            };
            if let Next::End(record) = next {
                break record;
            }
        };
        self.enter(Phase::Stopping);
        let Life {
            machine,
            mut events,
            status,
            stop_timeout,
            ..
        } = self;
        // Storage may take its time over the last flush; callers are answered meanwhile.
        let mut end = tokio::task::spawn_blocking(|| machine.shut_down());
        let flushed = loop {
            tokio::select! {
                flushed = &mut end => break flushed,
                Some(event) = events.recv() => event.answer_at_the_end(stop_timeout),
            }
        };
        let record = match flushed {
            Ok(Ok(())) => record,
            Ok(Err(message)) => ExitRecord::now(ExitReason::VmmError, message),
            Err(error) => ExitRecord::now(
                ExitReason::VmmError,
                format!("The last writes may be lost: {error}"),
            ),
        };
        status.send_modify(|status| {
            status.phase = Phase::Stopped;
            status.exit = Some(record.clone());
        });
        record
    }

    fn take(&mut self, event: Event) -> Next {
        match event {
            Event::Guest(epoch, _) | Event::Vcpu(epoch, _) | Event::Trouble(epoch, _)
                if epoch != self.epoch.load(Ordering::Acquire) =>
            {
                Next::Go
            }
            Event::Guest(_, MachineRequest::PowerOff) | Event::Vcpu(_, Outcome::PowerOff) => {
                Next::End(ExitRecord::now(ExitReason::PowerOff, ""))
            }
            Event::Guest(_, MachineRequest::Reset) | Event::Vcpu(_, Outcome::Reset) => {
                self.reset().1
            }
            Event::Vcpu(_, Outcome::Crash(report)) => {
                Next::End(ExitRecord::now(ExitReason::GuestCrash, report.to_string()))
            }
            Event::Vcpu(_, Outcome::Failed(message)) => {
                Next::End(ExitRecord::now(ExitReason::VmmError, message))
            }
            Event::Trouble(_, reason) => {
                self.wait_for_help(reason);
                Next::Go
            }
            Event::Pause(reply) => {
                let _ = reply.send(self.pause());
                Next::Go
            }
            Event::Resume(reply) => {
                let _ = reply.send(self.resume());
                Next::Go
            }
            Event::Reset(reply) => {
                let (result, next) = self.reset();
                let _ = reply.send(result);
                next
            }
            Event::Stop(timeout, reply) => {
                let timeout = self.stop(timeout);
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(timeout));
                }
                Next::Go
            }
            Event::Kill(reply) => {
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(()));
                }
                Next::End(ExitRecord::now(ExitReason::Killed, ""))
            }
        }
    }

    fn phase(&self) -> Phase {
        self.status.borrow().phase
    }

    fn enter(&self, phase: Phase) {
        self.status.send_modify(|status| status.phase = phase);
    }

    fn pause(&self) -> Result<(), RequestError> {
        match self.phase() {
            Phase::Running => {
                self.machine.pause();
                self.enter(Phase::Paused);
                Ok(())
            }
            Phase::Paused => Ok(()),
            Phase::Stopping => Err(RequestError::Phase("stopping")),
            Phase::Stopped => Err(RequestError::Gone),
        }
    }

    /// Halts a guest that can't go on. One that is stopping runs on: it may power off without what
    /// it waits for, and there is a deadline.
    fn wait_for_help(&self, reason: String) {
        if self.phase() == Phase::Running {
            self.machine.pause();
            self.enter(Phase::Paused);
        }
        tracing::warn!(%reason, "The machine waits; mend it, then have the machine go on");
        self.status.send_modify(|status| {
            status.trouble.get_or_insert(reason);
        });
    }

    fn forget_trouble(&self) {
        self.status.send_modify(|status| status.trouble = None);
    }

    fn resume(&self) -> Result<(), RequestError> {
        match self.phase() {
            Phase::Paused => {
                self.forget_trouble();
                self.machine.resume();
                self.enter(Phase::Running);
                Ok(())
            }
            Phase::Running => Err(RequestError::Phase("not paused")),
            Phase::Stopping if self.status.borrow().trouble.is_some() => {
                self.forget_trouble();
                self.machine.resume();
                Ok(())
            }
            Phase::Stopping => Err(RequestError::Phase("stopping")),
            Phase::Stopped => Err(RequestError::Gone),
        }
    }

    fn reset(&mut self) -> (Result<(), RequestError>, Next) {
        self.machine.pause();
        // A guest may ask several times, or crash while it waits: that was the guest before.
        self.epoch.fetch_add(1, Ordering::AcqRel);
        if let Err(error) = self.machine.reset() {
            let message = format!("Can't reset the machine: {error}");
            let record = ExitRecord::now(ExitReason::VmmError, message.clone());
            return (Err(RequestError::Failed(message)), Next::End(record));
        }
        self.status.send_modify(|status| {
            status.resets += 1;
            // What the device waited for was the guest's before the reset.
            status.trouble = None;
        });
        if self.phase() != Phase::Paused {
            self.machine.resume();
        }
        (Ok(()), Next::Go)
    }

    /// A paused guest could not react to its power button, so it goes on first.
    fn stop(&mut self, timeout: Option<Duration>) -> Duration {
        let timeout = timeout.unwrap_or(self.stop_timeout);
        let now = Instant::now();
        let far = Duration::from_secs(u64::from(u32::MAX));
        self.deadline = Some((now + timeout.min(far), now + PRESS_AGAIN));
        if self.phase() == Phase::Paused {
            self.forget_trouble();
            self.machine.resume();
        }
        self.enter(Phase::Stopping);
        self.machine.press_power_button();
        timeout
    }

    fn deadline_passed(&mut self) -> Next {
        let Some((end, press)) = &mut self.deadline else {
            return Next::Go;
        };
        let now = Instant::now();
        if now >= *end {
            let message = "The guest did not power off in time";
            return Next::End(ExitRecord::now(ExitReason::StopTimeout, message));
        }
        if now >= *press {
            *press = now + PRESS_AGAIN;
            self.machine.press_power_button();
        }
        Next::Go
    }
}

async fn sleep_until(deadline: Option<(Instant, Instant)>) {
    match deadline {
        Some((end, press)) => tokio::time::sleep_until(end.min(press).into()).await,
        None => std::future::pending().await,
    }
}

async fn child_ended(children: Option<&mut Signal>) {
    match children {
        Some(children) => {
            children.recv().await;
        }
        None => std::future::pending().await,
    }
}
