//! Requests and frames cost no allocation, on any thread, once a device runs.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod driver;
#[path = "driver/sata.rs"]
mod sata_driver;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use edgevmm_block::{DiskOptions, open};
use edgevmm_devices::GuestMemory;
use edgevmm_devices::ahci::{Ahci, AhciConfig, Drive, DriveConfig};
use edgevmm_devices::disk::{Aio, Rate};
use edgevmm_devices::pci::{PciFunction, PciHost};
use edgevmm_devices::platform::{
    DeviceLoop, IrqLine, LoopHandler, MachineControl, MachineRequest, MsiMessage, MsiVectors,
};
use edgevmm_devices::virtio::block::{Block, BlockConfig};
use edgevmm_devices::virtio::net::{GuestOffloads, Net, NetBackend, NetConfig};
use edgevmm_devices::virtio::{Activation, ActiveQueue, DriverError, Notifier, VirtioDevice};
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use vm_memory::{GuestAddress, VolatileSlice};

use driver::{Driver, RINGS, readable, writable};
use sata_driver::{Adapter, Ata, CI, Port, SACT};

/// Counts the process's allocations.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const DATA: u64 = 0x20_0000;
const ROUNDS: usize = 100;

#[derive(Debug, Default)]
struct Quiet {
    broken: AtomicBool,
    interrupts: AtomicU64,
}

impl Notifier for Quiet {
    fn queue(&self, _index: u16) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {}

    fn needs_reset(&self, _cause: &DriverError) {
        self.broken.store(true, Ordering::Relaxed);
    }
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap())
}

fn activation(device: &dyn VirtioDevice, drivers: &[Driver], quiet: &Arc<Quiet>) -> Activation {
    let queues = drivers.iter().zip(0..).map(|(driver, index)| ActiveQueue {
        index,
        queue: driver.queue(true),
        kick: driver.kick.clone(),
    });
    Activation {
        memory: drivers[0].memory.clone(),
        features: device.features(),
        queues: queues.collect(),
        notifier: quiet.clone(),
    }
}

