//! A handler on the shared device thread that can be had back.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};

use crate::bus::lock;
use crate::platform::DeviceLoop;

type Slot<T> = Arc<Mutex<Option<T>>>;

/// A `T` that serves events on the device thread.
#[derive(Debug)]
pub(super) struct OnLoop<T> {
    id: SubscriberId,
    slot: Slot<T>,
    device_loop: Arc<dyn DeviceLoop>,
}

/// What the device thread has of it. Only that thread takes the lock until the handler is removed.
struct Handler<T>(Slot<T>);

impl<T: MutEventSubscriber> MutEventSubscriber for Handler<T> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if let Some(inner) = &mut *lock(&self.0) {
            inner.process(events, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(inner) = &mut *lock(&self.0) {
            inner.init(ops);
        }
    }
}

impl<T: MutEventSubscriber + Send + 'static> OnLoop<T> {
    /// Moves `inner` to the device thread.
    ///
    /// # Errors
    /// Gives `inner` back when the device thread is gone.
    pub(super) fn start(
        device_loop: Arc<dyn DeviceLoop>,
        inner: T,
    ) -> Result<Self, (io::Error, Option<T>)> {
        let slot = Arc::new(Mutex::new(Some(inner)));
        match device_loop.add(Box::new(Handler(slot.clone()))) {
            Ok(id) => Ok(Self {
                id,
                slot,
                device_loop,
            }),
            Err(error) => Err((error, lock(&slot).take())),
        }
    }

    /// Takes the handler off the device thread. None is left only if it was taken before.
    pub(super) fn stop(self) -> Option<T> {
        if let Err(error) = self.device_loop.remove(self.id) {
            tracing::error!(%error, "Cannot take a device off the device thread");
        }
        lock(&self.slot).take()
    }
}
