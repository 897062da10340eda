#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use super::*;
use crate::GuestMemory;
use crate::testing::{MockNotifier, PATIENCE, TestLoop, guest_memory};
use crate::virtio::driver::{Driver, readable, writable};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice};

const MEMORY: usize = 8 << 20;
const RINGS: u64 = 0x1000;
const BUFFER: u64 = 0x10_0000;
/// Memory that tests give away.
const PAGES: u64 = 0x40_0000;
const PAGE: u64 = 4096;

const STATS: u64 = 1 << 1;
const POISON: u64 = 1 << 4;

struct Rig {
    balloon: Balloon,
    notifier: Arc<MockNotifier>,
    drivers: Vec<Driver>,
}

impl Rig {
    fn with(memory: &Arc<GuestMemory>, refused: u64) -> Self {
        let mut balloon = Balloon::new(Arc::new(TestLoop::new())).unwrap();
        let notifier = Arc::<MockNotifier>::default();
        let drivers: Vec<_> = (0..4)
            .map(|index| Driver::new(memory, RINGS + index * 0x4000, 32))
            .collect();
        let queues = (0..).zip(&drivers).map(|(index, driver)| ActiveQueue {
            index,
            queue: driver.queue(false),
            kick: driver.kick.clone(),
        });
        balloon
            .activate(Activation {
                memory: memory.clone(),
                features: balloon.features() & !refused,
                queues: queues.collect(),
                notifier: notifier.clone(),
            })
            .unwrap();
        for page in 0..16 {
            let address = GuestAddress(PAGES + page * PAGE);
            memory.write_slice(&[0x5a; PAGE as usize], address).unwrap();
        }
        Self {
            balloon,
            notifier,
            drivers,
        }
    }

    fn new() -> Self {
        Self::with(&guest_memory(MEMORY), 0)
    }

    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<_> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.drivers[0].write(BUFFER, &bytes);
        self.drivers[0].add(&[readable(BUFFER, bytes.len() as u32)]);
        self.drivers[0].kick();
        self.drivers[0].wait_used();
    }

    /// Which of the 16 pages are as they were.
    fn kept(&self) -> Vec<u64> {
        let kept = |page: &u64| match &self.drivers[0].read(PAGES + page * PAGE, PAGE as usize)[..]
        {
            bytes if bytes.iter().all(|&byte| byte == 0x5a) => true,
            bytes if bytes.iter().all(|&byte| byte == 0) => false,
            _ => panic!("page {page} is neither"),
        };
        (0..16).filter(kept).collect()
    }
}

fn page(number: u64) -> u32 {
    (PAGES / PAGE + number) as u32
}

/// Guest memory that other processes could map.
fn shared_memory() -> Arc<GuestMemory> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY as u64).unwrap();
    let mapping = MmapRegionBuilder::new(MEMORY)
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    Arc::new(GuestMemory::from_regions(vec![region]).unwrap())
}

#[test]
fn pages_of_an_inflated_balloon_go_back() {
    for memory in [guest_memory(MEMORY), shared_memory()] {
        let mut rig = Rig::with(&memory, 0);
        rig.inflate(&[page(1), page(2), page(9), page(8), page(7), page(15)]);
        assert_eq!(rig.kept(), [0, 3, 4, 5, 6, 10, 11, 12, 13, 14]);
        assert_eq!(rig.balloon.handle().usage().inflated, 6 * PAGE);
    }
}

#[test]
fn pages_that_are_no_memory_harm_nobody() {
    let mut rig = Rig::new();
    let end = (MEMORY as u64 / PAGE) as u32;
    rig.inflate(&[end, u32::MAX, 0x000f_ffff, end - 1, u32::MAX - 1, page(3)]);
    assert_eq!(rig.kept().len(), 15);
    assert_eq!(rig.balloon.handle().usage().inflated, 2 * PAGE);
    assert!(rig.notifier.log().needs_reset.is_empty());
}