/// Allocations of one `step`, after as many rounds to warm up.
fn allocations(mut step: impl FnMut()) -> u64 {
    for _ in 0..ROUNDS {
        step();
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..ROUNDS {
        step();
    }
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// A machine of which nothing is asked.
#[derive(Debug)]
struct NoControl;

impl MachineControl for NoControl {
    fn request(&self, request: MachineRequest) {
        panic!("{request:?}");
    }

    fn pause(&self, reason: String) {
        panic!("{reason}");
    }
}

fn block(aio: Aio, direct: bool) {
    let mut image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    image.write_all(&vec![0x5a; 1 << 20]).unwrap();
    let mut options = DiskOptions::new(image.reopen().unwrap(), "disk");
    options.direct = direct;
    let rate = Some(Rate {
        per_second: 1 << 40,
        burst: None,
    });
    let mut config = BlockConfig {
        aio,
        ..BlockConfig::default()
    };
    config.rate_limits.bytes.total = rate;
    let mut block = Block::new(config, open(options).unwrap(), Arc::new(NoControl));
    let quiet = Arc::<Quiet>::default();
    let mut drivers = [Driver::new(&memory(), 0x1000, 256)];
    block
        .activate(activation(&block, &drivers, &quiet))
        .unwrap();
    let [driver] = &mut drivers;
    // In, out, flush and an unknown one.
    for kind in [0_u32, 1, 4, 99] {
        driver.write(0x10_0000, &kind.to_le_bytes());
        let count = allocations(|| {
            for _ in 0..8 {
                let data = if kind == 0 { writable } else { readable };
                let (data, more) = (data(DATA, 4096), data(DATA + 0x2000, 512));
                let (header, status) = (readable(0x10_0000, 16), writable(0x10_0100, 1));
                if kind < 2 {
                    driver.add(&[header, data, more, status]);
                } else {
                    driver.add(&[header, status]);
                }
            }
            driver.kick();
            for _ in 0..8 {
                driver.wait_used();
            }
        });
        assert_eq!(count, 0, "request {kind}, {aio:?}, direct {direct}");
    }
    assert_eq!(driver.read(DATA, 4096), [0x5a; 4096]);
    assert!(!quiet.broken.load(Ordering::Relaxed));
}

/// Interrupts that nobody waits for.
#[derive(Debug)]
struct Unheard;

impl IrqLine for Unheard {
    fn set_level(&self, _: bool) {}
}

impl MsiVectors for Unheard {
    fn route(&self, _: u16, _: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, _: u16) {}

    fn pending(&self, _: u16) -> bool {
        false
    }

    fn clear(&self, _: u16) {}
}

#[derive(Debug)]
struct Registers(Ahci);

impl Adapter for Registers {
    fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.bar_read(5, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.0.bar_write(5, offset, &value.to_le_bytes());
    }
}

/// An adapter whose first port is started.
fn adapter(drives: Vec<Drive>) -> (Registers, Port) {
    let memory = memory();
    let host = PciHost::new(0..0).unwrap();
    let config = AhciConfig {
        slot: host.slot(1).unwrap(),
        msi: Arc::new(Unheard),
        intx: Arc::new(Unheard),
        memory: memory.clone(),
        bar_address: None,
    };
    let mut adapter = Registers(Ahci::new(drives, config).unwrap());
    let port = Port::new(&memory, 0);
    port.start(&mut adapter);
    (adapter, port)
}

fn sata(aio: Aio, direct: bool) {
    let mut image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    image.write_all(&vec![0x5a; 1 << 20]).unwrap();
    let open = |read_only| {
        let options = DiskOptions {
            direct,
            read_only,
            ..DiskOptions::new(image.reopen().unwrap(), "disk")
        };
        open(options).unwrap()
    };
    let config = DriveConfig {
        aio,
        ..DriveConfig::default()
    };
    let drives = if direct {
        vec![Drive::disk(config, open(false), Arc::new(NoControl))]
    } else {
        let disc = Some(open(true));
        vec![Drive::cdrom(config, disc, Arc::new(NoControl))]
    };
    let (mut adapter, port) = adapter(drives);
    let pieces = [(DATA, 2048), (DATA + 0x2000, 2048)];
    if !direct {
        let read = Ata::packet([0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0]);
        let count = allocations(|| assert_eq!(port.run(&mut adapter, &read, &pieces), 0x50));
        assert_eq!(count, 0, "a packet, {aio:?}");
        return;
    }
    for command in [0xc8, 0xca, 0xe7, 0xec, 0x60, 0x61] {
        let count = allocations(|| {
            if command & 0xf0 != 0x60 {
                let ata = Ata::new(command, 8, 8);
                assert_eq!(port.run(&mut adapter, &ata, &pieces), 0x50);
                return;
            }
            for slot in 0..8 {
                let ata = Ata::queued(command, slot, 8 * slot as u64, 8);
                port.prepare(slot, &ata, &pieces);
            }
            adapter.write(0x100 + SACT, 0xff);
            adapter.write(0x100 + CI, 0xff);
            assert_eq!(port.wait(&mut adapter, 0xff), 0x50);
        });
        // How many of those side by side wait for helpers at once is chance, and lists grow with it.
        let chance = if command & 0xf0 == 0x60 { 4 } else { 0 };
        assert!(count <= chance, "command {command:#x}, {aio:?}: {count}");
    }
}

/// A device loop that the test runs by hand.
#[derive(Debug, Default)]
struct Manual(std::sync::Mutex<Vec<ManualHandler>>);

struct ManualHandler(LoopHandler);

impl std::fmt::Debug for ManualHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ManualHandler")
    }
}

impl DeviceLoop for Manual {
    fn add(&self, handler: LoopHandler) -> io::Result<SubscriberId> {
        self.0.lock().unwrap().push(ManualHandler(handler));
        // An id is to be had from a manager only.
        let mut manager = EventManager::<LoopHandler>::new().map_err(io::Error::other)?;
        Ok(manager.add_subscriber(Box::new(Nothing)))
    }

