//! Several threads on one image, as the queues of a disk are.
//!
//! Each has sectors of its own and shares clusters with the others. Some of what they do is
//! planned, and done a while later, as by a queue of the kernel. What they read is always what they
//! wrote, and so it is in the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::power_cut::{SIZE, first_stamp, open};
use super::setup::{Image, Random, Shape, qemu, shapes, stamp_of, stamped};
use crate::formats::qcow2::Qcow2Disk;
use crate::host::record::Recorder;
use crate::plan::{Access, Plan};
use crate::{BlockBackend, VolatileSlice};

const THREADS: u64 = 4;
/// Sectors in a row that are of one thread.
const STRIPE: u64 = 3;
const STRIPES: u64 = SIZE / 512 / STRIPE / THREADS;

/// A thread and what its sectors are, by their stamps.
struct Worker<'a> {
    disk: &'a Qcow2Disk,
    thread: u64,
    stamps: Vec<[u64; STRIPE as usize]>,
    random: Random,
    plan: Plan,
}

impl Worker<'_> {
    fn offset(&self, stripe: u64) -> u64 {
        (stripe * THREADS + self.thread) * STRIPE * 512
    }

    fn act(&mut self) {
        let stripe = self.random.below(STRIPES);
        let offset = self.offset(stripe);
        let len = STRIPE * 512;
        let (disk, stamps) = (self.disk, stripe as usize);
        match self.random.below(40) {
            0 => disk.flush().unwrap(),
            1..=4 => {
                disk.discard(offset, len).unwrap();
                // What it is now is what it is.
                let seen = self.read(offset);
                for (known, now) in self.stamps[stamps].iter_mut().zip(seen) {
                    assert!(
                        now == *known || now == 0,
                        "{now:x} after a discard of {known:x}"
                    );
                    *known = now;
                }
            }
            5..=7 => {
                let unmap = self.random.below(2) == 0;
                disk.write_zeroes(offset, len, unmap).unwrap();
                self.stamps[stamps] = [0; STRIPE as usize];
            }
            8..=22 => {
                let stamp = 1 + self.random.below(1 << 30);
                self.write(offset, stamp);
                self.stamps[stamps] = [stamp; STRIPE as usize];
            }
            _ => {
                let seen = self.read(offset);
                assert_eq!(seen, self.stamps[stamps], "at {offset}");
            }
        }
    }

    fn write(&mut self, offset: u64, stamp: u64) {
        self.write_data(offset, stamped(stamp).repeat(STRIPE as usize));
    }

    fn write_data(&mut self, offset: u64, mut data: Vec<u8>) {
        if self.begin(Access::Write, offset, data.len()) {
            let mut rest = &data[..];
            for piece in self.plan.pieces() {
                let (now, later) = rest.split_at(piece.len as usize);
                let file = piece.file.as_ref().unwrap();
                file.write_buf(now, piece.offset).unwrap();
                rest = later;
            }
            self.plan.end();
        } else {
            let bufs = [VolatileSlice::from(&mut data[..])];
            self.disk.write_vectored(&bufs, offset).unwrap();
        }
    }

    fn read(&mut self, offset: u64) -> [u64; STRIPE as usize] {
        let data = self.read_data(offset, STRIPE * 512);
        let stamps: Vec<u64> = data
            .chunks_exact(512)
            .map(|sector| stamp_of(sector).unwrap_or_else(|| panic!("torn at {offset}")))
            .collect();
        stamps.try_into().unwrap()
    }

    fn read_data(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0xee; len as usize];
        if self.begin(Access::Read, offset, data.len()) {
            let mut rest = &mut data[..];
            for piece in self.plan.pieces() {
                let (now, later) = rest.split_at_mut(piece.len as usize);
                match &piece.file {
                    Some(file) => file.read_buf(now, piece.offset).unwrap(),
                    None => now.fill(0),
                }
                rest = later;
            }
            self.plan.end();
        } else {
            let bufs = [VolatileSlice::from(&mut data[..])];
            self.disk.read_vectored(&bufs, offset).unwrap();
        }
        data
    }

    /// Whether a request is planned; if so it is time to do it, later than it was planned.
    fn begin(&mut self, access: Access, offset: u64, len: usize) -> bool {
        let plan = &mut self.plan;
        let planned =
            self.random.below(2) == 0 && self.disk.plan(access, offset, len as u64, plan).unwrap();
        if planned && self.random.below(4) == 0 {
            std::thread::sleep(Duration::from_micros(self.random.below(2000)));
        }
        planned
    }
}

fn work(shape: &Shape, time: Duration, random: &mut Random) {
    let image = Image::new(shape);
    let recorder = Arc::new(Recorder::default());
    let disk = open(&image, Some(&recorder)).unwrap();
    let mut stamps = Vec::new();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for thread in 0..THREADS {
            let random = Random::from(random.below(u64::MAX));
            let mut worker = Worker {
                disk: &disk,
                thread,
                stamps: Vec::new(),
                random,
                plan: Plan::default(),
            };
            worker.stamps = (0..STRIPES)
                .map(|stripe| {
                    let first = worker.offset(stripe) / 512;
                    std::array::from_fn(|at| first_stamp(shape, first + at as u64))
                })
                .collect();
            workers.push(scope.spawn(move || {
                let end = Instant::now() + time;
                while Instant::now() < end {
                    worker.act();
                }
                worker.stamps
            }));
        }
        for worker in workers {
            stamps.push(worker.join().unwrap());
        }
    });
    drop(disk);
    let says = shape.name;
    qemu("qemu-img", &["check", "-q"], &image.path("image"));
    let disk = open(&image, None).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    disk.read_vectored(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap();
    for (thread, stamps) in (0..).zip(&stamps) {
        for (stripe, stamps) in (0..).zip(stamps) {
            let first = (stripe * THREADS + thread) * STRIPE;
            for (at, stamp) in (first..).zip(stamps) {
                let sector = &bytes[at as usize * 512..][..512];
                assert_eq!(stamp_of(sector), Some(*stamp), "{says}: sector {at}");
            }
        }
    }
}

