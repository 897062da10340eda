#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::virtio_net::*;
use vm_memory::VolatileSlice;

use super::{GuestOffloads, MAX_PARTS, Net, NetBackend, NetConfig, NetState};
use crate::bus::lock;
use crate::testing::{MockNotifier, PATIENCE, TestLoop, guest_memory};
use crate::virtio::driver::{Driver, RINGS, readable, writable};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice};

const MEMORY: usize = 8 << 20;
const DATA: u64 = 0x20_0000;
const HEADER: usize = 12;

/// A host end of datagrams: as a tap in that each is a frame and the queue is short.
#[derive(Debug)]
pub(crate) struct Datagrams {
    socket: UnixDatagram,
    vnet_header: bool,
    scratch: Vec<u8>,
    offloads: Arc<Mutex<Option<GuestOffloads>>>,
}

impl Datagrams {
    /// The far end and the backend.
    pub(crate) fn pair(vnet_header: bool) -> (UnixDatagram, Self) {
        let (host, socket) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        let backend = Self {
            socket,
            vnet_header,
            scratch: vec![0; 0x2_0000],
            offloads: Arc::default(),
        };
        (host, backend)
    }
}

impl NetBackend for Datagrams {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn vnet_header(&self) -> bool {
        self.vnet_header
    }

