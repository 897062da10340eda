//! A machine's life from the first instruction to the end: one loop takes requests from the
//! guest, the API and signals, one after the other.

mod handle;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use edgevmm_api::{ExitReason, ExitRecord};
use edgevmm_config::{PanicAction, VmConfig, WatchdogAction};
use edgevmm_devices::bus::lock;
use edgevmm_devices::legacy::boot_port::BootPhase;
use edgevmm_devices::platform::MachineRequest;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use handle::{Event, Reply};
pub use handle::{Handle, Mailbox, Phase, RequestError, Status};

use crate::kvm::vcpu::Outcome;
use crate::machine::Machine;

/// The power button is pressed again this often while a stop waits: a guest that was still in its
/// boot loader at the first press has an operating system by a later one.
const PRESS_AGAIN: Duration = Duration::from_secs(10);

/// How long a machine that is to end by force is waited for: what holds it up is storage of the host
/// that does not answer. Whoever kills by `edgevmm kill` waits for a minute.
const PATIENCE: Duration = Duration::from_secs(50);

/// What is to be done when something happens to a guest.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Between the power button and the end by force.
    pub stop_timeout: Duration,
    /// When its kernel has panicked.
    pub on_panic: PanicAction,
    /// When its watchdog has run out.
    pub on_watchdog: WatchdogAction,
}

impl From<&VmConfig> for Terms {
    fn from(config: &VmConfig) -> Self {
        Self {
            stop_timeout: Duration::from_secs(u64::from(config.stop_timeout)),
            on_panic: config.on_panic,
            on_watchdog: config.watchdog.unwrap_or_default().action,
        }
    }
}

/// A running machine and its loop.
///
/// What waits for vCPUs or devices is done by another thread while the loop waits for it: they may
/// be held up by the host's storage. One such work goes on at a time.
#[derive(Debug)]
pub struct Life {
    machine: Arc<Mutex<Machine>>,
    events: mpsc::UnboundedReceiver<Event>,
    /// What came while a work went on.
    waiting: VecDeque<Event>,
    epoch: Arc<AtomicU64>,
    status: watch::Sender<Status>,
    terms: Terms,
    /// When a stop becomes a kill, and when the button is pressed again.
    deadline: Option<(Instant, Instant)>,
    /// What was told of this run of the guest.
    told: Vec<&'static str>,
}

/// How a machine goes on after an event.
enum Next {
    Go,
    End(ExitRecord),
    /// Leave the machine as it is: what is to be done to it does not end.
    GiveUp,
}

/// Something done to the machine does not end, and there was no more waiting for it.
#[derive(Debug, Clone, Copy)]
struct GivenUp;

impl From<GivenUp> for Next {
    fn from(_: GivenUp) -> Self {
        Next::GiveUp
    }
}

/// How a machine ended that could not be taken apart.
fn given_up() -> ExitRecord {
    let message = format!(
        "The host's storage has not answered within {} seconds of the forced end: what the guest \
         wrote last may be lost",
        PATIENCE.as_secs()
    );
    ExitRecord::now(ExitReason::VmmError, message)
}

impl Life {
    /// The life of `machine`, whose devices and vCPUs report to `mailbox`.
    pub fn new(machine: Machine, mailbox: Mailbox, terms: Terms) -> (Life, Handle) {
        let (status, watcher) = watch::channel(Status {
            phase: Phase::Running,
            trouble: None,
            resets: 0,
            started: SystemTime::now(),
            since: Instant::now(),
            exit: None,
        });
        let (handle, events, epoch) = mailbox.open(watcher);
        let life = Life {
            machine: Arc::new(Mutex::new(machine)),
            events,
            waiting: VecDeque::new(),
            epoch,
            status,
            terms,
            deadline: None,
            told: Vec::new(),
        };
        (life, handle)
    }

