//! Measures a disk natively: requests go through the rings of a virtio disk as a guest's would,
//! or, to tell the cost of those, straight to the block layer in one thread. Another program can
//! serve the rings by vhost-user instead, for comparison.
//!
//! Takes one [`Job`] as JSON, its only argument, and writes one [`Outcome`] as JSON.
//! `cargo xtask bench disks` runs it beside `qemu-img bench`, whose pattern of offsets it has.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss)]

#[path = "../../tests/driver/mod.rs"]
mod driver;
mod vhost_user;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use edgevmm_block::engine::{Ending, Engine, Helpers, Operation, Request};
use edgevmm_block::{BlockBackend, DiskOptions, open};
use edgevmm_devices::GuestMemory;
use edgevmm_devices::disk::Aio;
use edgevmm_devices::platform::{MachineControl, MachineRequest};
use edgevmm_devices::virtio::block::{Block, BlockConfig};
use edgevmm_devices::virtio::{Activation, ActiveQueue, DriverError, Notifier, VirtioDevice};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use driver::{Driver, RINGS, readable, writable};
use vhost_user::Remote;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Where a queue's headers and status bytes are.
const HEADERS: u64 = 0x10_0000;
/// Where the data buffers are.
const DATA: u64 = 0x100_0000;
/// What the drivers' threads are called.
const GUEST: &str = "guest";

/// How requests get to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// Through virtqueues.
    Virtio,
    /// To the engine, from its own thread, as `qemu-img bench` does it.
    Engine,
    /// Through virtqueues to another program.
    VhostUser,
}

/// A program that serves a disk by vhost-user.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    socket: PathBuf,
    pid: u32,
    /// Size of the disk in bytes.
    size: u64,
}

/// What is to be measured.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Job {
    image: PathBuf,
    #[serde(default)]
    direct: bool,
    #[serde(default)]
    write: bool,
    way: Way,
    /// Bytes of a request.
    block: u32,
    /// Bytes from one offset to the next, around the end of the disk.
    step: u64,
    /// Requests in flight on each queue.
    depth: usize,
    /// Requests in all.
    count: usize,
    #[serde(default = "one")]
    queues: u16,
    /// Without io_uring.
    #[serde(default)]
    threads: bool,
    /// Who serves the rings of a [`Way::VhostUser`].
    #[serde(default)]
    peer: Option<Peer>,
}

impl Job {
    fn aio(&self) -> Aio {
        if self.threads {
            Aio::Threads
        } else {
            Aio::Auto
        }
    }
}

fn one() -> u16 {
    1
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Outcome {
    seconds: f64,
    iops: f64,
    /// CPU time of a request in the device's threads, in microseconds.
    cpu: f64,
    /// Interrupts for a request.
    interrupts: f64,
    /// Time from sending to seeing it done, in microseconds: median, 99 %, 99.9 %.
    latency: [f64; 3],
}

/// Offsets as `qemu-img bench` has them.
struct Offsets {
    next: u64,
    step: u64,
    size: u64,
}

impl Offsets {
    fn new(job: &Job, size: u64) -> Self {
        Self {
            next: 0,
            step: job.step,
            size: size / u64::from(job.block) * u64::from(job.block),
        }
    }
}

impl Iterator for Offsets {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let offset = self.next;
        self.next = (offset + self.step) % self.size;
        Some(offset)
    }
}

/// Interrupts as an irqfd gets them.
#[derive(Debug)]
struct Interrupts(Vec<EventFd>);

impl Notifier for Interrupts {
    fn queue(&self, index: u16) {
        self.0[usize::from(index)].write(1).unwrap();
    }

    fn config(&self) {}

    fn needs_reset(&self, cause: &DriverError) {
        panic!("{cause}");
    }
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

/// The guest's side of one queue.
struct Queue {
    driver: Driver,
    offsets: Offsets,
    event: EventFd,
    base: u64,
    /// Chain head and start of each request in flight, by its slot.
    slots: Vec<Option<(u16, Instant)>>,
    latencies: Vec<u64>,
    interrupts: u64,
}

impl Queue {
    fn send(&mut self, slot: usize, write: bool, block: u32) {
        let offset = self.offsets.next().unwrap();
        let at = self.base + 0x20 * slot as u64;
        let data = self.base + DATA + slot as u64 * u64::from(block);
        let mut header = [0; 16];
        header[0] = write.into();
        header[8..].copy_from_slice(&(offset / 512).to_le_bytes());
        self.driver.write(at, &header);
        let data = if write {
            readable(data, block)
        } else {
            writable(data, block)
        };
        let head = self
            .driver
            .add(&[readable(at, 16), data, writable(at + 16, 1)]);
        self.slots[slot] = Some((head, Instant::now()));
    }