/// `SECONDS` sets for how long.
#[test]
fn threads_do_not_disturb_each_other() {
    let mut random = Random::new();
    let shapes = shapes(SIZE);
    let seconds = std::env::var("SECONDS").map_or(3, |seconds| seconds.parse().unwrap());
    let time = Duration::from_secs(seconds) / shapes.len() as u32;
    for shape in shapes {
        work(&shape, time, &mut random);
    }
}

/// The content of a sector that says which one it is.
fn named(sector: u64, number: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&(sector << 32 | 1 << 31 | number).to_le_bytes());
    }
    bytes
}

/// Threads write, read, free and zero the same ranges. A sector may be anything that was ever
/// written to it, but never what belongs elsewhere: a request that goes to a cluster which was freed
/// meanwhile must find that nobody else has got it yet.
fn race(shape: &Shape, time: Duration, random: &mut Random) {
    let image = Image::new(shape);
    let recorder = Arc::new(Recorder::default());
    let disk = open(&image, Some(&recorder)).unwrap();
    let check = |first: u64, data: &[u8]| {
        for (sector, bytes) in (first..).zip(data.chunks_exact(512)) {
            let initial = stamped(first_stamp(shape, sector));
            for (word, initial) in bytes.chunks_exact(8).zip(initial.chunks_exact(8)) {
                let number = u64::from_le_bytes(*word.first_chunk().unwrap());
                let own = number >> 31 == sector << 1 | 1;
                let says = shape.name;
                assert!(
                    number == 0 || own || word == initial,
                    "{says}: {number:x} in sector {sector:x}"
                );
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let random = Random::from(random.below(u64::MAX));
            let (disk, check) = (&disk, &check);
            let mut worker = Worker {
                disk,
                thread: 0,
                stamps: Vec::new(),
                random,
                plan: Plan::default(),
            };
            scope.spawn(move || {
                let end = Instant::now() + time;
                while Instant::now() < end {
                    let all = SIZE / 512;
                    // Few places, so that they are often the same.
                    let first = worker.random.below(16) * (all / 16) + worker.random.below(9);
                    let count = 1 + worker.random.below((all - first).min(150));
                    let (offset, len) = (first * 512, count * 512);
                    match worker.random.below(12) {
                        0..=1 => disk.flush().unwrap(),
                        2..=3 => disk.discard(offset, len).unwrap(),
                        4 => disk.write_zeroes(offset, len, true).unwrap(),
                        5..=8 => {
                            let number = worker.random.below(1 << 30);
                            let data = (first..first + count).flat_map(|at| named(at, number));
                            worker.write_data(offset, data.collect());
                        }
                        _ => check(first, &worker.read_data(offset, len)),
                    }
                }
            });
        }
    });
    drop(disk);
    qemu("qemu-img", &["check", "-q"], &image.path("image"));
    let disk = open(&image, None).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    disk.read_vectored(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap();
    check(0, &bytes);
}

/// `SECONDS` sets for how long.
#[test]
fn freed_space_is_not_used_while_a_request_may() {
    let mut random = Random::new();
    let shapes = shapes(SIZE);
    let seconds = std::env::var("SECONDS").map_or(3, |seconds| seconds.parse().unwrap());
    let time = Duration::from_secs(seconds) / shapes.len() as u32;
    for shape in shapes {
        race(&shape, time, &mut random);
    }
}

/// As above, but step by step.
#[test]
fn a_planned_write_keeps_what_it_goes_to() {
    const CLUSTER: u64 = 4096;
    let shape = &shapes(SIZE)[1];
    assert_eq!(shape.options.cluster_size, CLUSTER);
    let image = Image::new(shape);
    let disk = open(&image, None).unwrap();
    let write = |cluster: u64, byte: u8| {
        let mut data = vec![byte; CLUSTER as usize];
        let bufs = [VolatileSlice::from(&mut data[..])];
        disk.write_vectored(&bufs, cluster * CLUSTER).unwrap();
    };
    let read = |cluster: u64| {
        let mut data = vec![0xee; CLUSTER as usize];
        let bufs = [VolatileSlice::from(&mut data[..])];
        disk.read_vectored(&bufs, cluster * CLUSTER).unwrap();
        data
    };
    write(0, 1);
    disk.flush().unwrap();
    for round in 1..4 {
        let mut plan = Plan::default();
        let planned = disk.plan(Access::Write, 0, CLUSTER, &mut plan).unwrap();
        assert!(planned);
        let piece = plan.pieces().next().unwrap().clone();
        disk.discard(0, CLUSTER).unwrap();
        for more in 0..3 {
            disk.flush().unwrap();
            // A place that is free must be another one.
            write(round * 4 + more, 2);
        }
        let late = vec![9; CLUSTER as usize];
        piece.file.unwrap().write_buf(&late, piece.offset).unwrap();
        for more in 0..3 {
            assert_eq!(read(round * 4 + more), [2; CLUSTER as usize]);
        }
        plan.end();
        // Now it is free indeed, and the next to be taken.
        disk.discard(round * 4 * CLUSTER, CLUSTER).unwrap();
        disk.flush().unwrap();
        disk.flush().unwrap();
        let len = image.file.metadata().unwrap().len();
        write(0, 1);
        disk.flush().unwrap();
        assert_eq!(image.file.metadata().unwrap().len(), len);
    }
}