    /// Lets the guest run to its end and tears the machine down: no vCPU runs and all disks are
    /// flushed when this returns, unless the host's storage held that up and force was asked for.
    pub async fn run(mut self) -> ExitRecord {
        // Without the signal a helper's end shows by its effect only.
        let mut children = signal(SignalKind::child()).ok();
        lock(&self.machine).resume();
        let next = loop {
            let alarm = self.deadline.map(|(end, press)| end.min(press));
            let next = tokio::select! {
                event = self.next_event() => self.take(event).await,
                () = sleep_until(alarm) => self.deadline_passed(),
                () = child_ended(children.as_mut()) => {
                    lock(&self.machine).check_helpers();
                    Next::Go
                }
            };
            if !matches!(next, Next::Go) {
                break next;
            }
        };
        self.enter(Phase::Stopping);
        self.answer_waiting();
        let Life {
            machine,
            events,
            status,
            terms,
            ..
        } = self;
        let record = match next {
            Next::End(record) => shut_down(machine, events, terms.stop_timeout, record).await,
            Next::Go | Next::GiveUp => given_up(),
        };
        status.send_modify(|status| {
            status.phase = Phase::Stopped;
            status.exit = Some(record.clone());
        });
        record
    }

    /// The next event. There is always somebody left who could send one.
    async fn next_event(&mut self) -> Event {
        if let Some(event) = self.waiting.pop_front() {
            return event;
        }
        self.events.recv().await.unwrap_or(Event::Kill(None))
    }

