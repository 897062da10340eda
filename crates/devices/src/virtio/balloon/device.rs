//! The device: what it offers, and what the host asks of it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::discard::PAGE;
use super::handler::{Handler, Role};
use super::stats::GuestMemoryStats;
use crate::bus::lock;
use crate::platform::DeviceLoop;
use crate::state::StateError;
use crate::virtio::on_loop::OnLoop;
use crate::virtio::ring::{Halt, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, Notifier, VirtioDevice, config_space};

/// VIRTIO_BALLOON_F_STATS_VQ.
const STATS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_POISON.
const PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const REPORTING: u64 = 1 << 5;

/// Linux does not report pages by a queue of less than 32.
const QUEUE_SIZES: [u16; 4] = [128, 128, 64, 64];

/// Fields that a driver writes.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

/// What changes while a balloon is used, apart from its queues. Counts of what went back to the
/// host are no part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest is asked to do without.
    pub wanted: u32,
    /// Pages that it does without, as it says.
    pub actual: u32,
    /// What the guest fills free pages with.
    pub poison: u32,
}

/// How a balloon is used, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonUse {
    /// Whether the guest has a driver for it.
    pub driver: bool,
    /// What the guest is asked to do without.
    pub wanted: u64,
    /// What it does without, as it says.
    pub actual: u64,
    /// What went back to the host by inflating, in all.
    pub inflated: u64,
    /// What went back to the host as the guest reported it free, in all.
    pub reported: u64,
}

/// Statistics, and how often they were told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub stats: GuestMemoryStats,
    pub generation: u64,
}

/// What the device, its handler and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    wanted: AtomicU32,
    actual: AtomicU32,
    pub poison: AtomicU32,
    pub inflated: AtomicU64,
    pub reported: AtomicU64,
    pub stats: Mutex<Told>,
    /// The statistics that wait are to be renewed.
    pub renew: AtomicBool,
    pub stats_wanted: EventFd,
    /// The driver, if there is one.
    notifier: Mutex<Option<Arc<dyn Notifier>>>,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ConfigSpace {
    wanted: U32,
    actual: U32,
    free_page_hint: U32,
    poison: U32,
}

/// The host's way to a balloon, from any thread.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to do without `bytes` of its memory, rounded down to pages.
    pub fn ask(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE as u64).unwrap_or(u32::MAX);
        if self.0.wanted.swap(pages, Ordering::AcqRel) == pages {
            return;
        }
        if let Some(notifier) = &*lock(&self.0.notifier) {
            notifier.config();
        }
    }

    /// How it is used now.
    pub fn usage(&self) -> BalloonUse {
        let bytes = |pages: &AtomicU32| u64::from(pages.load(Ordering::Acquire)) * PAGE as u64;
        BalloonUse {
            driver: lock(&self.0.notifier).is_some(),
            wanted: bytes(&self.0.wanted),
            actual: bytes(&self.0.actual),
            inflated: self.0.inflated.load(Ordering::Relaxed),
            reported: self.0.reported.load(Ordering::Relaxed),
        }
    }

    /// Asks the guest for new statistics. Those before have the number that this returns.
    pub fn renew_stats(&self) -> u64 {
        let generation = lock(&self.0.stats).generation;
        self.0.renew.store(true, Ordering::Release);
        if let Err(error) = self.0.stats_wanted.write(1) {
            tracing::debug!(%error, "Can't ask for statistics");
        }
        generation
    }

    /// The newest statistics and their number; 0 if the guest has never told any.
    pub fn stats(&self) -> (u64, GuestMemoryStats) {
        let told = lock(&self.0.stats);
        (told.generation, told.stats)
    }
}

/// A virtio balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    device_loop: Arc<dyn DeviceLoop>,
    handler: Option<OnLoop<Handler>>,
    halt: Halt,
}

impl Balloon {
    /// An empty balloon that is served on `device_loop`.
    ///
    /// # Errors
    /// There are no more files to be had.
    pub fn new(device_loop: Arc<dyn DeviceLoop>) -> io::Result<Self> {
        let shared = Shared {
            wanted: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            inflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            stats: Mutex::default(),
            renew: AtomicBool::new(false),
            stats_wanted: EventFd::new(EFD_NONBLOCK)?,
            notifier: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            device_loop,
            handler: None,
            halt: Halt::default(),
        })
    }

    /// The host's way to it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }
}

/// What queue `index` is for with the features that the driver took.
fn role(index: u16, features: u64) -> Option<Role> {
    let stats = (features & STATS != 0).then_some(Role::Stats);
    let report = (features & REPORTING != 0).then_some(Role::Report);
    let always = [Role::Inflate, Role::Deflate];
    let mut roles = always.into_iter().chain(stats).chain(report);
    roles.nth(usize::from(index))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_BALLOON).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        RING_FEATURES | STATS | DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let now = |value: &AtomicU32| value.load(Ordering::Acquire).into();
        let space = ConfigSpace {
            wanted: now(&self.shared.wanted),
            actual: now(&self.shared.actual),
            free_page_hint: 0.into(),
            poison: now(&self.shared.poison),
        };
        config_space::read(space.as_bytes(), offset, data);
    }

    fn write_config(&mut self, features: u64, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            ACTUAL => self.shared.actual.store(value, Ordering::Release),
            POISON if features & PAGE_POISON != 0 => {
                self.shared.poison.store(value, Ordering::Release);
            }
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let Activation {
            memory,
            features,
            queues,
            notifier,
        } = activation;
        self.shared.renew.store(false, Ordering::Release);
        let mut handler = Handler::new(Arc::clone(&memory), Arc::clone(&self.shared));
        for queue in queues {
            // One that the features leave out is never served, but goes back with the others.
            let role = role(queue.index, features).unwrap_or(Role::Deflate);
            let (memory, notifier) = (Arc::clone(&memory), Arc::clone(&notifier));
            handler.add(role, Ring::new(queue, memory, notifier, self.halt.clone()));
        }
        let started = OnLoop::start(self.device_loop.clone(), handler);
        self.handler = Some(started.map_err(|(error, _)| error)?);
        *lock(&self.shared.notifier) = Some(notifier);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        *lock(&self.shared.notifier) = None;
        self.halt.set();
        let handler = self.handler.take().and_then(OnLoop::stop);
        handler.map(Handler::into_queues).unwrap_or_default()
    }

    /// A new driver has an empty balloon; what the host asks for stays.
    fn reset(&mut self) {
        self.shared.actual.store(0, Ordering::Release);
        self.shared.poison.store(0, Ordering::Release);
        *lock(&self.shared.stats) = Told::default();
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            wanted: self.shared.wanted.load(Ordering::Acquire),
            actual: self.shared.actual.load(Ordering::Acquire),
            poison: self.shared.poison.load(Ordering::Acquire),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(state) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        self.shared.wanted.store(state.wanted, Ordering::Release);
        self.shared.actual.store(state.actual, Ordering::Release);
        self.shared.poison.store(state.poison, Ordering::Release);
        Ok(())
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.deactivate();
    }
}
