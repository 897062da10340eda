//! A device that echoes, and a guest's driver that finds it on the bus.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::super::{VirtioPci, VirtioPciConfig};
use crate::GuestMemory;
use crate::bus::{Shared, lock, shared};
use crate::pci::config_memory::SLOT_LEN;
use crate::pci::{PciFunction, PciHost};
use crate::platform::DeviceLoop;
use crate::state::StateError;
use crate::testing::{MockIrq, MockMsi, TestMachine, guest_memory};
use crate::virtio::console::{ConsoleState, TerminalSize};
use crate::virtio::{Activation, ActiveQueue, DeviceState, DriverError, Notifier, VirtioDevice};

pub(super) const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xfec0_0000;
pub(super) const BAR: u64 = 0xc000_4000;
/// EVENT_IDX, INDIRECT and one of the device's own.
pub(super) const FEATURES: u64 = 1 << 29 | 1 << 28 | 1;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const SIZES: [u16; 2] = [16, 8];
const SLOT: u64 = 5;
pub(super) const MEMORY_LEN: usize = 0x10_0000;

/// What the device did, for tests to look at.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) activations: u32,
    pub(super) deactivations: u32,
    pub(super) features: u64,
    /// Index, size, whether EVENT_IDX is set and position of each queue at the last activation.
    pub(super) queues: Vec<(u16, u16, bool, u16)>,
    pub(super) notifier: Option<Arc<dyn Notifier>>,
    /// Makes the next activation fail.
    pub(super) fail: bool,
    pub(super) config: [u8; 8],
    /// Features that came with the last write of `config`.
    pub(super) config_features: u64,
}

/// Gives every buffer back at once, from the device thread.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) log: Shared<Log>,
    device_loop: Arc<dyn DeviceLoop>,
    queues: Shared<Vec<ActiveQueue>>,
    handler: Option<SubscriberId>,
}

struct EchoHandler {
    memory: Arc<GuestMemory>,
    notifier: Arc<dyn Notifier>,
    queues: Shared<Vec<ActiveQueue>>,
}

impl MutEventSubscriber for EchoHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for active in lock(&self.queues).iter() {
            let events = Events::with_data(&*active.kick, active.index.into(), EventSet::IN);
            ops.add(events).unwrap();
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let memory = &*self.memory;
        for active in lock(&self.queues).iter_mut() {
            if u32::from(active.index) != events.data() {
                continue;
            }
            active.kick.read().unwrap();
            if let Err(error) = echo(&mut active.queue, memory, || {
                self.notifier.queue(active.index);
            }) {
                self.notifier.needs_reset(&DriverError::Ring(error));
            }
        }
    }
}