    /// Has another thread work on the machine, and waits for it.
    ///
    /// # Errors
    /// The machine is to end by force, and the work does not.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Machine) -> T + Send + 'static,
    ) -> Result<T, GivenUp> {
        let machine = Arc::clone(&self.machine);
        let mut work = tokio::task::spawn_blocking(move || work(&mut lock(&machine)));
        let mut patience = None;
        loop {
            tokio::select! {
                done = &mut work => return done.map_err(|_| GivenUp),
                Some(event) = self.events.recv() => match event {
                    Event::Kill(reply) => {
                        if let Some(reply) = reply {
                            let _ = reply.send(Ok(()));
                        }
                        if patience.is_none() {
                            patience = Some(after(PATIENCE));
                            self.enter(Phase::Stopping);
                            // It is the next thing to do, if the work ends.
                            self.waiting.push_front(Event::Kill(None));
                        }
                    }
                    event => self.waiting.push_back(event),
                },
                () = sleep_until(patience) => return Err(GivenUp),
            }
        }
    }

    fn answer_waiting(&mut self) {
        for event in self.waiting.drain(..) {
            event.answer_at_the_end(self.terms.stop_timeout);
        }
    }

    async fn take(&mut self, event: Event) -> Next {
        match event {
            Event::Guest(epoch, _) | Event::Vcpu(epoch, _) | Event::Trouble(epoch, _)
                if epoch != self.epoch.load(Ordering::Acquire) =>
            {
                Next::Go
            }
            Event::Guest(_, MachineRequest::PowerOff) | Event::Vcpu(_, Outcome::PowerOff) => {
                Next::End(ExitRecord::now(ExitReason::PowerOff, ""))
            }
            Event::Guest(_, MachineRequest::BootDecided) => self.boot_decided().await,
            // Nobody else runs until the firmware has decided.
            Event::Guest(_, MachineRequest::Reset)
            | Event::Vcpu(_, Outcome::Reset | Outcome::Crash(_))
                if self.boot_report().0 == BootPhase::Looking =>
            {
                self.fall_back("it crashed".to_owned()).await
            }
            Event::Guest(_, MachineRequest::Reset) | Event::Vcpu(_, Outcome::Reset) => {
                self.reset(None).await
            }
            Event::Guest(_, MachineRequest::Panicked) => self.panicked().await,
            Event::Guest(_, MachineRequest::WatchdogExpired) => self.watchdog_expired().await,
            Event::Vcpu(_, Outcome::Crash(report)) => {
                Next::End(ExitRecord::now(ExitReason::GuestCrash, report.to_string()))
            }
            Event::Vcpu(_, Outcome::Failed(message)) => {
                Next::End(ExitRecord::now(ExitReason::VmmError, message))
            }
            Event::Trouble(_, reason) => self.wait_for_help(reason).await,
            Event::Pause(reply) => self.pause(reply).await,
            Event::Resume(reply) => {
                let _ = reply.send(self.resume());
                Next::Go
            }
            Event::Reset(reply) => self.reset(Some(reply)).await,
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

    async fn pause(&mut self, reply: Reply<()>) -> Next {
        let result = match self.phase() {
            Phase::Running => {
                if let Err(given_up) = self.work(|machine| machine.pause()).await {
                    let _ = reply.send(Err(RequestError::Gone));
                    return given_up.into();
                }
                self.enter(Phase::Paused);
                Ok(())
            }
            Phase::Paused => Ok(()),
            Phase::Stopping => Err(RequestError::Phase("stopping")),
            Phase::Stopped => Err(RequestError::Gone),
        };
        let _ = reply.send(result);
        Next::Go
    }

    /// Halts a guest that can't go on. One that is stopping runs on: it may power off without what
    /// it waits for, and there is a deadline.
    async fn wait_for_help(&mut self, reason: String) -> Next {
        tracing::warn!(%reason, "The machine waits; mend it, then have the machine go on");
        self.status.send_modify(|status| {
            status.trouble.get_or_insert(reason);
        });
        if self.phase() == Phase::Running {
            if let Err(given_up) = self.work(|machine| machine.pause()).await {
                return given_up.into();
            }
            self.enter(Phase::Paused);
        }
        Next::Go
    }

    async fn panicked(&mut self) -> Next {
        const WHAT: &str = "The guest's kernel has panicked";
        match self.terms.on_panic {
            PanicAction::Report => self.tell(WHAT),
            PanicAction::Pause => self.wait_for_help(WHAT.to_owned()).await,
            PanicAction::Reset => {
                tracing::warn!("{WHAT}: the machine is reset");
                self.reset(None).await
            }
            PanicAction::End => Next::End(ExitRecord::now(ExitReason::GuestCrash, WHAT)),
        }
    }

    async fn watchdog_expired(&mut self) -> Next {
        const WHAT: &str = "The guest's watchdog has run out";
        match self.terms.on_watchdog {
            WatchdogAction::Report => self.tell(WHAT),
            WatchdogAction::Pause => self.wait_for_help(WHAT.to_owned()).await,
            WatchdogAction::Reset => {
                tracing::warn!("{WHAT}: the machine is reset");
                self.reset(None).await
            }
            WatchdogAction::Shutdown if self.deadline.is_some() => Next::Go,
            WatchdogAction::Shutdown => {
                tracing::warn!("{WHAT}: its power button is pressed");
                self.stop(None);
                Next::Go
            }
            WatchdogAction::End => Next::End(ExitRecord::now(ExitReason::GuestCrash, WHAT)),
        }
    }

    /// Tells what has happened to a guest that goes on. Once in a run: it may have it happen at will.
    fn tell(&mut self, what: &'static str) -> Next {
        if self.told.contains(&what) {
            return Next::Go;
        }
        self.told.push(what);
        tracing::warn!("{what}");
        self.status.send_modify(|status| {
            status.trouble.get_or_insert_with(|| what.to_owned());
        });
        Next::Go
    }

    fn forget_trouble(&self) {
        self.status.send_modify(|status| status.trouble = None);
    }

    fn resume(&self) -> Result<(), RequestError> {
        match self.phase() {
            Phase::Paused => {
                self.forget_trouble();
                lock(&self.machine).resume();
                self.enter(Phase::Running);
                Ok(())
            }
            Phase::Running => Err(RequestError::Phase("not paused")),
            Phase::Stopping if self.status.borrow().trouble.is_some() => {
                self.forget_trouble();
                lock(&self.machine).resume();
                Ok(())
            }
            Phase::Stopping => Err(RequestError::Phase("stopping")),
            Phase::Stopped => Err(RequestError::Gone),
        }
    }

    async fn reset(&mut self, reply: Option<Reply<()>>) -> Next {
        let epoch = Arc::clone(&self.epoch);
        let done = self.work(move |machine| {
            machine.pause();
            // A guest may ask several times, or crash while it waits: that was the guest before.
            epoch.fetch_add(1, Ordering::AcqRel);
            machine.reset()
        });
        let (result, next) = match done.await {
            Ok(Ok(())) => {
                self.begin_again();
                (Ok(()), Next::Go)
            }
            Ok(Err(error)) => {
                let message = format!("Can't reset the machine: {error}");
                let record = ExitRecord::now(ExitReason::VmmError, message.clone());
                (Err(RequestError::Failed(message)), Next::End(record))
            }
            Err(given_up) => (Err(RequestError::Gone), given_up.into()),
        };
        if let Some(reply) = reply {
            let _ = reply.send(result);
        }
        next
    }

    /// What the boot firmware is at, and what it wrote.
    fn boot_report(&self) -> (BootPhase, String) {
        lock(&self.machine).boot_report()
    }

    /// The boot firmware has started a kernel, or leaves that to another one.
    async fn boot_decided(&mut self) -> Next {
        match self.boot_report() {
            (BootPhase::Declined, reason) => self.fall_back(reason).await,
            (BootPhase::Booted, kernel) => {
                tracing::info!("The fast firmware has started {kernel}");
                Next::Go
            }
            (BootPhase::Looking | BootPhase::Closed, _) => Next::Go,
        }
    }

    /// Has the next firmware start the guest, for this `reason`.
    async fn fall_back(&mut self, reason: String) -> Next {
        let epoch = Arc::clone(&self.epoch);
        let done = self.work(move |machine| {
            machine.pause();
            epoch.fetch_add(1, Ordering::AcqRel);
            machine.fall_back()
        });
        match done.await {
            Ok(Ok(next)) => {
                tracing::warn!("The fast firmware leaves the disk to `{next}`: {reason}");
                if self.phase() != Phase::Paused {
                    lock(&self.machine).resume();
                }
                Next::Go
            }
            Ok(Err(error)) => {
                let message = format!("{error}: {reason}");
                Next::End(ExitRecord::now(ExitReason::VmmError, message))
            }
            Err(given_up) => given_up.into(),
        }
    }

    fn begin_again(&mut self) {
        self.told.clear();
        self.status.send_modify(|status| {
            status.resets += 1;
            // What the device waited for was the guest's before the reset.
            status.trouble = None;
        });
        if self.phase() != Phase::Paused {
            lock(&self.machine).resume();
        }
    }

    /// A paused guest could not react to its power button, so it goes on first.
    fn stop(&mut self, timeout: Option<Duration>) -> Duration {
        let timeout = timeout.unwrap_or(self.terms.stop_timeout);
        let now = Instant::now();
        let far = Duration::from_secs(u64::from(u32::MAX));
        self.deadline = Some((now + timeout.min(far), now + PRESS_AGAIN));
        if self.phase() == Phase::Paused {
            self.forget_trouble();
            lock(&self.machine).resume();
        }
        self.enter(Phase::Stopping);
        lock(&self.machine).press_power_button();
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
            lock(&self.machine).press_power_button();
        }
        Next::Go
    }
}

