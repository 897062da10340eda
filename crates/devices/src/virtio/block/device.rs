//! The device: what it offers, and its threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;

use edgevmm_block::BlockBackend;
use edgevmm_block::engine::Helpers;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::IntoBytes;

use super::config::{ConfigSpace, WRITEBACK_OFFSET};
use super::server::{SERIAL_LEN, Setup};
use super::worker::Worker;
use crate::disk::handle::Shared;
use crate::disk::jobs::Terms;
use crate::disk::limiter::Limiter;
use crate::disk::{Aio, BlockHandle, ErrorPolicy, RateLimits};
use crate::platform::MachineControl;
use crate::state::StateError;
use crate::virtio::ring::{Halt, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice, config_space};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// Data segments of one request: a full queue less the header and the status byte.
const SEG_MAX: u16 = QUEUE_SIZE - 2;

/// What is fixed when a disk is built.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// Name for logs and threads, such as "blk0".
    pub name: String,
    /// Serial number that the guest can read; the first 20 bytes of it.
    pub serial: String,
    /// Queues and threads, at least 1. One per vCPU is the most that makes sense.
    pub queues: u16,
    /// By which means its image is read and written.
    pub aio: Aio,
    /// What to do about requests that the host fails.
    pub error_policy: ErrorPolicy,
    /// How much the guest may ask for in a second.
    pub rate_limits: RateLimits,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            name: "disk".to_owned(),
            serial: String::new(),
            queues: 1,
            aio: Aio::default(),
            error_policy: ErrorPolicy::default(),
            rate_limits: RateLimits::default(),
        }
    }
}

/// What changes while a disk runs. No request is in flight once the device is deactivated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The driver has not turned the write cache off.
    pub writeback: bool,
    /// Requests that the driver waits for and that have to be begun anew: the host has failed
    /// them, or the device stopped amid them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<QueueRequests>,
}

/// Requests of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRequests {
    /// Index of the queue.
    pub queue: u16,
    /// First descriptor of each.
    pub heads: Vec<u16>,
}

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    config: BlockConfig,
    shared: Arc<Shared>,
    helpers: Arc<Helpers>,
    limiter: Option<Arc<Limiter>>,
    control: Arc<dyn MachineControl>,
    queue_sizes: Vec<u16>,
    features: u64,
    writeback: Arc<AtomicBool>,
    kept: Vec<QueueRequests>,
    /// The present driver did not accept flush.
    cacheless: bool,
    /// The host has CPUs for this process to spare while a queue's thread polls.
    polls: bool,
    workers: Vec<Worker>,
    halt: Halt,
}

impl Block {
    /// A disk over `backend`, with its write cache on. It asks `control` to pause the machine when
    /// it can't go on.
    pub fn new(
        config: BlockConfig,
        backend: Arc<dyn BlockBackend>,
        control: Arc<dyn MachineControl>,
    ) -> Self {
        let features = offered(&config, &*backend);
        Self {
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues.max(1))],
            helpers: Arc::new(Helpers::new(&config.name, &backend)),
            limiter: Limiter::new(&config.rate_limits).map(Arc::new),
            config,
            shared: Arc::new(Shared::new(backend)),
            control,
            features,
            writeback: Arc::new(AtomicBool::new(true)),
            kept: Vec::new(),
            cacheless: false,
            polls: available_parallelism().is_ok_and(|cpus| cpus.get() > 1),
            workers: Vec::new(),
            halt: Halt::default(),
        }
    }

    /// The way to this disk once its transport owns it.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle(Arc::clone(&self.shared))
    }

    /// The present state.
    pub fn state(&self) -> BlockState {
        BlockState {
            writeback: self.writeback.load(Ordering::Acquire),
            kept: self.kept.clone(),
        }
    }

    fn setup(&self, activation: &Activation) -> Setup {
        let mut serial = [0; SERIAL_LEN];
        for (slot, byte) in serial.iter_mut().zip(self.config.serial.bytes()) {
            *slot = byte;
        }
        let accepted = |feature: u32| activation.features & (1 << feature) != 0;
        Setup {
            terms: Terms {
                name: self.config.name.as_str().into(),
                backend: Arc::clone(&self.shared.backend),
                helpers: Arc::clone(&self.helpers),
                memory: Arc::clone(&activation.memory),
                aio: self.config.aio,
                limiter: self.limiter.clone(),
                policy: self.config.error_policy,
                control: Arc::clone(&self.control),
                retries: Arc::clone(&self.shared.retries),
            },
            serial,
            flush: accepted(VIRTIO_BLK_F_FLUSH),
            writeback: Arc::clone(&self.writeback),
            discard: accepted(VIRTIO_BLK_F_DISCARD),
            write_zeroes: accepted(VIRTIO_BLK_F_WRITE_ZEROES),
            polls: self.polls,
        }
    }

    /// Takes the requests of queue `index` that were kept.
    fn take_kept(&mut self, index: u16) -> Vec<u16> {
        let place = self.kept.iter().position(|kept| kept.queue == index);
        place.map_or_else(Vec::new, |place| self.kept.swap_remove(place).heads)
    }
}

fn offered(config: &BlockConfig, backend: &dyn BlockBackend) -> u64 {
    let mut features = RING_FEATURES
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    if config.queues > 1 {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    if backend.read_only() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if backend.limits().discard_granularity > 0 {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
    }
    features
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_BLOCK).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = ConfigSpace::new(
            self.shared.backend.size(),
            self.shared.backend.limits(),
            self.config.queues.max(1),
            SEG_MAX,
        );
        let writeback = self.writeback.load(Ordering::Acquire) && !self.cacheless;
        space.writeback = u8::from(writeback);
        config_space::read(space.as_bytes(), offset, data);
    }

    fn write_config(&mut self, features: u64, offset: u64, data: &[u8]) {
        if features & (1 << VIRTIO_BLK_F_CONFIG_WCE) == 0 {
            return;
        }
        if let (WRITEBACK_OFFSET, [value]) = (offset, data) {
            self.writeback.store(*value != 0, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let setup = self.setup(&activation);
        self.cacheless = !setup.flush;
        for queue in activation.queues {
            let name = format!("{}-q{}", self.config.name, queue.index);
            let kept = self.take_kept(queue.index);
            let ring = Ring::new(
                queue,
                activation.memory.clone(),
                activation.notifier.clone(),
                self.halt.clone(),
            );
            match Worker::start(name, ring, setup.clone(), kept) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.deactivate();
                    return Err(error);
                }
            }
        }
        let wakers = self.workers.iter().map(Worker::waker).collect();
        self.shared.activate(Some(activation.notifier), wakers);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.shared.deactivate();
        self.cacheless = false;
        self.halt.set();
        let halt = self.halt.clone();
        let mut queues = Vec::with_capacity(self.workers.len());
        for worker in self.workers.drain(..) {
            let Some(stopped) = worker.stop(&halt) else {
                continue;
            };
            if !stopped.kept.is_empty() {
                self.kept.push(QueueRequests {
                    queue: stopped.queue.index,
                    heads: stopped.kept,
                });
            }
            queues.push(stopped.queue);
        }
        queues
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Release);
        self.kept.clear();
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(self.state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        for kept in &state.kept {
            let queue = usize::from(kept.queue);
            if queue >= self.queue_sizes.len() || kept.heads.len() > usize::from(QUEUE_SIZE) {
                return Err(StateError::Impossible {
                    what: "a disk's queue with pending requests",
                    saved: kept.queue.into(),
                });
            }
        }
        self.kept.clone_from(&state.kept);
        self.writeback.store(state.writeback, Ordering::Release);
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.deactivate();
    }
}