    fn set_offloads(&mut self, offloads: GuestOffloads) -> io::Result<()> {
        *lock(&self.offloads) = Some(offloads);
        Ok(())
    }

    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        assert!(parts.len() <= MAX_PARTS);
        let len = match self.socket.recv(&mut self.scratch) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            len => len?,
        };
        let mut rest = &self.scratch[..len];
        for part in parts {
            part.copy_from(rest);
            rest = &rest[part.len().min(rest.len())..];
        }
        Ok(Some(len))
    }

    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        let mut len = 0;
        for part in parts {
            len += part.copy_to(&mut self.scratch[len..]);
        }
        match self.socket.send(&self.scratch[..len]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

struct Rig {
    net: Net,
    drivers: Vec<Driver>,
    hosts: Vec<UnixDatagram>,
    notifier: Arc<MockNotifier>,
    offloads: Arc<Mutex<Option<GuestOffloads>>>,
    // Last: the device must be gone when the loop ends.
    _device_loop: Arc<TestLoop>,
}

impl Rig {
    fn new(vnet_header: bool) -> Self {
        Self::with(1, vnet_header, u64::MAX)
    }

    fn with(pairs: u16, vnet_header: bool, features: u64) -> Self {
        let offloads = Arc::<Mutex<_>>::default();
        let mut hosts = Vec::new();
        let mut backends: Vec<Box<dyn NetBackend>> = Vec::new();
        for _ in 0..pairs {
            let (host, mut backend) = Datagrams::pair(vnet_header);
            backend.offloads = Arc::clone(&offloads);
            hosts.push(host);
            backends.push(Box::new(backend));
        }
        let config = NetConfig {
            name: "net0".into(),
            mac: [2, 0, 0, 1, 2, 3],
            mtu: Some(1400),
        };
        let device_loop = Arc::new(TestLoop::new());
        let mut rig = Self {
            net: Net::new(config, backends, device_loop.clone()),
            drivers: Vec::new(),
            hosts,
            notifier: Arc::default(),
            offloads,
            _device_loop: device_loop,
        };
        rig.activate(features);
        rig
    }

    fn activate(&mut self, features: u64) {
        let memory = guest_memory(MEMORY);
        let count = self.net.queue_sizes().len() as u64;
        self.drivers = (0..count)
            .map(|i| Driver::new(&memory, 0x1000 + RINGS * i, 256))
            .collect();
        let queues = self
            .drivers
            .iter()
            .zip(0..)
            .map(|(driver, index)| ActiveQueue {
                index,
                queue: driver.queue(true),
                kick: driver.kick.clone(),
            });
        let activation = Activation {
            memory,
            features: self.net.features() & features,
            queues: queues.collect(),
            notifier: self.notifier.clone(),
        };
        self.net.activate(activation).unwrap();
    }

    fn rx(&mut self) -> &mut Driver {
        &mut self.drivers[0]
    }

    fn tx(&mut self) -> &mut Driver {
        &mut self.drivers[1]
    }

    /// Gives the receive queue `count` buffers of `len` bytes.
    fn post(&mut self, count: u64, len: u32) {
        for i in 0..count {
            let address = DATA + u64::from(len).next_multiple_of(0x100) * i;
            self.rx().add(&[writable(address, len)]);
        }
        self.rx().kick();
    }

    fn needs_reset(&self) -> String {
        let log = self.notifier.wait(|log| !log.needs_reset.is_empty());
        log.needs_reset[0].clone()
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn what_the_guest_sends_has_its_turn_with_what_it_receives() {
    let mut rig = Rig::new(false);
    rig.post(1, 1536);
    // No kick: as if that were far behind in the queue of events.
    let sent = frame(12 + 60);
    rig.tx().write(DATA + 0x8000, &sent);
    rig.tx().add(&[readable(DATA + 0x8000, 72)]);
    rig.hosts[0].send(&frame(100)).unwrap();
    assert_eq!(rig.rx().wait_used(), (0, 112));
    let mut got = [0; 200];
    assert_eq!(rig.hosts[0].recv(&mut got).unwrap(), 60);
    assert_eq!(got[..60], sent[12..]);
}

#[test]
fn a_frame_may_take_several_buffers() {
    let mut rig = Rig::new(true);
    rig.post(100, 1536);
    let sent = frame(HEADER + 3000);
    rig.hosts[0].send(&sent).unwrap();
    assert_eq!(rig.rx().wait_used(), (0, 1536));
    assert_eq!(rig.rx().take_used(), Some((1, 1476)), "both at once");
    let mut got = rig.rx().read(DATA, 1536);
    got.extend(rig.rx().read(DATA + 0x600, 1476));
    assert_eq!(got[..10], sent[..10]);
    assert_eq!(got[10..12], [2, 0], "num_buffers");
    assert_eq!(got[12..], sent[12..]);
    rig.notifier.wait_queue(0, 1);
    assert_eq!(rig.net.stats().rx(), (1, 3000));
}

#[test]
fn the_largest_segment_fits() {
    let mut rig = Rig::new(true);
    rig.post(60, 1536);
    let sent = frame(HEADER + 14 + 4 + 65_535);
    rig.hosts[0].send(&sent).unwrap();
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let (head, len) = rig.rx().wait_used();
        got.extend(rig.rx().read(DATA + 0x600 * u64::from(head), len as usize));
    }
    assert_eq!(got[12..], sent[12..]);
    assert_eq!(got[10..12], 43_u16.to_le_bytes());
}

#[test]
fn a_backend_without_headers_gets_and_gives_bare_frames() {
    let mut rig = Rig::new(false);
    assert_eq!(rig.net.features() & (1 << VIRTIO_NET_F_CSUM), 0);
    // A header in a buffer of its own, as some drivers have it.
    rig.rx().write(DATA, &[0xff; 0x1000]);
    rig.rx()
        .add(&[writable(DATA, 12), writable(DATA + 0x100, 1600)]);
    rig.rx().kick();
    let sent = frame(60);
    rig.hosts[0].send(&sent).unwrap();
    assert_eq!(rig.rx().wait_used(), (0, 72));
    let header = rig.rx().read(DATA, 12);
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(rig.rx().read(DATA + 0x100, 60), sent);

    rig.tx().write(DATA, &[0; 12]);
    rig.tx().write(DATA + 12, &sent);
    rig.tx().add(&[readable(DATA, 20), readable(DATA + 20, 52)]);
    rig.tx().kick();
    let mut got = [0; 100];
    assert_eq!(rig.hosts[0].recv(&mut got).unwrap(), 60);
    assert_eq!(got[..60], sent);
    assert_eq!(rig.tx().wait_used(), (0, 0));
    assert!(lock(&rig.offloads).is_none());
}

#[test]
fn headers_pass_through_a_backend_that_knows_them() {
    let mut rig = Rig::new(true);
    let expected = GuestOffloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
    assert_eq!(*lock(&rig.offloads), Some(expected));
    let sent = frame(HEADER + 200);
    rig.tx().write(DATA, &sent);
    rig.tx().add(&[readable(DATA, 212)]);
    rig.tx().kick();
    let mut got = [0; 300];
    assert_eq!(rig.hosts[0].recv(&mut got).unwrap(), 212);
    assert_eq!(got[..212], sent);
    assert_eq!(rig.tx().wait_used(), (0, 0));
    assert_eq!(rig.net.stats().tx(), (1, 200));

    rig.net.deactivate();
    rig.activate(!(1 << VIRTIO_NET_F_GUEST_CSUM));
    assert_eq!(*lock(&rig.offloads), Some(GuestOffloads::default()));
}

#[test]
fn frames_wait_for_buffers_and_buffers_for_room() {
    let mut rig = Rig::new(true);
    let sent = frame(HEADER + 100);
    rig.hosts[0].send(&sent).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(rig.rx().take_used().is_none());
    rig.post(50, 1536);
    assert_eq!(rig.rx().wait_used(), (0, 112));

    // More frames than the datagram queue takes: they go out as the host reads.
    let count = 150_u64;
    for i in 0..count {
        let at = DATA + 0x10_0000 + 0x100 * i;
        rig.tx().write(at, &sent);
        rig.tx().write(at + 12, &i.to_le_bytes());
        rig.tx().add(&[readable(at, 112)]);
    }
    rig.tx().kick();
    let mut got = [0; 200];
    for i in 0..count {
        assert_eq!(rig.hosts[0].recv(&mut got).unwrap(), 112);
        assert_eq!(got[12..20], i.to_le_bytes());
    }
    for i in 0..count {
        assert_eq!(rig.tx().wait_used(), (i as u32, 0));
    }
    assert_eq!(rig.net.stats().dropped(), (0, 0));
}

#[test]
fn a_guest_short_of_buffers_gets_what_fits_and_loses_nothing() {
    for vnet_header in [true, false] {
        let mut rig = Rig::new(vnet_header);
        let before = if vnet_header { HEADER } else { 0 };
        rig.rx().write(DATA, &[0xff; 0x2000]);
        rig.post(1, 300);
        let sent = frame(before + 500);
        rig.hosts[0].send(&sent[..before + 100]).unwrap();
        assert_eq!(rig.rx().wait_used(), (0, 112));
        assert_eq!(rig.rx().read(DATA + 12, 100), sent[before..before + 100]);
        assert_eq!(rig.rx().read(DATA + 10, 2), [1, 0]);

        rig.post(1, 300);
        rig.hosts[0].send(&sent).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(rig.rx().take_used().is_none());
        rig.rx().add(&[writable(DATA + 0x1000, 300)]);
        rig.rx().kick();
        assert_eq!(rig.rx().wait_used(), (1, 300));
        assert_eq!(rig.rx().wait_used(), (2, 212));
        let mut got = rig.rx().read(DATA + 12, 288);
        got.extend(rig.rx().read(DATA + 0x1000, 212));
        assert_eq!(got, sent[before..]);
        assert_eq!(rig.rx().read(DATA + 10, 2), [2, 0]);
        assert_eq!(rig.net.stats().dropped(), (0, 0));
    }
}

#[test]
fn frames_out_of_bounds_are_dropped_and_counted() {
    let mut rig = Rig::with(1, true, !(1 << VIRTIO_NET_F_MRG_RXBUF));
    rig.post(1, 112);
    let sent = frame(200);
    for len in [25, 113, 200, 0, 112] {
        rig.hosts[0].send(&sent[..len]).unwrap();
    }
    assert_eq!(rig.rx().wait_used(), (0, 112));
    assert_eq!(rig.rx().read(DATA + 12, 100), sent[12..112]);
    assert_eq!(rig.net.stats().dropped().0, 4);

    rig.tx().add(&[readable(DATA, 25)]);
    rig.tx().add(&[readable(DATA, 12 + 14 + 4 + 65_536)]);
    rig.tx().kick();
    assert_eq!(rig.tx().wait_used(), (0, 0));
    assert_eq!(rig.tx().wait_used(), (1, 0));
    assert_eq!(rig.net.stats().dropped().1, 2);
}

#[test]
fn unused_buffers_go_back_with_the_queue() {
    let mut rig = Rig::new(true);
    rig.post(70, 1536);
    for _ in 0..3 {
        rig.hosts[0].send(&frame(100)).unwrap();
        rig.rx().wait_used();
    }
    let queues = rig.net.deactivate();
    let positions: Vec<_> = queues
        .iter()
        .map(|queue| (queue.index, queue.queue.state()))
        .map(|(index, state)| (index, state.next_avail, state.next_used))
        .collect();
    assert_eq!(positions, [(0, 3, 3), (1, 0, 0)]);
    rig.activate(u64::MAX);
    rig.post(50, 1536);
    rig.hosts[0].send(&frame(100)).unwrap();
    assert_eq!(rig.rx().wait_used(), (0, 100));
}

#[test]
fn a_lost_backend_takes_the_link_down() {
    let mut rig = Rig::new(true);
    let link = |rig: &Rig| {
        let mut status = [9; 2];
        rig.net.read_config(6, &mut status);
        status
    };
    assert_eq!(link(&rig), [1, 0]);
    rig.hosts.clear();
    for _ in 0..2 {
        rig.tx().add(&[readable(DATA, 100)]);
        rig.tx().kick();
        rig.tx().wait_used();
    }
    rig.notifier.wait(|log| log.config == 1);
    assert_eq!(link(&rig), [0, 0]);
    assert_eq!(rig.net.stats().dropped().1, 2);
    assert_eq!(rig.net.deactivate().len(), 2);
}

#[test]
fn the_driver_chooses_how_many_pairs_are_used() {
    let mut rig = Rig::with(3, true, u64::MAX);
    assert_eq!(rig.net.queue_sizes().len(), 7);
    let mut space = [0; 12];
    rig.net.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 1, 2, 3, 1, 0, 3, 0, 0x78, 5]);

    let second = 2;
    for i in 0..50 {
        rig.drivers[second].add(&[writable(DATA + 0x800 * i, 1536)]);
    }
    rig.drivers[second].kick();
    rig.hosts[1].send(&frame(100)).unwrap();

    let mut control = rig.drivers.remove(6);
    let mut command = |class: u8, pairs: u16| {
        control.write(0x10_0000, &[class, 0]);
        control.write(0x10_0002, &pairs.to_le_bytes());
        control.add(&[readable(0x10_0000, 4), writable(0x10_0010, 1)]);
        control.kick();
        assert_eq!(control.wait_used().1, 1);
        control.read(0x10_0010, 1)[0]
    };
    assert_eq!(command(4, 0), 1);
    assert_eq!(command(4, 4), 1);
    assert_eq!(command(1, 2), 1, "a command that was not offered");
    assert!(rig.drivers[second].take_used().is_none());
    assert_eq!(command(4, 2), 0);
    assert_eq!(rig.drivers[second].wait_used(), (0, 100));
    rig.net.deactivate();
    assert_eq!(rig.net.state(), state(2, true));
    rig.net.reset();
    assert_eq!(rig.net.state(), state(1, true));
    rig.net.restore(&state(3, true)).unwrap();
    assert_eq!(rig.net.state(), state(3, true));
    for refused in [state(0, true), state(4, true), DeviceState::Rng] {
        rig.net.restore(&refused).unwrap_err();
    }
}