#[test]
fn free_pages_go_back_when_they_are_reported() {
    for (refused, queue) in [(0, 3), (STATS, 2)] {
        let mut rig = Rig::with(&guest_memory(MEMORY), refused);
        let driver = &mut rig.drivers[queue];
        // Of pages that are not all free, none goes back.
        driver.add(&[
            writable(PAGES + PAGE, 2 * PAGE as u32),
            writable(PAGES + 5 * PAGE - 8, 2 * PAGE as u32),
            writable(PAGES + 9 * PAGE, 100),
        ]);
        driver.kick();
        assert_eq!(driver.wait_used().1, 0);
        assert_eq!(rig.kept(), [0, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(rig.balloon.handle().usage().reported, 3 * PAGE);
    }
}

#[test]
fn filled_pages_stay() {
    let mut rig = Rig::new();
    let features = rig.balloon.features();
    rig.balloon.write_config(features & !POISON, 12, &[0xaa; 4]);
    let mut poison = [0xff; 4];
    rig.balloon.read_config(12, &mut poison);
    assert_eq!(poison, [0; 4], "without the feature there is none");
    rig.balloon.write_config(features, 12, &[0xaa; 4]);
    rig.drivers[3].add(&[writable(PAGES, 4 * PAGE as u32)]);
    rig.drivers[3].kick();
    rig.drivers[3].wait_used();
    assert_eq!(rig.kept().len(), 16);
}

#[test]
fn broken_rules_stop_the_device() {
    for (queue, len) in [(0, 4 * 4097), (2, 1025), (3, 4096)] {
        let mut rig = Rig::new();
        rig.drivers[queue].add(&[readable(BUFFER, len)]);
        rig.drivers[queue].kick();
        rig.notifier.wait(|log| log.needs_reset.len() == 1);
        assert_eq!(rig.kept().len(), 16);
        assert_eq!(rig.balloon.deactivate().len(), 4);
    }
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    let mut bytes = tag.to_le_bytes().to_vec();
    bytes.extend(value.to_le_bytes());
    bytes
}

#[test]
fn statistics_are_renewed_on_demand() {
    let mut rig = Rig::new();
    let handle = rig.balloon.handle();
    assert_eq!(handle.stats(), (0, GuestMemoryStats::default()));
    let tell = |driver: &mut Driver, free| {
        let bytes = [stat(4, free), stat(5, 1 << 30), stat(999, 7), vec![1, 2, 3]].concat();
        driver.write(BUFFER, &bytes);
        driver.add(&[readable(BUFFER, bytes.len() as u32)]);
        driver.kick();
    };
    let wait = |generation| {
        let start = Instant::now();
        while handle.stats().0 == generation {
            assert!(start.elapsed() < PATIENCE, "no statistics");
            std::thread::yield_now();
        }
        handle.stats().1
    };
    tell(&mut rig.drivers[2], 1000);
    let told = GuestMemoryStats {
        free: Some(1000),
        total: Some(1 << 30),
        ..GuestMemoryStats::default()
    };
    assert_eq!(wait(0), told);
    assert!(rig.drivers[2].take_used().is_none(), "they wait");
    let before = handle.renew_stats();
    rig.drivers[2].wait_used();
    tell(&mut rig.drivers[2], 2000);
    assert_eq!(wait(before).free, Some(2000));
}

#[test]
fn the_guest_is_told_what_it_shall_do_without() {
    let mut rig = Rig::new();
    let handle = rig.balloon.handle();
    handle.ask(10 * PAGE + 1);
    rig.notifier.wait(|log| log.config == 1);
    handle.ask(10 * PAGE);
    let mut wanted = [0; 4];
    rig.balloon.read_config(0, &mut wanted);
    assert_eq!(u32::from_le_bytes(wanted), 10);
    rig.balloon.write_config(0, 4, &7_u32.to_le_bytes());
    rig.balloon.write_config(0, 0, &99_u32.to_le_bytes());
    let usage = handle.usage();
    assert_eq!((usage.wanted, usage.actual), (10 * PAGE, 7 * PAGE));
    assert!(usage.driver);
    assert_eq!(rig.notifier.log().config, 1, "nothing new is not told");

    rig.balloon.deactivate();
    rig.balloon.reset();
    let usage = handle.usage();
    assert_eq!((usage.wanted, usage.actual), (10 * PAGE, 0));
    assert!(!usage.driver);
}

proptest! {
    #[test]
    fn state_survives(wanted: u32, actual: u32, poison: u32) {
        let state = DeviceState::Balloon(BalloonState { wanted, actual, poison });
        let json = serde_json::to_string(&state).unwrap();
        let mut balloon = Balloon::new(Arc::new(TestLoop::new())).unwrap();
        balloon.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        prop_assert_eq!(balloon.state(), state);
        prop_assert!(balloon.restore(&DeviceState::Rng).is_err());
    }
}