    fn run(&mut self, job: &Job) {
        let count = job.count / usize::from(job.queues);
        let (mut sent, mut done) = (0, 0);
        while sent < job.depth.min(count) {
            self.send(sent, job.write, job.block);
            sent += 1;
        }
        self.driver.kick();
        while done < count {
            let used = self.driver.used_index();
            self.driver.set_used_event(used);
            let mut any = false;
            while let Some((head, len)) = self.driver.take_used() {
                let taken = |slot: &Option<(u16, Instant)>| {
                    slot.is_some_and(|(taken, _)| u32::from(taken) == head)
                };
                let slot = self.slots.iter().position(taken).unwrap();
                let (_, start) = self.slots[slot].take().unwrap();
                self.latencies.push(nanos(start));
                assert_eq!(len, if job.write { 1 } else { job.block + 1 });
                done += 1;
                any = true;
                if sent < count {
                    self.send(slot, job.write, job.block);
                    sent += 1;
                }
            }
            if any {
                self.driver.kick();
            } else if done < count {
                self.interrupts += self.event.read().unwrap();
            }
        }
    }
}

/// The guest's side of a disk: its memory, its rings, and what interrupts it.
struct Guest {
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    queues: Vec<Queue>,
}

impl Guest {
    fn new(job: &Job, size: u64) -> Self {
        let block = u64::from(job.block);
        let span = HEADERS + DATA + (block * job.depth as u64).next_multiple_of(4096);
        let bytes = span * u64::from(job.queues);
        // Memory that another program can have too.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(bytes).unwrap();
        let file = FileOffset::new(file, 0);
        let ranges = [(GuestAddress(0), usize::try_from(bytes).unwrap(), Some(file))];
        let memory = Arc::new(GuestMemory::from_ranges_with_files(&ranges).unwrap());
        let events = |_| EventFd::new(0).unwrap();
        let interrupts = Arc::new(Interrupts((0..job.queues).map(events).collect()));
        const { assert!(RINGS < HEADERS) };
        let queue = |index: u16| {
            let base = span * u64::from(index);
            let share = size / u64::from(job.queues) / block * block;
            Queue {
                driver: Driver::new(&memory, base, QUEUE_SIZE),
                offsets: Offsets {
                    next: share * u64::from(index),
                    ..Offsets::new(job, size)
                },
                event: interrupts.0[usize::from(index)].try_clone().unwrap(),
                base: base + HEADERS,
                slots: vec![None; job.depth],
                latencies: Vec::with_capacity(job.count),
                interrupts: 0,
            }
        };
        let queues = (0..job.queues).map(queue).collect();
        Self {
            memory,
            interrupts,
            queues,
        }
    }

