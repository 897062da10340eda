//! From the device to the driver: status, ISR, vectors and the interrupt pin
//! (virtio 1.2, 4.1.4.5 and 4.1.5.1).
//!
//! Devices signal from their own threads while a vCPU thread may hold the function's lock and
//! wait for just those threads. So nothing here takes that lock: all of it is atomics, and what
//! configuration space says is read from its memory. The one lock below is the interrupt line's
//! own, which several functions may share; nothing else is taken or waited for under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};

use crate::pci::config_memory::ConfigPage;
use crate::pci::config_space::{COMMAND_INTX_DISABLE, COMMAND_STATUS, STATUS_INTERRUPT};
use crate::pci::msix::MsixControl;
use crate::platform::{IrqLine, MsiVectors};
use crate::state::{StateError, ensure, same};
use crate::virtio::{DriverError, Notifier, SharedStatus, status};

/// No MSI-X vector is assigned.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Every bit of device status.
const STATUS: u8 = status::ACKNOWLEDGE
    | status::DRIVER
    | status::DRIVER_OK
    | status::FEATURES_OK
    | status::DEVICE_NEEDS_RESET
    | status::FAILED;

/// What a function tells its driver, beside the interrupt line and MSI-X.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    /// Device status.
    pub status: u8,
    /// Config generation.
    pub generation: u32,
    /// ISR status.
    pub isr: u8,
    /// MSI-X vector of config changes.
    pub config_vector: u16,
    /// MSI-X vector of each queue.
    pub queue_vectors: Vec<u16>,
}

/// The way of one virtio function to its driver.
#[derive(Debug)]
pub(super) struct Interrupts {
    status: SharedStatus,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    vectors: Arc<dyn MsiVectors>,
    msix: MsixControl,
    line: Arc<dyn IrqLine>,
    page: ConfigPage,
    /// A broken driver was logged; it could break again without end.
    complained: AtomicBool,
}

impl Interrupts {
    pub(super) fn new(
        queues: usize,
        vectors: Arc<dyn MsiVectors>,
        msix: MsixControl,
        line: Arc<dyn IrqLine>,
        page: ConfigPage,
    ) -> Self {
        let unassigned = || AtomicU16::new(NO_VECTOR);
        Self {
            status: SharedStatus::default(),
            isr: AtomicU8::new(0),
            config_vector: unassigned(),
            queue_vectors: std::iter::repeat_with(unassigned).take(queues).collect(),
            vectors,
            msix,
            line,
            page,
            complained: AtomicBool::new(false),
        }
    }

    pub(super) fn status(&self) -> &SharedStatus {
        &self.status
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Assigns a vector to config changes. One that does not exist reads back as none.
    pub(super) fn set_config_vector(&self, vector: u16) {
        let vector = self.existing(vector);
        self.config_vector.store(vector, Ordering::Release);
    }

    /// The vector of queue `index`, none for a queue that does not exist.
    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Assigns a vector to queue `index`. One that does not exist reads back as none.
    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        // One for config changes and one for each queue.
        if usize::from(vector) <= self.queue_vectors.len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// ISR status, unchanged.
    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// The driver reads ISR status: clears it and lowers the line.
    pub(super) fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        if isr != 0 {
            self.sync_line();
        }
        isr
    }

    /// Returns to the state after power-on.
    pub(super) fn reset(&self) {
        self.status.set(0);
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.sync_line();
    }

    pub(super) fn state(&self) -> InterruptState {
        let load = |vector: &AtomicU16| vector.load(Ordering::Acquire);
        InterruptState {
            status: self.status.get(),
            generation: self.status.generation(),
            isr: self.isr(),
            config_vector: self.config_vector(),
            queue_vectors: self.queue_vectors.iter().map(load).collect(),
        }
    }

    /// Takes up a saved state and sets the line. Configuration space has its own by now.
    pub(super) fn restore(&self, state: &InterruptState) -> Result<(), StateError> {
        let bits = state.status;
        let negotiated = bits & status::FEATURES_OK != 0 || bits & status::DRIVER_OK == 0;
        ensure(bits & !STATUS == 0 && negotiated, "virtio status", bits)?;
        let isr = state.isr;
        ensure(isr & !(ISR_QUEUE | ISR_CONFIG) == 0, "ISR status", isr)?;
        let (saved, expected) = (state.queue_vectors.len(), self.queue_vectors.len());
        same("number of virtio queues", saved, expected)?;
        for vector in state.queue_vectors.iter().chain([&state.config_vector]) {
            ensure(self.existing(*vector) == *vector, "MSI-X vector", *vector)?;
        }
        self.status.set(bits);
        self.status.set_generation(state.generation);
        self.isr.store(isr, Ordering::SeqCst);
        self.set_config_vector(state.config_vector);
        for (index, vector) in (0..).zip(&state.queue_vectors) {
            self.set_queue_vector(index, *vector);
        }
        self.sync_line();
        Ok(())
    }

    /// Sets DEVICE_NEEDS_RESET and interrupts a driver that is up.
    pub(super) fn set_needs_reset(&self) {
        self.status.add(status::DEVICE_NEEDS_RESET);
        self.config();
    }

    /// Brings line and STATUS in accord with ISR, MSI-X and COMMAND.
    ///
    /// Two threads may do this at once, for different changes. Whoever set the line last looks
    /// again afterwards, so the line ends up right whatever their order.
    pub(super) fn sync_line(&self) {
        let mut wanted = self.wanted();
        loop {
            let (pending, level) = wanted;
            let bit = if pending { STATUS_INTERRUPT } else { 0 };
            self.page.update(COMMAND_STATUS, STATUS_INTERRUPT, bit);
            self.line.set_level(level);
            let now = self.wanted();
            if now == wanted {
                return;
            }
            wanted = now;
        }
    }

    /// What configuration space says of the pin: whether MSI-X replaces it, and whether it is
    /// disabled.
    pub(super) fn gates(&self) -> (bool, bool) {
        let command = self.page.load(COMMAND_STATUS);
        (self.msix.enabled(), command & COMMAND_INTX_DISABLE != 0)
    }

    /// Whether an interrupt is pending on the pin, and whether the line is to be asserted.
    fn wanted(&self) -> (bool, bool) {
        let (msix, disabled) = self.gates();
        let pending = self.isr() != 0 && !msix;
        (pending, pending && !disabled)
    }

    fn interrupt(&self, cause: u8, vector: u16) {
        if self.msix.enabled() {
            if vector != NO_VECTOR {
                self.vectors.trigger(vector);
            }
            // A polling driver learns of config changes from ISR status all the same.
            self.isr.fetch_or(cause & ISR_CONFIG, Ordering::SeqCst);
        } else if self.isr.fetch_or(cause, Ordering::SeqCst) & cause == 0 {
            self.sync_line();
        }
    }
}

impl Notifier for Interrupts {
    fn queue(&self, index: u16) {
        self.interrupt(ISR_QUEUE, self.queue_vector(index));
    }

    fn config(&self) {
        self.status.bump_generation();
        if self.status.get() & status::DRIVER_OK != 0 {
            self.interrupt(ISR_CONFIG, self.config_vector());
        }
    }

    fn needs_reset(&self, cause: &DriverError) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(%cause, "the guest's virtio driver broke the rules of its device");
        }
        self.set_needs_reset();
    }
}
