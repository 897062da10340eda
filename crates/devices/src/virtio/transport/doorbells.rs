//! The queues' doorbells: writes to the notification region that reach a device by eventfd.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::{NOTIFY, NOTIFY_STRIDE};
use crate::platform::Doorbells;

/// The doorbells of a function's queues.
///
/// A doorbell that can't be attached still works, by way of an exit: see [`QueueDoorbells::ring`].
#[derive(Debug)]
pub(super) struct QueueDoorbells {
    registry: Arc<dyn Doorbells>,
    kicks: Vec<Arc<EventFd>>,
    /// Address and queue of each that is attached.
    attached: Vec<(u64, usize)>,
    /// Where the BAR was when they were attached.
    base: Option<u64>,
    /// A failure was logged; the guest could repeat it without end.
    complained: bool,
}

impl QueueDoorbells {
    pub(super) fn new(registry: Arc<dyn Doorbells>, queues: usize) -> io::Result<Self> {
        let kick = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        Ok(Self {
            registry,
            kicks: std::iter::repeat_with(kick)
                .take(queues)
                .collect::<io::Result<_>>()?,
            attached: Vec::new(),
            base: None,
            complained: false,
        })
    }

    /// The event of queue `index`.
    pub(super) fn kick(&self, index: u16) -> Option<&Arc<EventFd>> {
        self.kicks.get(usize::from(index))
    }

    /// Signals queue `index` as its doorbell does.
    pub(super) fn ring(&self, index: usize) {
        if let Some(kick) = self.kicks.get(index) {
            // Fails only when the counter is full, and then the event is signalled anyway.
            let _ = kick.write(1);
        }
    }

    /// Attaches the doorbells of those queues that are `wanted` for a BAR at `base`; with no base
    /// detaches them all.
    pub(super) fn place(&mut self, base: Option<u64>, wanted: impl Fn(usize) -> bool) {
        if base == self.base {
            return;
        }
        for (address, index) in std::mem::take(&mut self.attached) {
            if let Some(kick) = self.kicks.get(index)
                && let Err(error) = self.registry.detach(address, kick)
            {
                self.complain("detach", &error);
            }
        }
        self.base = base;
        let Some(base) = base else {
            return;
        };
        let mut address = base.saturating_add(NOTIFY.offset.into());
        for index in 0..self.kicks.len() {
            if wanted(index)
                && let Some(kick) = self.kicks.get(index)
            {
                match self.registry.attach(address, kick) {
                    Ok(()) => self.attached.push((address, index)),
                    Err(error) => self.complain("attach", &error),
                }
            }
            address = address.saturating_add(NOTIFY_STRIDE.into());
        }
    }

    fn complain(&mut self, what: &str, error: &io::Error) {
        if !self.complained {
            self.complained = true;
            tracing::warn!(%error, "failed to {what} a virtio doorbell");
        }
    }
}