    /// Does all requests, whose CPU time is what `cpu` grows by.
    fn run(mut self, job: &Job, cpu: impl Fn() -> f64) -> Outcome {
        let before = cpu();
        let start = Instant::now();
        std::thread::scope(|scope| {
            for queue in &mut self.queues {
                std::thread::Builder::new()
                    .name(GUEST.into())
                    .spawn_scoped(scope, || queue.run(job))
                    .unwrap();
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let cpu = cpu() - before;
        let latencies = self.queues.iter().flat_map(|queue| &queue.latencies);
        let latencies = latencies.copied().collect();
        let interrupts = self.queues.iter().map(|queue| queue.interrupts).sum();
        outcome(latencies, seconds, cpu, interrupts)
    }
}

fn by_virtio(job: &Job) -> Outcome {
    let disk = open_disk(job);
    let guest = Guest::new(job, disk.size());
    let config = BlockConfig {
        name: "blk0".into(),
        serial: "bench".into(),
        queues: job.queues,
        aio: job.aio(),
        ..BlockConfig::default()
    };
    let mut block = Block::new(config, disk, Arc::new(NoControl));
    let active = guest.queues.iter().zip(0..);
    let active = active.map(|(queue, index)| ActiveQueue {
        index,
        queue: queue.driver.queue(true),
        kick: queue.driver.kick.clone(),
    });
    block
        .activate(Activation {
            features: block.features(),
            queues: active.collect(),
            notifier: guest.interrupts.clone(),
            memory: guest.memory.clone(),
        })
        .unwrap();
    guest.run(job, || cpu("self"))
}

fn by_vhost_user(job: &Job) -> Outcome {
    let peer = job.peer.as_ref().unwrap();
    let guest = Guest::new(job, peer.size);
    let features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
    let mut remote = Remote::connect(&peer.socket, features);
    remote.share(&guest.memory);
    for (index, queue) in (0..).zip(&guest.queues) {
        remote.serve(index, QUEUE_SIZE, &queue.driver, &queue.event);
    }
    let outcome = guest.run(job, || cpu(&peer.pid.to_string()));
    (0..job.queues).for_each(|index| remote.stop(index));
    outcome
}

fn by_engine(job: &Job) -> Outcome {
    let disk = open_disk(job);
    let block = job.block as usize;
    let bytes = block * job.depth;
    let memory: GuestMemory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
    let buffer = |slot| {
        let at = GuestAddress((slot * block) as u64);
        [memory.get_slice(at, block).unwrap()]
    };
    let helpers = Arc::new(Helpers::new("helper", &disk));
    let mut engine = Engine::new(disk.clone(), helpers, job.aio(), &[], Arc::default()).unwrap();
    let mut offsets = Offsets::new(job, disk.size());
    let mut latencies = Vec::with_capacity(job.count);
    let mut starts = vec![Instant::now(); job.depth];
    let mut ready: Vec<usize> = (0..job.depth).collect();
    let mut sent = 0;
    let before = cpu("self");
    let start = Instant::now();
    while latencies.len() < job.count {
        while sent < job.count
            && let Some(slot) = ready.pop()
        {
            let request = Request {
                operation: if job.write {
                    Operation::Write
                } else {
                    Operation::Read
                },
                offset: offsets.next().unwrap(),
                len: job.block.into(),
            };
            starts[slot] = Instant::now();
            sent += 1;
            let more = sent < job.count && !ready.is_empty();
            // SAFETY: the memory is mapped to the end of this function.
            let ended = unsafe { engine.begin(slot, request, &buffer(slot), more) };
            if let Some(result) = ended {
                result.unwrap();
                latencies.push(nanos(starts[slot]));
                ready.push(slot);
            }
        }
        let mut any = false;
        while let Some((slot, ending)) = engine.ended() {
            assert!(matches!(ending, Ending::Done(Ok(()))), "{ending:?}");
            latencies.push(nanos(starts[slot]));
            ready.push(slot);
            any = true;
        }
        if !any && latencies.len() < job.count {
            engine.wait(None).unwrap();
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    outcome(latencies, seconds, cpu("self") - before, 0)
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap()
}

fn open_disk(job: &Job) -> Arc<dyn BlockBackend> {
    let mut options = DiskOptions::new(file(job), "disk");
    options.direct = job.direct;
    options.read_only = !job.write;
    open(options).unwrap()
}

fn file(job: &Job) -> File {
    File::options()
        .read(true)
        .write(job.write)
        .open(&job.image)
        .unwrap()
}

fn outcome(mut latencies: Vec<u64>, seconds: f64, cpu: f64, interrupts: u64) -> Outcome {
    latencies.sort_unstable();
    let count = latencies.len() as f64;
    let part = |thousandths: usize| {
        let index = (latencies.len() * thousandths / 1000).min(latencies.len() - 1);
        latencies[index] as f64 / 1e3
    };
    Outcome {
        seconds,
        iops: count / seconds,
        cpu: cpu * 1e6 / count,
        interrupts: interrupts as f64 / count,
        latency: [part(500), part(990), part(999)],
    }
}

/// CPU time in seconds of a process's threads but the drivers', with those that the kernel makes
/// for its io_uring.
fn cpu(pid: &str) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    tasks
        .map(|task| task.unwrap().path())
        .filter(|path| !read(path.join("comm")).starts_with(GUEST))
        .map(|path| on_cpu(&read(path.join("schedstat"))))
        .sum()
}

/// The first figure of a schedstat: nanoseconds on a CPU.
fn on_cpu(schedstat: &str) -> f64 {
    let first = schedstat.split(' ').next();
    first.and_then(|first| first.parse().ok()).unwrap_or(0.0) / 1e9
}

fn main() {
    let job: Job = serde_json::from_str(&std::env::args().nth(1).unwrap()).unwrap();
    let outcome = match job.way {
        Way::Virtio => by_virtio(&job),
        Way::Engine => by_engine(&job),
        Way::VhostUser => by_vhost_user(&job),
    };
    println!("{}", serde_json::to_string(&outcome).unwrap());
}
