//! The common configuration structure (virtio 1.2, 4.1.4.3).
//!
//! Registers read at any width and alignment; they are written at their own width only, 64-bit
//! ones also by halves. Per-queue reset is not offered.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};

use super::interrupts::Interrupts;
use super::layout::COMMON;
use crate::GuestMemory;
use crate::state::{StateError, ensure, same};
use crate::virtio::{ActiveQueue, DriverError, status};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What the driver set up of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub driver: u64,
    /// Guest-physical address of the used ring.
    pub device: u64,
    /// Position in the available ring when the device was last suspended.
    pub next_avail: u16,
    /// Position in the used ring when the device was last suspended.
    pub next_used: u16,
}

/// State of the common configuration structure, apart from status and vectors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonState {
    /// Which half of the device's features is read.
    pub device_feature_select: u32,
    /// Which half of the driver's features is accessed.
    pub driver_feature_select: u32,
    /// Features that the driver asked for.
    pub driver_features: u64,
    /// Which queue is accessed.
    pub queue_select: u16,
    /// Every queue of the device.
    pub queues: Vec<QueueSetup>,
}

impl CommonState {
    fn new(sizes: &[u16]) -> Self {
        let queue = |size: &u16| QueueSetup {
            size: *size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
        }
    }
}

/// The common configuration structure.
#[derive(Debug)]
pub(super) struct CommonCfg {
    offered: u64,
    max_sizes: Vec<u16>,
    interrupts: Arc<Interrupts>,
    state: CommonState,
}

impl CommonCfg {
    /// `features` are the device's; the transport's are added.
    pub(super) fn new(features: u64, max_sizes: &[u16], interrupts: Arc<Interrupts>) -> Self {
        Self {
            offered: features | VERSION_1,
            max_sizes: max_sizes.to_vec(),
            interrupts,
            state: CommonState::new(max_sizes),
        }
    }

    pub(super) fn reset(&mut self) {
        self.state = CommonState::new(&self.max_sizes);
    }

    pub(super) fn state(&self) -> &CommonState {
        &self.state
    }

    /// Takes up a saved state of a device whose status is up to date. What the queues have for
    /// addresses shows when they are built.
    pub(super) fn restore(&mut self, state: &CommonState) -> Result<(), StateError> {
        let (saved, expected) = (state.queues.len(), self.max_sizes.len());
        same("number of virtio queues", saved, expected)?;
        for (queue, max_size) in state.queues.iter().zip(&self.max_sizes) {
            let fits = queue.size.is_power_of_two() && queue.size <= *max_size;
            ensure(fits, "size of a virtio queue", queue.size)?;
        }
        let negotiated = self.interrupts.status().get() & status::FEATURES_OK != 0;
        let features = state.driver_features;
        if negotiated {
            let missing = features & !self.offered;
            same("set of virtio features that are missing", missing, 0_u64)?;
            let modern = features & VERSION_1 != 0;
            ensure(modern, "set of accepted virtio features", features)?;
        }
        self.state = state.clone();
        Ok(())
    }

    /// The features that the driver asked for.
    pub(super) fn features(&self) -> u64 {
        self.state.driver_features
    }

    /// Whether the driver asked for what it must and for nothing that was not offered.
    pub(super) fn features_acceptable(&self) -> bool {
        let features = self.state.driver_features;
        features & !self.offered == 0 && features & VERSION_1 != 0
    }

    /// Whether queue `index` exists and is enabled.
    pub(super) fn queue_enabled(&self, index: usize) -> bool {
        self.state.queues.get(index).is_some_and(|q| q.enabled)
    }

    /// The enabled queues by index, checked against guest memory.
    pub(super) fn build_queues(
        &self,
        memory: &GuestMemory,
    ) -> Result<Vec<(u16, Queue)>, DriverError> {
        let event_idx = self.state.driver_features & EVENT_IDX != 0;
        let setups = (0..).zip(self.state.queues.iter().zip(&self.max_sizes));
        let mut queues = Vec::new();
        for (index, (setup, max_size)) in setups.filter(|(_, (setup, _))| setup.enabled) {
            let queue = Queue::try_from(QueueState {
                max_size: *max_size,
                next_avail: setup.next_avail,
                next_used: setup.next_used,
                event_idx_enabled: event_idx,
                size: setup.size,
                ready: true,
                desc_table: setup.descriptors,
                avail_ring: setup.driver,
                used_ring: setup.device,
            })
            .map_err(DriverError::Ring)?;
            if !queue.is_valid(memory) {
                return Err(DriverError::Ring(virtio_queue::Error::FindMemoryRegion));
            }
            queues.push((index, queue));
        }
        Ok(queues)
    }