fn echo(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: impl Fn(),
) -> Result<(), virtio_queue::Error> {
    while let Some(chain) = queue.iter(memory)?.next() {
        queue.add_used(memory, chain.head_index(), 0)?;
        interrupt();
    }
    Ok(())
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = lock(&self.log).config;
        let from = config.iter().skip(usize::try_from(offset).unwrap());
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, features: u64, offset: u64, data: &[u8]) {
        let mut log = lock(&self.log);
        log.config_features = features;
        let to = log.config.iter_mut().skip(usize::try_from(offset).unwrap());
        to.zip(data).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let mut log = lock(&self.log);
        if std::mem::take(&mut log.fail) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        log.activations += 1;
        log.features = activation.features;
        log.notifier = Some(activation.notifier.clone());
        let describe = |a: &ActiveQueue| {
            let queue = &a.queue;
            let event_idx = queue.event_idx_enabled();
            (a.index, queue.size(), event_idx, queue.next_avail())
        };
        log.queues = activation.queues.iter().map(describe).collect();
        drop(log);

        *lock(&self.queues) = activation.queues;
        self.handler = Some(self.device_loop.add(Box::new(EchoHandler {
            memory: activation.memory,
            notifier: activation.notifier,
            queues: self.queues.clone(),
        }))?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        if let Some(handler) = self.handler.take() {
            self.device_loop.remove(handler).unwrap();
            lock(&self.log).deactivations += 1;
        }
        std::mem::take(&mut *lock(&self.queues))
    }

    fn reset(&mut self) {
        assert!(self.handler.is_none(), "reset while active");
        lock(&self.log).config = [0; 8];
    }

    /// What it is does not matter to the transport, so it takes the form of a console's.
    fn state(&self) -> DeviceState {
        assert!(self.handler.is_none(), "asked while active");
        let [a, b, c, d, ..] = lock(&self.log).config;
        DeviceState::Console(ConsoleState {
            size: TerminalSize {
                columns: u16::from_le_bytes([a, b]),
                rows: u16::from_le_bytes([c, d]),
            },
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        assert!(self.handler.is_none(), "restored while active");
        let DeviceState::Console(state) = state else {
            return Err(StateError::Impossible {
                what: "echo",
                saved: 0,
            });
        };
        let [a, b] = state.size.columns.to_le_bytes();
        let [c, d] = state.size.rows.to_le_bytes();
        lock(&self.log).config = [a, b, c, d, 0, 0, 0, 0];
        Ok(())
    }
}

/// A virtio capability as the driver finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability {
    /// Offset in configuration space.
    pub(super) at: u64,
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// The machine with the device in slot 5, from the driver's side.
pub(super) struct Guest {
    pub(super) host: PciHost,
    pub(super) machine: TestMachine,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) msi: Arc<MockMsi>,
    pub(super) irq: Arc<MockIrq>,
    pub(super) log: Shared<Log>,
    pub(super) function: Shared<VirtioPci>,
}

impl Guest {
    pub(super) fn new() -> Self {
        let log = Shared::<Log>::default();
        let guest = Self::with(|device_loop| {
            Box::new(Echo {
                log: log.clone(),
                device_loop,
                queues: Shared::default(),
                handler: None,
            })
        });
        Self { log, ..guest }
    }

    /// With another device than the one that echoes.
    pub(super) fn with(make: impl FnOnce(Arc<dyn DeviceLoop>) -> Box<dyn VirtioDevice>) -> Self {
        let machine = TestMachine::new();
        let device = make(machine.device_loop.clone());
        let msi = Arc::new(MockMsi::new(VirtioPci::vectors_needed(&*device).unwrap()));
        let irq = Arc::<MockIrq>::default();
        let memory = guest_memory(MEMORY_LEN);

        let mut host = PciHost::new(WINDOW).unwrap();
        let config = VirtioPciConfig {
            slot: host.slot(5).unwrap(),
            platform: machine.platform(),
            msi: msi.clone(),
            intx: irq.clone(),
            memory: memory.clone(),
            bar_address: Some(u32::try_from(BAR).unwrap()),
        };
        let function = shared(VirtioPci::new(device, config).unwrap());
        host.add(5, function.clone() as Arc<Mutex<dyn PciFunction>>)
            .unwrap();
        Self {
            host,
            machine,
            memory,
            msi,
            irq,
            log: Shared::default(),
            function,
        }
    }

    pub(super) fn config_read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.host
            .config_read(SLOT * SLOT_LEN as u64 + offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn config_write(&self, offset: u64, data: &[u8]) {
        self.host
            .config_write(SLOT * SLOT_LEN as u64 + offset, data);
    }

    pub(super) fn enable_memory(&self) {
        self.config_write(4, &6_u16.to_le_bytes());
    }

    /// Walks the capability list for all of one kind; `kind` is only asked of virtio's.
    pub(super) fn capability(&self, id: u8, kind: u8) -> Capability {
        let mut at = u64::from(self.config_read(0x34) & 0xff);
        while at != 0 {
            let [found, next, _, cfg] = self.config_read(at).to_le_bytes();
            if found == id && (id != 9 || cfg == kind) {
                return Capability {
                    at,
                    bar: self.config_read(at + 4).to_le_bytes()[0],
                    offset: self.config_read(at + 8).into(),
                    len: self.config_read(at + 12),
                };
            }
            at = next.into();
        }
        panic!("no capability {id} {kind}");
    }

    pub(super) fn bar_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.host.window_read(BAR + offset, &mut data);
        data
    }

    pub(super) fn bar_write(&self, offset: u64, data: &[u8]) {
        self.host.window_write(BAR + offset, data);
    }

    pub(super) fn read_u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.bar_read(offset))
    }

    pub(super) fn read_u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.bar_read(offset))
    }

    pub(super) fn write_u32(&self, offset: u64, value: u32) {
        self.bar_write(offset, &value.to_le_bytes());
    }

    pub(super) fn write_u16(&self, offset: u64, value: u16) {
        self.bar_write(offset, &value.to_le_bytes());
    }

    pub(super) fn status(&self) -> u8 {
        self.bar_read::<1>(0x14)[0]
    }

    pub(super) fn set_status(&self, status: u8) {
        self.bar_write(0x14, &[status]);
    }

    pub(super) fn write_features(&self, features: u64) {
        for half in [0, 1] {
            self.write_u32(0x08, half);
            self.write_u32(0x0c, (features >> (32 * half) & 0xffff_ffff) as u32);
        }
    }

    /// Rings of queue `index`: descriptors, available, used.
    pub(super) fn rings(index: u16) -> [u64; 3] {
        let base = 0x1_0000 * (u64::from(index) + 1);
        [base, base + 0x1000, base + 0x2000]
    }

    pub(super) fn set_up_queue(&self, index: u16, size: u16) {
        self.write_u16(0x16, index);
        self.write_u16(0x18, size);
        for (offset, address) in [0x20, 0x28, 0x30].into_iter().zip(Self::rings(index)) {
            self.write_u32(offset, (address & 0xffff_ffff) as u32);
            self.write_u32(offset + 4, (address >> 32) as u32);
        }
        self.write_u16(0x1c, 1);
    }

    /// Everything up to FEATURES_OK.
    pub(super) fn negotiate(&self, features: u64) {
        self.enable_memory();
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.write_features(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    /// Everything up to DRIVER_OK, with both queues.
    pub(super) fn start(&self) {
        self.negotiate(VERSION_1);
        self.set_up_queue(0, 16);
        self.set_up_queue(1, 4);
        self.set_status(15);
    }

    /// Makes one buffer available in queue `index` as its `nth`.
    pub(super) fn offer(&self, index: u16, nth: u16) {
        let [descriptors, available, _] = Self::rings(index);
        let memory = &self.memory;
        memory
            .write_obj(0x8000_u64, GuestAddress(descriptors))
            .unwrap();
        memory
            .write_obj(64_u64, GuestAddress(descriptors + 8))
            .unwrap();
        memory
            .write_obj(0_u16, GuestAddress(available + 4 + 2 * u64::from(nth)))
            .unwrap();
        memory
            .write_obj(nth + 1, GuestAddress(available + 2))
            .unwrap();
    }

    /// How many buffers of queue `index` came back.
    pub(super) fn used(&self, index: u16) -> u16 {
        let [_, _, used] = Self::rings(index);
        self.memory.read_obj(GuestAddress(used + 2)).unwrap()
    }
}
