//! The device: what it offers, and the handlers of its queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use super::backend::{GuestOffloads, NetBackend};
use super::control::Control;
use super::pair::Pair;
use super::rx::{HEADER, MAX_FRAME, MIN_FRAME, RxQueue};
use super::tx::TxQueue;
use crate::platform::DeviceLoop;
use crate::state::{StateError, ensure};
use crate::virtio::on_loop::OnLoop;
use crate::virtio::ring::{Halt, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice, config_space};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// Chains' worth of slices that a receive queue holds ahead.
const RX_CHAINS: usize = 2;

/// What a backend with headers makes possible.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// What is fixed when an interface is built.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Name for logs, such as "net0".
    pub name: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU that the guest is told to use, 68 or more; the guest's own choice if absent.
    pub mtu: Option<u16>,
}

/// What changes while an interface runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Queue pairs that the driver wants used.
    pub enabled_pairs: u16,
    /// Whether the driver sees the link up.
    pub link_up: bool,
}

/// Counters of an interface since it was built.
#[derive(Debug, Default)]
pub struct NetStats {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

impl NetStats {
    /// Frames and bytes that the guest got.
    pub fn rx(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.rx_frames), load(&self.rx_bytes))
    }

    /// Frames and bytes that the guest sent.
    pub fn tx(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.tx_frames), load(&self.tx_bytes))
    }

    /// Frames lost on the way to the guest and from it: too long, too short, or no host end.
    pub fn dropped(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.rx_dropped), load(&self.tx_dropped))
    }

    pub(super) fn received(&self, bytes: usize) {
        self.rx_frames.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.tx_frames.fetch_add(1, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn rx_dropped(&self) {
        self.rx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn tx_dropped(&self) {
        self.tx_dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the device and its handlers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) stats: Arc<NetStats>,
    link_up: AtomicBool,
    enabled_pairs: AtomicU16,
    max_pairs: u16,
}

impl Shared {
    pub(super) fn pair_enabled(&self, index: u16) -> bool {
        index < self.enabled_pairs.load(Ordering::Acquire)
    }

    /// Uses the first `count` pairs from now on; false if there are not as many.
    pub(super) fn enable_pairs(&self, count: u16) -> bool {
        let valid = (1..=self.max_pairs).contains(&count);
        if valid {
            self.enabled_pairs.store(count, Ordering::Release);
        }
        valid
    }

    pub(super) fn set_link_down(&self) {
        self.link_up.store(false, Ordering::Release);
    }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ConfigSpace {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// A virtio network interface.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    /// One per pair of queues; absent while its handler has it.
    backends: Vec<Option<Box<dyn NetBackend>>>,
    device_loop: Arc<dyn DeviceLoop>,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    features: u64,
    pairs: Vec<OnLoop<Pair>>,
    control: Option<OnLoop<Control>>,
    halt: Halt,
    /// The driver saw the link down when it was saved, and is to be told that it is up here.
    link_untold: bool,
}

impl Net {
    /// An interface with a pair of queues for each of `backends`, of which there is at least one.
    pub fn new(
        config: NetConfig,
        backends: Vec<Box<dyn NetBackend>>,
        device_loop: Arc<dyn DeviceLoop>,
    ) -> Self {
        let max_pairs = u16::try_from(backends.len()).unwrap_or(u16::MAX);
        let several = max_pairs > 1;
        let mut features = RING_FEATURES
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if config.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if backends.iter().all(|backend| backend.vnet_header()) {
            features |= OFFLOADS;
        }
        if several {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        }
        let shared = Shared {
            name: config.name.clone(),
            stats: Arc::default(),
            link_up: AtomicBool::new(true),
            enabled_pairs: AtomicU16::new(1),
            max_pairs,
        };
        Self {
            config,
            queue_sizes: vec![QUEUE_SIZE; 2 * backends.len() + usize::from(several)],
            backends: backends.into_iter().map(Some).collect(),
            device_loop,
            shared: Arc::new(shared),
            features,
            pairs: Vec::new(),
            control: None,
            halt: Halt::default(),
            link_untold: false,
        }
    }

    /// The interface's counters.
    pub fn stats(&self) -> Arc<NetStats> {
        self.shared.stats.clone()
    }

    /// Bytes of the longest frame to expect with its header.
    fn longest(&self, features: u64) -> u64 {
        let large = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        if features & large != 0 {
            return MAX_FRAME as u64;
        }
        // A guest that chooses its MTU itself may choose the largest.
        self.config.mtu.map_or(MAX_FRAME as u64, |mtu| {
            (HEADER + MIN_FRAME + 4 + usize::from(mtu)) as u64
        })
    }

    /// Sorts the queues to pairs and starts a handler for each.
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        if std::mem::take(&mut self.link_untold) {
            activation.notifier.config();
        }
        let features = activation.features;
        let mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let multi = features & (1 << VIRTIO_NET_F_MQ) != 0;
        let longest = self.longest(features);
        if !multi {
            self.shared.enable_pairs(1);
        }
        let pairs = if multi { self.shared.max_pairs } else { 1 };
        let mut handlers: Vec<Pair> = Vec::new();
        let mut control = None;
        let mut rx_kicks = Vec::new();
        for queue in activation.queues {
            let index = queue.index;
            let ring = Ring::new(
                queue,
                activation.memory.clone(),
                activation.notifier.clone(),
                self.halt.clone(),
            );
            let pair = index / 2;
            if pair >= pairs {
                control = Some(ring);
                continue;
            }
            if handlers.last().is_none_or(|last| last.index != pair) {
                let slot = self.backends.get_mut(usize::from(pair));
                let Some(backend) = slot.and_then(Option::take) else {
                    continue;
                };
                let (shared, notifier) = (self.shared.clone(), activation.notifier.clone());
                handlers.push(Pair::new(pair, backend, shared, notifier));
            }
            let Some(handler) = handlers.last_mut() else {
                continue;
            };
            if index.is_multiple_of(2) {
                rx_kicks.push(ring.kick().clone());
                let buffers = ring.new_buffers(RX_CHAINS);
                handler.rx = Some(RxQueue::new(ring, buffers, mergeable, longest));
            } else {
                handler.tx = Some(TxQueue::new(ring));
            }
        }
        for handler in handlers {
            self.start_pair(handler, features)?;
        }
        if let Some(ring) = control {
            let control = Control::new(ring, self.shared.clone(), rx_kicks);
            let started = OnLoop::start(self.device_loop.clone(), control);
            self.control = Some(started.map_err(|(error, _)| error)?);
        }
        Ok(())
    }

    fn start_pair(&mut self, mut pair: Pair, features: u64) -> io::Result<()> {
        let offered = if pair.backend.vnet_header() {
            pair.backend.set_offloads(accepted(features))
        } else {
            Ok(())
        };
        let index = usize::from(pair.index);
        let (error, pair) = match offered {
            Ok(()) => match OnLoop::start(self.device_loop.clone(), pair) {
                Ok(running) => {
                    self.pairs.push(running);
                    return Ok(());
                }
                Err(failed) => failed,
            },
            Err(error) => (error, Some(pair)),
        };
        if let (Some(slot), Some(pair)) = (self.backends.get_mut(index), pair) {
            *slot = Some(pair.backend);
        }
        Err(error)
    }
}

/// What the driver accepted; an offload without the one that it needs counts as refused.
fn accepted(features: u64) -> GuestOffloads {
    let has = |bit: u32| features & (1 << bit) != 0;
    let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
    let tso4 = checksum && has(VIRTIO_NET_F_GUEST_TSO4);
    let tso6 = checksum && has(VIRTIO_NET_F_GUEST_TSO6);
    GuestOffloads {
        checksum,
        tso4,
        tso6,
        ecn: (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN),
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_NET).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let up = self.shared.link_up.load(Ordering::Acquire);
        let status = if up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let space = ConfigSpace {
            mac: self.config.mac,
            status: u16::try_from(status).unwrap_or(0).into(),
            max_virtqueue_pairs: self.shared.max_pairs.into(),
            mtu: self.config.mtu.unwrap_or(0).into(),
        };
        config_space::read(space.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let started = self.start(activation);
        if started.is_err() {
            self.deactivate();
        }
        started
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.halt.set();
        let mut queues = Vec::new();
        for pair in self.pairs.drain(..).filter_map(OnLoop::stop) {
            if let Some(slot) = self.backends.get_mut(usize::from(pair.index)) {
                *slot = Some(pair.backend);
            }
            queues.extend(pair.rx.map(|rx| rx.into_ring().into_queue()));
            queues.extend(pair.tx.map(|tx| tx.ring.into_queue()));
        }
        let control = self.control.take().and_then(OnLoop::stop);
        queues.extend(control.map(|control| control.ring.into_queue()));
        queues
    }

    fn reset(&mut self) {
        self.shared.enable_pairs(1);
        self.link_untold = false;
    }

    fn state(&self) -> DeviceState {
        let up = self.shared.link_up.load(Ordering::Acquire);
        DeviceState::Net(NetState {
            enabled_pairs: self.shared.enabled_pairs.load(Ordering::Acquire),
            link_up: up && !self.link_untold,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(state) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        let enabled = self.shared.enable_pairs(state.enabled_pairs);
        let what = "number of enabled queue pairs";
        ensure(enabled, what, state.enabled_pairs)?;
        self.link_untold = !state.link_up;
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.deactivate();
    }
}
