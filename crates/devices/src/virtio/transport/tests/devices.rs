//! Each device with its backend, saved amid I/O: a driver goes on in another machine.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use edgevmm_block::DiskOptions;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::guest::{Guest, VERSION_1};
use super::state::{restore_into, resume, save};
use super::{NOTIFY, eventually};
use crate::bus::lock;
use crate::console::ConsoleInput;
use crate::testing::MockControl;
use crate::virtio::DeviceState;
use crate::virtio::block::{Block, BlockConfig};
use crate::virtio::console::tests::Screen;
use crate::virtio::console::{Console, ConsoleConfig, ConsoleState, TerminalSize};
use crate::virtio::driver::{Driver, readable, writable};
use crate::virtio::net::tests::Datagrams;
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::rng::Rng;

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const DATA: u64 = 0x8_0000;

/// A driver with queues 0 and 1, of 16 and 4 entries.
struct Drivers {
    guest: Guest,
    queues: [Driver; 2],
}

impl Drivers {
    fn start(guest: Guest, features: u64) -> Self {
        guest.negotiate(VERSION_1 | features);
        guest.set_up_queue(0, 16);
        guest.set_up_queue(1, 4);
        guest.set_status(15);
        let queue = |index, size| {
            let [base, ..] = Guest::rings(index);
            Driver::new(&guest.memory, base, size)
        };
        let queues = [queue(0, 16), queue(1, 4)];
        Self { guest, queues }
    }

    fn kick(&self, index: u16) {
        self.guest.write_u16(NOTIFY + 4 * u64::from(index), index);
    }

    /// The same drivers in `guest`, which takes up what is saved. `meanwhile` runs in the first
    /// machine while its device is suspended.
    fn move_to(mut self, guest: Guest, meanwhile: impl FnOnce(&mut Self)) -> Self {
        lock(&self.guest.function).suspend();
        meanwhile(&mut self);
        restore_into(&guest, &save(&self.guest));
        // The first machine has served nothing of it, and is gone.
        for driver in &mut self.queues {
            driver.memory = guest.memory.clone();
        }
        self.guest = guest;
        resume(&self.guest);
        self
    }
}

