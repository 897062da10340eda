//! The device: what it offers, and its threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use edgevmm_block::BlockBackend;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::IntoBytes;

use super::config::{ConfigSpace, WRITEBACK_OFFSET};
use super::request::{Executor, SERIAL_LEN};
use super::worker::Worker;
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
}

/// What changes while a disk runs. In-flight requests are no part of it: there are none once the
/// device is deactivated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The driver has not turned the write cache off.
    pub writeback: bool,
}

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    config: BlockConfig,
    backend: Arc<dyn BlockBackend>,
    queue_sizes: Vec<u16>,
    features: u64,
    writeback: Arc<AtomicBool>,
    /// The present driver did not accept flush.
    cacheless: bool,
    workers: Vec<Worker>,
    halt: Halt,
}

impl Block {
    /// A disk over `backend`, with its write cache on.
    pub fn new(config: BlockConfig, backend: Arc<dyn BlockBackend>) -> Self {
        let features = offered(&config, &*backend);
        Self {
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues.max(1))],
            config,
            backend,
            features,
            writeback: Arc::new(AtomicBool::new(true)),
            cacheless: false,
            workers: Vec::new(),
            halt: Halt::default(),
        }
    }

    /// The present state.
    pub fn state(&self) -> BlockState {
        BlockState {
            writeback: self.writeback.load(Ordering::Acquire),
        }
    }

    fn executor(&self, features: u64) -> Executor {
        let mut serial = [0; SERIAL_LEN];
        for (slot, byte) in serial.iter_mut().zip(self.config.serial.bytes()) {
            *slot = byte;
        }
        Executor {
            name: self.config.name.as_str().into(),
            backend: self.backend.clone(),
            serial,
            flush: features & (1 << VIRTIO_BLK_F_FLUSH) != 0,
            writeback: self.writeback.clone(),
            discard: features & (1 << VIRTIO_BLK_F_DISCARD) != 0,
            write_zeroes: features & (1 << VIRTIO_BLK_F_WRITE_ZEROES) != 0,
        }
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
            self.backend.size(),
            self.backend.limits(),
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
        let executor = self.executor(activation.features);
        self.cacheless = !executor.flush;
        for queue in activation.queues {
            let name = format!("{}-q{}", self.config.name, queue.index);
            let ring = Ring::new(
                queue,
                activation.memory.clone(),
                activation.notifier.clone(),
                self.halt.clone(),
            );
            match Worker::start(name, ring, executor.clone()) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.deactivate();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.cacheless = false;
        self.halt.set();
        let halt = self.halt.clone();
        self.workers
            .drain(..)
            .filter_map(|worker| worker.stop(&halt))
            .collect()
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Release);
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(self.state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        self.writeback.store(state.writeback, Ordering::Release);
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.deactivate();
    }
}
