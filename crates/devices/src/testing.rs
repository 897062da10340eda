//! A machine of plain memory for the unit tests of devices.

#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "each device's tests use a part of it")]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, RemoteEndpoint, SubscriberId};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::bus::lock;
use crate::platform::{
    DeviceLoop, Doorbells, IrqLine, LoopHandler, MachineControl, MachineRequest, MsiMessage,
    MsiVectors, Platform,
};
use crate::virtio::{DriverError, Notifier};

/// How long a test waits for another thread before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// `len` bytes of guest memory from address 0.
pub(crate) fn guest_memory(len: usize) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap())
}

/// The parts of a [`Platform`], for tests to look at.
#[derive(Debug)]
pub(crate) struct TestMachine {
    pub(crate) doorbells: Arc<MockDoorbells>,
    pub(crate) device_loop: Arc<TestLoop>,
    pub(crate) control: Arc<MockControl>,
}

impl TestMachine {
    pub(crate) fn new() -> Self {
        Self {
            doorbells: Arc::default(),
            device_loop: Arc::new(TestLoop::new()),
            control: Arc::default(),
        }
    }

    pub(crate) fn platform(&self) -> Platform {
        Platform {
            doorbells: self.doorbells.clone(),
            device_loop: self.device_loop.clone(),
            control: self.control.clone(),
        }
    }
}

/// What a [`MockNotifier`] was told.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Notifications {
    /// Interrupts by queue index.
    pub(crate) queues: BTreeMap<u16, u32>,
    pub(crate) config: u32,
    /// Text of each cause of a wanted reset.
    pub(crate) needs_reset: Vec<String>,
}

/// Records notifications; other threads' can be waited for.
#[derive(Debug, Default)]
pub(crate) struct MockNotifier {
    log: Mutex<Notifications>,
    changed: Condvar,
}

impl MockNotifier {
    pub(crate) fn log(&self) -> Notifications {
        lock(&self.log).clone()
    }

    /// Waits until `done` holds for what was recorded, and returns that.
    pub(crate) fn wait(&self, mut done: impl FnMut(&Notifications) -> bool) -> Notifications {
        let (log, timeout) = self
            .changed
            .wait_timeout_while(lock(&self.log), PATIENCE, |log| !done(log))
            .unwrap();
        assert!(!timeout.timed_out(), "only got {log:?}");
        log.clone()
    }

    /// Waits until queue `index` was interrupted `count` times in all.
    pub(crate) fn wait_queue(&self, index: u16, count: u32) -> Notifications {
        self.wait(|log| log.queues.get(&index).is_some_and(|n| *n >= count))
    }

    fn record(&self, change: impl FnOnce(&mut Notifications)) {
        change(&mut lock(&self.log));
        self.changed.notify_all();
    }
}

impl Notifier for MockNotifier {
    fn queue(&self, index: u16) {
        self.record(|log| *log.queues.entry(index).or_default() += 1);
    }

    fn config(&self) {
        self.record(|log| log.config += 1);
    }

    fn needs_reset(&self, cause: &DriverError) {
        self.record(|log| log.needs_reset.push(cause.to_string()));
    }
}

/// One vector of [`MockMsi`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MockVector {
    pub(crate) message: Option<MsiMessage>,
    pub(crate) pending: bool,
    /// Interrupts that reached the guest.
    pub(crate) delivered: u32,
    /// Calls of [`MsiVectors::route`].
    pub(crate) routed: u32,
}

/// MSI vectors that count what is delivered.
#[derive(Debug)]
pub(crate) struct MockMsi(Mutex<Vec<MockVector>>);

impl MockMsi {
    pub(crate) fn new(vectors: u16) -> Self {
        Self(Mutex::new(vec![MockVector::default(); vectors.into()]))
    }

    pub(crate) fn vector(&self, vector: u16) -> MockVector {
        lock(&self.0)[usize::from(vector)]
    }
}

impl MsiVectors for MockMsi {
    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let vector = &mut lock(&self.0)[usize::from(vector)];
        vector.routed += 1;
        vector.message = message;
        if message.is_some() && vector.pending {
            vector.pending = false;
            vector.delivered += 1;
        }
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        let vector = &mut lock(&self.0)[usize::from(vector)];
        if vector.message.is_some() {
            vector.delivered += 1;
        } else {
            vector.pending = true;
        }
    }

    fn pending(&self, vector: u16) -> bool {
        lock(&self.0)[usize::from(vector)].pending
    }

    fn clear(&self, vector: u16) {
        lock(&self.0)[usize::from(vector)].pending = false;
    }
}