#[test]
fn frames_go_on_both_ways() {
    let nic = || {
        let (host, backend) = Datagrams::pair(false);
        let guest = Guest::with(|device_loop| {
            let config = NetConfig {
                name: "net0".into(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: None,
            };
            Box::new(Net::new(config, vec![Box::new(backend)], device_loop))
        });
        (guest, host)
    };
    let (guest, host) = nic();
    let mut drivers = Drivers::start(guest, EVENT_IDX);
    for i in 0..8 {
        drivers.queues[0].add(&[writable(DATA + 0x800 * i, 0x800)]);
    }
    drivers.kick(0);
    host.send(&[1; 60]).unwrap();
    assert_eq!(drivers.queues[0].wait_used(), (0, 72));
    let transmit = |drivers: &mut Drivers, byte: u8| {
        let at = DATA + 0x8000;
        drivers.queues[1].write(at, &[byte; 112]);
        drivers.queues[1].write(at, &[0; 12]);
        drivers.queues[1].add(&[readable(at, 112)]);
        drivers.kick(1);
    };
    transmit(&mut drivers, 2);
    let mut frame = [0; 200];
    assert_eq!(host.recv(&mut frame).unwrap(), 100);

    let (guest, host) = nic();
    let mut drivers = drivers.move_to(guest, |drivers| transmit(drivers, 3));
    assert_eq!(host.recv(&mut frame).unwrap(), 100);
    assert_eq!(frame[..100], [3; 100]);
    assert_eq!(drivers.queues[1].wait_used().1, 0);
    assert_eq!(drivers.queues[1].wait_used().1, 0);
    // Into a buffer that the driver gave to the first machine.
    host.send(&[4; 60]).unwrap();
    assert_eq!(drivers.queues[0].wait_used(), (1, 72));
    assert_eq!(drivers.queues[0].read(DATA + 0x800 + 12, 60), [4; 60]);
    eventually("an interrupt", || drivers.guest.irq.level());
}

#[test]
fn a_console_goes_on() {
    let size = |columns| TerminalSize { columns, rows: 50 };
    let terminal = |columns| {
        let screen = Arc::<Screen>::default();
        let input = Arc::new(ConsoleInput::new().unwrap());
        let config = ConsoleConfig {
            sink: screen.clone(),
            input: input.clone(),
            size: size(columns),
        };
        let guest = Guest::with(|device_loop| Box::new(Console::new(config, device_loop)));
        (guest, screen, input)
    };
    let (guest, screen, input) = terminal(132);
    let mut drivers = Drivers::start(guest, 1);
    drivers.queues[1].write(DATA, b"onetwo");
    drivers.queues[1].add(&[readable(DATA, 3)]);
    drivers.kick(1);
    assert_eq!(screen.wait(3), b"one");
    drivers.queues[0].add(&[writable(DATA + 0x100, 16)]);
    drivers.queues[0].add(&[writable(DATA + 0x200, 16)]);
    drivers.kick(0);
    input.push(b"a");
    assert_eq!(drivers.queues[0].wait_used(), (0, 1));

    let (guest, screen, input) = terminal(80);
    let mut drivers = drivers.move_to(guest, |drivers| {
        drivers.queues[1].add(&[readable(DATA + 3, 3)]);
    });
    assert_eq!(screen.wait(3), b"two");
    input.push(b"b");
    assert_eq!(drivers.queues[0].wait_used(), (1, 1));
    assert_eq!(drivers.queues[0].read(DATA + 0x200, 1), b"b");
    let state = save(&drivers.guest).function.device;
    assert_eq!(
        state,
        DeviceState::Console(ConsoleState { size: size(132) })
    );
}

#[test]
fn entropy_goes_on() {
    let source = || Guest::with(|device_loop| Box::new(Rng::new(device_loop)));
    let mut drivers = Drivers::start(source(), EVENT_IDX);
    drivers.queues[0].add(&[writable(DATA, 64)]);
    drivers.kick(0);
    assert_eq!(drivers.queues[0].wait_used(), (0, 64));
    let mut drivers = drivers.move_to(source(), |drivers| {
        drivers.queues[0].add(&[writable(DATA + 0x100, 64)]);
    });
    assert_eq!(drivers.queues[0].wait_used(), (1, 64));
    assert_ne!(drivers.queues[0].read(DATA + 0x100, 64), [0; 64]);
}

#[test]
fn a_disk_goes_on_with_its_cache_off() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 1 << 16]).unwrap();
    let disk = || {
        let options = DiskOptions::new(file.try_clone().unwrap(), "disk");
        let backend = edgevmm_block::open(options).unwrap();
        let config = BlockConfig {
            name: "disk0".into(),
            serial: String::new(),
            ..BlockConfig::default()
        };
        let control = Arc::<MockControl>::default();
        Guest::with(|_| Box::new(Block::new(config, backend, control)))
    };
    let mut drivers = Drivers::start(disk(), EVENT_IDX | 1 << VIRTIO_BLK_F_CONFIG_WCE);
    let writeback = |drivers: &Drivers| drivers.guest.bar_read::<1>(0x820);
    drivers.guest.bar_write(0x820, &[0]);
    let write = |drivers: &mut Drivers, sector: u8| {
        let queue = &mut drivers.queues[0];
        let header = [1, 0, 0, 0, 0, 0, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0];
        let at = DATA + 0x1000 * u64::from(sector);
        queue.write(at, &header);
        queue.write(at + 0x200, &[sector; 512]);
        let buffers = [
            readable(at, 16),
            readable(at + 0x200, 512),
            writable(at + 0x400, 1),
        ];
        queue.write(at + 0x400, &[0xff]);
        queue.add(&buffers);
    };
    write(&mut drivers, 1);
    drivers.kick(0);
    assert_eq!(drivers.queues[0].wait_used().1, 1);

    let mut drivers = drivers.move_to(disk(), |drivers| write(drivers, 2));
    assert_eq!(drivers.queues[0].wait_used().1, 1);
    write(&mut drivers, 3);
    drivers.kick(0);
    assert_eq!(drivers.queues[0].wait_used().1, 1);
    assert_eq!(writeback(&drivers), [0]);
    for sector in 1..=3 {
        let done = drivers.queues[0].read(DATA + 0x400 + 0x1000 * u64::from(sector), 1);
        assert_eq!(done, [0]);
        let mut data = [0; 512];
        let at = 512 * u64::from(sector);
        file.read_exact_at(&mut data, at).unwrap();
        assert_eq!(data, [sector; 512]);
    }
}