    /// Remembers how far the device came in queues that it gave back.
    pub(super) fn record_positions(&mut self, queues: &[ActiveQueue]) {
        for active in queues {
            if let Some(setup) = self.state.queues.get_mut(usize::from(active.index)) {
                setup.next_avail = active.queue.next_avail();
                setup.next_used = active.queue.next_used();
            }
        }
    }

    /// Reads `data` at `offset` from the structure's start.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = image.iter().skip(start);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn image(&self) -> [u8; COMMON.len as usize] {
        let state = &self.state;
        let select = state.queue_select;
        let status = self.interrupts.status();
        let generation = status.generation().to_le_bytes()[0];
        let queue = state.queues.get(usize::from(select));

        let mut image = [0; COMMON.len as usize];
        let mut put = |offset: usize, bytes: &[u8]| {
            let to = image.iter_mut().skip(offset);
            to.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, state.device_feature_select));
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(state.driver_features, state.driver_feature_select),
        );
        put(0x10, &self.interrupts.config_vector().to_le_bytes());
        let queues = u16::try_from(state.queues.len()).unwrap_or(u16::MAX);
        put(0x12, &queues.to_le_bytes());
        put(0x14, &[status.get(), generation]);
        put(0x16, &select.to_le_bytes());
        put(0x1a, &self.interrupts.queue_vector(select).to_le_bytes());
        if let Some(queue) = queue {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // A queue's notification offset is its index.
            put(0x1e, &select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        }
        image
    }

    /// Writes `data` at `offset` from the structure's start. Returns what the driver wrote to
    /// the status register, which is the transport's to carry out.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<u8> {
        match *data {
            [value] => return (offset == 0x14).then_some(value),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        None
    }

    fn write_u16(&mut self, offset: u64, value: u16) {
        let select = self.state.queue_select;
        let max_size = self.max_sizes.get(usize::from(select)).copied();
        match offset {
            0x10 => self.interrupts.set_config_vector(value),
            0x16 => self.state.queue_select = value,
            0x18 => {
                let fits = value.is_power_of_two() && max_size.is_some_and(|max| value <= max);
                if let Some(queue) = self.queue_in_setup().filter(|_| fits) {
                    queue.size = value;
                }
            }
            0x1a => self.interrupts.set_queue_vector(select, value),
            0x1c => {
                if let Some(queue) = self.queue_in_setup().filter(|_| value == 1) {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.state.device_feature_select = value,
            0x08 => self.state.driver_feature_select = value,
            0x0c => self.write_driver_features(value),
            0x20..0x38 => {
                let Some(queue) = self.queue_in_setup() else {
                    return;
                };
                let address = match offset & !7 {
                    0x20 => &mut queue.descriptors,
                    0x28 => &mut queue.driver,
                    _ => &mut queue.device,
                };
                match offset & 7 {
                    0 => set_half(address, 0, value),
                    4 => set_half(address, 1, value),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        let negotiated = self.interrupts.status().get() & status::FEATURES_OK != 0;
        if !negotiated {
            let select = self.state.driver_feature_select;
            set_half(&mut self.state.driver_features, select, value);
        }
    }

    /// The selected queue while the driver may still set it up.
    fn queue_in_setup(&mut self) -> Option<&mut QueueSetup> {
        let running = self.interrupts.status().get() & status::DRIVER_OK != 0;
        let select = usize::from(self.state.queue_select);
        let queue = self.state.queues.get_mut(select)?;
        (!running && !queue.enabled).then_some(queue)
    }
}

/// The low (0) or high (1) half of `value`; zero for what is beyond.
fn half(value: u64, select: u32) -> [u8; 4] {
    let half = match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    };
    [0, 8, 16, 24].map(|shift| (half >> shift & 0xff) as u8)
}

/// Replaces the low (0) or high (1) half of `value`; ignores what is beyond.
fn set_half(value: &mut u64, select: u32, half: u32) {
    let half = u64::from(half);
    match select {
        0 => *value = *value & !0xffff_ffff | half,
        1 => *value = *value & 0xffff_ffff | half << 32,
        _ => {}
    }
}