/// An interrupt line that remembers its level and counts its rises.
#[derive(Default)]
pub(crate) struct MockIrq {
    level: AtomicBool,
    rises: AtomicU32,
    before_lowering: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl MockIrq {
    pub(crate) fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub(crate) fn rises(&self) -> u32 {
        self.rises.load(Ordering::SeqCst)
    }

    /// Lets `other` happen just before the line is lowered next, as if on another thread.
    pub(crate) fn before_next_lowering(&self, other: impl FnOnce() + Send + 'static) {
        *lock(&self.before_lowering) = Some(Box::new(other));
    }
}

impl fmt::Debug for MockIrq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MockIrq").field(&self.level).finish()
    }
}

impl IrqLine for MockIrq {
    fn set_level(&self, asserted: bool) {
        if !asserted {
            let other = lock(&self.before_lowering).take();
            if let Some(other) = other {
                other();
            }
        }
        if !self.level.swap(asserted, Ordering::SeqCst) && asserted {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Doorbells that a test rings by address.
#[derive(Debug, Default)]
pub(crate) struct MockDoorbells {
    attached: Mutex<BTreeMap<u64, EventFd>>,
    refuse: AtomicBool,
}

impl MockDoorbells {
    /// Addresses with a doorbell, rising.
    pub(crate) fn addresses(&self) -> Vec<u64> {
        lock(&self.attached).keys().copied().collect()
    }

    /// Does what a guest's write to `address` does; false where no doorbell is.
    pub(crate) fn ring(&self, address: u64) -> bool {
        let attached = lock(&self.attached);
        let Some(event) = attached.get(&address) else {
            return false;
        };
        event.write(1).unwrap();
        true
    }

    /// Makes every further [`Doorbells::attach`] fail.
    pub(crate) fn refuse(&self) {
        self.refuse.store(true, Ordering::SeqCst);
    }
}

impl Doorbells for MockDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let event = event.try_clone()?;
        match lock(&self.attached).entry(address) {
            Entry::Vacant(free) => {
                free.insert(event);
                Ok(())
            }
            Entry::Occupied(_) => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn detach(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        match lock(&self.attached).remove(&address) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Records what was asked of the machine.
#[derive(Debug, Default)]
pub(crate) struct MockControl {
    requests: Mutex<Vec<MachineRequest>>,
    pauses: Mutex<Vec<String>>,
    paused: Condvar,
}

impl MockControl {
    pub(crate) fn requests(&self) -> Vec<MachineRequest> {
        lock(&self.requests).clone()
    }

    /// Waits until the machine was asked to pause `count` times in all, and returns the reasons.
    pub(crate) fn wait_pauses(&self, count: usize) -> Vec<String> {
        let (pauses, timeout) = self
            .paused
            .wait_timeout_while(lock(&self.pauses), PATIENCE, |pauses| pauses.len() < count)
            .unwrap();
        assert!(!timeout.timed_out(), "only got {pauses:?}");
        pauses.clone()
    }

    pub(crate) fn pauses(&self) -> usize {
        lock(&self.pauses).len()
    }
}

impl MachineControl for MockControl {
    fn request(&self, request: MachineRequest) {
        lock(&self.requests).push(request);
    }

    fn pause(&self, reason: String) {
        lock(&self.pauses).push(reason);
        self.paused.notify_all();
    }
}

/// A real device thread; it ends with this value.
pub(crate) struct TestLoop {
    endpoint: RemoteEndpoint<LoopHandler>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for TestLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestLoop").finish_non_exhaustive()
    }
}

impl TestLoop {
    pub(crate) fn new() -> Self {
        let mut manager = EventManager::<LoopHandler>::new().unwrap();
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                manager.run().unwrap();
            }
        });
        Self {
            endpoint,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for TestLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.endpoint.kick().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl DeviceLoop for TestLoop {
    fn add(&self, handler: LoopHandler) -> io::Result<SubscriberId> {
        self.endpoint
            .call_blocking(|ops| Ok::<_, event_manager::Error>(ops.add_subscriber(handler)))
            .map_err(io::Error::other)
    }

    fn remove(&self, id: SubscriberId) -> io::Result<()> {
        self.endpoint
            .call_blocking(move |ops| ops.remove_subscriber(id).map(drop))
            .map_err(io::Error::other)
    }
}
