//! The way to a disk from outside, while it belongs to its transport.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use edgevmm_block::{BlockBackend, BlockError};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Notifier;

/// What a disk shares with its handles.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn BlockBackend>,
    pub(crate) retries: Arc<AtomicU32>,
    active: Mutex<Active>,
}

/// What is there only while the disk is active.
#[derive(Debug, Default)]
struct Active {
    notifier: Option<Arc<dyn Notifier>>,
    wakers: Vec<Arc<EventFd>>,
}

impl Shared {
    pub(crate) fn new(backend: Arc<dyn BlockBackend>) -> Self {
        Self {
            backend,
            retries: Arc::default(),
            active: Mutex::default(),
        }
    }

    /// Its requests are served by whom `wakers` wake. The driver is told of a new size by
    /// `notifier`, where there is a way to do so.
    pub(crate) fn activate(&self, notifier: Option<Arc<dyn Notifier>>, wakers: Vec<Arc<EventFd>>) {
        *self.active() = Active { notifier, wakers };
    }

    pub(crate) fn deactivate(&self) {
        *self.active() = Active::default();
    }

    fn active(&self) -> MutexGuard<'_, Active> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reaches a disk from any thread, whatever that thread holds.
#[derive(Debug, Clone)]
pub struct BlockHandle(pub(crate) Arc<Shared>);

impl BlockHandle {
    /// Tries the requests again that the disk has kept because the host failed them.
    pub fn retry(&self) {
        self.0.retries.fetch_add(1, Ordering::AcqRel);
        for waker in &self.0.active().wakers {
            // A counter this small can't be full.
            let _ = waker.write(1);
        }
    }

    /// Makes the disk larger and tells the driver, where the device has a way to.
    ///
    /// # Errors
    /// As [`BlockBackend::resize`].
    pub fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.0.backend.resize(size)?;
        if let Some(notifier) = &self.0.active().notifier {
            notifier.config();
        }
        Ok(())
    }
}