/// Takes a machine apart whose guest has ended. Storage may take its time over the last flush;
/// callers are answered meanwhile.
async fn shut_down(
    machine: Arc<Mutex<Machine>>,
    mut events: mpsc::UnboundedReceiver<Event>,
    stop_timeout: Duration,
    record: ExitRecord,
) -> ExitRecord {
    let mut end = tokio::task::spawn_blocking(move || lock(&machine).shut_down());
    let by_force = matches!(record.reason, ExitReason::Killed | ExitReason::StopTimeout);
    let mut patience = by_force.then(|| after(PATIENCE));
    loop {
        tokio::select! {
            flushed = &mut end => return match flushed {
                Ok(Ok(())) => record,
                Ok(Err(message)) => ExitRecord::now(ExitReason::VmmError, message),
                Err(error) => ExitRecord::now(
                    ExitReason::VmmError,
                    format!("The last writes may be lost: {error}"),
                ),
            },
            Some(event) = events.recv() => {
                if matches!(event, Event::Kill(_)) {
                    patience.get_or_insert_with(|| after(PATIENCE));
                }
                event.answer_at_the_end(stop_timeout);
            }
            () = sleep_until(patience) => return given_up(),
        }
    }
}

fn after(duration: Duration) -> Instant {
    Instant::now() + duration
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
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
