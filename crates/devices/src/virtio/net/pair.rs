//! One pair of queues and its backend, on the device thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::backend::NetBackend;
use super::device::Shared;
use super::rx::{RxProgress, RxQueue};
use super::tx::TxQueue;
use crate::virtio::Notifier;
use crate::virtio::ring::Progress;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const BACKEND: u32 = 2;

/// Serves one pair of queues. Either queue may be one that the driver did not enable.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) index: u16,
    pub(super) rx: Option<RxQueue>,
    pub(super) tx: Option<TxQueue>,
    pub(super) backend: Box<dyn NetBackend>,
    pub(super) shared: Arc<Shared>,
    pub(super) notifier: Arc<dyn Notifier>,
    /// The backend still works.
    alive: bool,
    /// The guest has buffers for a frame that may come.
    rx_open: bool,
    /// The backend could not take a frame, or not all of one.
    tx_waits: bool,
    /// What the backend's descriptor is polled for.
    interest: EventSet,
}

impl Pair {
    pub(super) fn new(
        index: u16,
        backend: Box<dyn NetBackend>,
        shared: Arc<Shared>,
        notifier: Arc<dyn Notifier>,
    ) -> Self {
        Self {
            index,
            rx: None,
            tx: None,
            backend,
            shared,
            notifier,
            alive: true,
            rx_open: false,
            tx_waits: false,
            interest: EventSet::empty(),
        }
    }

    /// Receives, and sends what the guest has to say to it. Were that to wait for its own turn, a
    /// flood from the host would leave it behind, and iPXE for one puts its answers into the ring
    /// without looking whether there is room.
    fn receive(&mut self) -> io::Result<()> {
        let Some(rx) = &mut self.rx else {
            return Ok(());
        };
        if !self.alive || !self.shared.pair_enabled(self.index) {
            self.rx_open = false;
            return Ok(());
        }
        self.rx_open = match rx.receive(&mut *self.backend, &self.shared.stats)? {
            RxProgress::NoFrame | RxProgress::BudgetSpent => true,
            RxProgress::NoBuffers | RxProgress::Halted => false,
        };
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        let Some(tx) = &mut self.tx else {
            return Ok(());
        };
        let progress = tx.send(&mut *self.backend, self.alive, &self.shared.stats)?;
        self.tx_waits = progress == Progress::Blocked || (self.alive && !self.backend.flush()?);
        // Without buffers for it, the driver's next ones bring this about.
        if let Some(rx) = self.rx.as_ref().filter(|_| self.rx_open && self.alive)
            && self.backend.has_own_frame()
        {
            rx.come_again();
        }
        Ok(())
    }

    fn backend_ready(&mut self, ready: EventSet) -> io::Result<()> {
        let hung_up = ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
        if hung_up && !ready.contains(EventSet::IN) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if ready.contains(EventSet::OUT) && self.backend.flush()? {
            self.send()?;
        }
        if ready.contains(EventSet::IN) {
            self.receive()?;
        }
        Ok(())
    }

    /// The backend is gone: the link goes down and frames are lost from here on.
    fn lose_backend(&mut self, error: &io::Error, ops: &mut EventOps<'_>) {
        if !self.alive {
            return;
        }
        tracing::warn!(device = &*self.shared.name, %error, "The host end of the interface is gone");
        self.alive = false;
        self.rx_open = false;
        let fd = self.backend.poll_fd().as_raw_fd();
        if let Err(error) = ops.remove(Events::empty_raw(fd)) {
            tracing::debug!(%error, "The descriptor was not polled");
        }
        self.shared.set_link_down();
        self.notifier.config();
        // Without a backend this can only drop.
        if let Err(error) = self.send() {
            tracing::debug!(%error, "Frames were left unsent");
        }
    }

    /// Polls the backend for what there is use for, and no more, so that nothing spins.
    fn update_interest(&mut self, ops: &mut EventOps<'_>) {
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, self.rx_open);
        interest.set(EventSet::OUT, self.tx_waits);
        if !self.alive || interest == self.interest {
            return;
        }
        let fd = self.backend.poll_fd().as_raw_fd();
        match ops.modify(Events::with_data_raw(fd, BACKEND, interest)) {
            Ok(()) => self.interest = interest,
            Err(error) => self.lose_backend(&io::Error::other(error), ops),
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        // Edges come with every write to an eventfd, read or not, so kicks are never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Some(rx) = &self.rx {
            ops.add(Events::with_data(&**rx.ring.kick(), RX_KICK, edge))?;
        }
        if let Some(tx) = &self.tx {
            ops.add(Events::with_data(&**tx.ring.kick(), TX_KICK, edge))?;
        }
        let fd = self.backend.poll_fd().as_raw_fd();
        ops.add(Events::with_data_raw(fd, BACKEND, self.interest))
    }
}

impl MutEventSubscriber for Pair {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let started = self
            .watch(ops)
            .map_err(io::Error::other)
            .and_then(|()| self.send())
            .and_then(|()| self.receive());
        if let Err(error) = started {
            self.lose_backend(&error, ops);
        }
        self.update_interest(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let done = match events.data() {
            RX_KICK => self.receive(),
            TX_KICK => self.send(),
            _ if self.alive => self.backend_ready(events.event_set()),
            _ => Ok(()),
        };
        if let Err(error) = done {
            self.lose_backend(&error, ops);
        }
        self.update_interest(ops);
    }
}