fn state(enabled_pairs: u16, link_up: bool) -> DeviceState {
    DeviceState::Net(NetState {
        enabled_pairs,
        link_up,
    })
}

#[test]
fn a_driver_that_saw_the_link_down_is_told_that_it_is_up_again() {
    let mut rig = Rig::new(true);
    rig.hosts.clear();
    rig.tx().add(&[readable(DATA, 100)]);
    rig.tx().kick();
    rig.notifier.wait(|log| log.config == 1);
    rig.net.deactivate();
    let saved = rig.net.state();
    assert_eq!(saved, state(1, false));

    let mut rig = Rig::new(true);
    rig.net.deactivate();
    rig.net.restore(&saved).unwrap();
    assert_eq!(rig.net.state(), saved);
    rig.activate(u64::MAX);
    assert_eq!(rig.notifier.log().config, 1);
    rig.net.deactivate();
    assert_eq!(rig.net.state(), state(1, true));
}

#[test]
fn broken_chains_stop_the_device() {
    type Misbehave = fn(&mut Rig);
    let cases: [(&str, Misbehave); 5] = [
        ("no header", |rig| {
            rig.tx().add(&[readable(DATA, 11)]);
        }),
        ("not readable", |rig| {
            rig.tx().add(&[readable(DATA, 12), writable(DATA, 100)]);
        }),
        ("not writable", |rig| {
            rig.rx().add(&[readable(DATA, 12), writable(DATA, 100)]);
        }),
        ("too short", |rig| {
            rig.rx().add(&[writable(DATA, 11)]);
        }),
        ("ring", |rig| rig.rx().set_available(1000)),
    ];
    for (word, misbehave) in cases {
        let mut rig = Rig::new(true);
        misbehave(&mut rig);
        rig.rx().kick();
        rig.tx().kick();
        let cause = rig.needs_reset();
        assert!(cause.contains(word), "{word}: {cause}");
        rig.hosts[0].send(&frame(100)).unwrap();
        assert_eq!(rig.net.deactivate().len(), 2);
        assert_eq!(rig.rx().used_index(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn hostile_rings_neither_hang_nor_panic(
        vnet_header in any::<bool>(),
        mergeable in any::<bool>(),
        descriptors in proptest::collection::vec(
            (DATA..0x81_0000_u64, prop_oneof![1..64_u32, 1..4096_u32, any::<u32>()], 0..5_u16, 0..300_u16),
            1..256,
        ),
        heads in proptest::collection::vec(0..256_u16, 1..300),
        available in proptest::option::of(any::<u16>()),
    ) {
        let features = if mergeable { u64::MAX } else { !(1 << VIRTIO_NET_F_MRG_RXBUF) };
        let mut rig = Rig::with(1, vnet_header, features);
        rig.hosts[0].set_nonblocking(true).unwrap();
        for driver in &mut rig.drivers {
            for (i, (address, len, flags, next)) in descriptors.iter().enumerate() {
                driver.descriptor(i as u16, *address, *len, *flags, *next);
            }
            for head in &heads {
                driver.offer(*head);
            }
            if let Some(available) = available {
                driver.set_available(available);
            }
            driver.kick();
        }
        let sent = frame(9000);
        for len in [9000, 60, 1514, 9000] {
            // A full queue is as good.
            let _ = rig.hosts[0].send(&sent[..len]);
        }
        let mut got = [0; 0x1_0000];
        while rig.hosts[0].recv(&mut got).is_ok() {}
        prop_assert_eq!(rig.net.deactivate().len(), 2);
    }
}