    fn remove(&self, _id: SubscriberId) -> io::Result<()> {
        Ok(())
    }
}

struct Nothing;

impl event_manager::MutEventSubscriber for Nothing {
    fn process(&mut self, _: event_manager::Events, _: &mut event_manager::EventOps<'_>) {}
    fn init(&mut self, _: &mut event_manager::EventOps<'_>) {}
}

#[derive(Debug)]
struct Datagrams {
    socket: UnixDatagram,
    scratch: Box<[u8]>,
}

impl NetBackend for Datagrams {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn vnet_header(&self) -> bool {
        true
    }

    fn set_offloads(&mut self, _offloads: GuestOffloads) -> io::Result<()> {
        Ok(())
    }

    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        match self.socket.recv(&mut self.scratch) {
            Ok(len) => {
                let mut rest = &self.scratch[..len];
                for part in parts {
                    part.copy_from(rest);
                    rest = &rest[part.len().min(rest.len())..];
                }
                Ok(Some(len))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        let mut len = 0;
        for part in parts {
            len += part.copy_to(&mut self.scratch[len..]);
        }
        self.socket.send(&self.scratch[..len]).map(|_| true)
    }
}

fn net() {
    let (host, socket) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let scratch = vec![0; 0x1_0000].into();
    let config = NetConfig {
        name: "net0".into(),
        mac: [2; 6],
        mtu: None,
    };
    let device_loop = Arc::<Manual>::default();
    let backend = Box::new(Datagrams { socket, scratch });
    let mut net = Net::new(config, vec![backend], device_loop.clone());
    let quiet = Arc::<Quiet>::default();
    let memory = memory();
    let mut drivers = [0, 1].map(|i| Driver::new(&memory, 0x1000 + RINGS * i, 256));
    net.activate(activation(&net, &drivers, &quiet)).unwrap();

    let mut manager = EventManager::<LoopHandler>::new().unwrap();
    for handler in device_loop.0.lock().unwrap().drain(..) {
        manager.add_subscriber(handler.0);
    }
    let [rx, tx] = &mut drivers;
    let mut buffer = 0;
    let mut post = |rx: &mut Driver, count| {
        for _ in 0..count {
            rx.add(&[writable(DATA + 0x800 * (buffer % 100), 1536)]);
            buffer += 1;
        }
        rx.kick();
    };
    post(rx, 100);
    let mut run = || {
        while manager.run_with_timeout(0).unwrap() > 0 {}
    };
    run();
    let frame = [0x11; 2000];
    let received = allocations(|| {
        // One that takes two buffers, one that takes one.
        host.send(&frame).unwrap();
        host.send(&frame[..100]).unwrap();
        run();
        for _ in 0..3 {
            assert!(rx.take_used().is_some());
        }
        post(rx, 3);
        run();
    });
    assert_eq!(received, 0, "received frames");

    let mut got = [0; 4000];
    let sent = allocations(|| {
        tx.add(&[readable(DATA, 100), readable(DATA + 0x8000, 1000)]);
        tx.kick();
        run();
        assert!(tx.take_used().is_some());
        assert_eq!(host.recv(&mut got).unwrap(), 1100);
    });
    assert_eq!(sent, 0, "sent frames");
    assert_eq!(net.stats().rx().0, 4 * ROUNDS as u64);
    assert!(!quiet.broken.load(Ordering::Relaxed));
}

/// One test: allocations of another that ran beside it would count.
#[test]
fn requests_and_frames_do_not_allocate() {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(vec![0_u8; 100]);
    assert!(
        ALLOCATIONS.load(Ordering::Relaxed) > before,
        "the count works"
    );
    for aio in [Aio::Auto, Aio::Threads] {
        for direct in [false, true] {
            block(aio, direct);
            sata(aio, direct);
        }
    }
    net();
}
