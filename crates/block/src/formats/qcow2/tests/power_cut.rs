//! What is left of an image when the power fails.
//!
//! Everything that is done to the image's files is recorded. Then the power fails after any of it:
//! what was synced is there, and any part of what was not. Each image that this may leave must be
//! sound, apart from lost space, and have all data that a flush has acknowledged.
//!
//! `POWER_CUTS` sets how many failures there are for each kind of image.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::replay::{Disk, crash};
use super::setup::{
    Image, Random, SNAPSHOT_STAMP, Shape, below_stamp, qemu, shapes, stamp_of, stamped,
};
use crate::formats::qcow2::Qcow2Disk;
use crate::formats::qcow2::check::{CheckReport, Repair, check};
use crate::formats::qcow2::open::{Memory, open_disk_within, open_layer};
use crate::host::HostFile;
use crate::host::record::{Event, Recorder, Recording};
use crate::stack::Stack;
use crate::{BlockBackend, BlockError, VolatileSlice};

pub const SIZE: u64 = 1 << 19;
const GROWN: u64 = SIZE + (1 << 18);
const SECTORS: u64 = SIZE / 512;
const GROWN_SECTORS: u64 = GROWN / 512;

/// What was done to the disk.
#[derive(Clone, Debug)]
enum Done {
    /// These sectors have this stamp.
    Write(Range<u64>, u64),
    /// These sectors have their old content, or are zero.
    Discard(Range<u64>),
    /// All that was done before is durable.
    Flush,
    /// The disk has its final size.
    Grow,
}

/// Something done, and the numbers of the marks before and after it.
#[derive(Clone, Debug)]
struct Op {
    done: Done,
    begin: usize,
    end: usize,
}

#[derive(Debug, Default)]
struct Log {
    recorder: Arc<Recorder>,
    ops: Mutex<Vec<Op>>,
    stamps: std::sync::atomic::AtomicU64,
}

impl Log {
    fn record(&self, done: Done, action: impl FnOnce() -> Result<(), BlockError>) {
        let begin = self.recorder.note(0, Event::Mark);
        action().unwrap();
        let end = self.recorder.note(0, Event::Mark);
        self.ops.lock().unwrap().push(Op { done, begin, end });
    }

    fn next_stamp(&self) -> u64 {
        1 + self
            .stamps
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }
}

pub fn host(file: &std::fs::File, recording: Option<Recording>) -> Arc<HostFile> {
    let mut host = HostFile::new(file.try_clone().unwrap(), "image", false).unwrap();
    host.recording = recording;
    Arc::new(host)
}

pub fn below(image: &Image) -> Stack {
    Stack::new(image.below().into_iter().collect())
}

pub fn open(image: &Image, recorder: Option<&Arc<Recorder>>) -> Result<Qcow2Disk, BlockError> {
    let recording = |file| {
        recorder.map(|recorder| Recording {
            recorder: Arc::clone(recorder),
            file,
        })
    };
    let data = image.data.iter().map(|data| host(data, recording(1)));
    // So little that tables have to be written before anybody flushes.
    let memory = Memory {
        tables: if recorder.is_some() { 1 } else { 1 << 20 },
        refcounts: 1,
    };
    let file = host(&image.file, recording(0));
    open_disk_within(memory, file, data.collect(), below(image))
}

/// Does something to the sectors of one thread of `threads`.
fn act(disk: &Qcow2Disk, log: &Log, thread: u64, threads: u64, random: &mut Random) {
    // Threads share clusters, but no sectors.
    const STRIPE: u64 = 5;
    let all = disk.size() / 512;
    let range = if threads == 1 {
        let start = random.below(all);
        let longest = (all - start).min(if random.below(6) == 0 { 700 } else { 20 });
        start..start + 1 + random.below(longest)
    } else {
        let stripes = all / STRIPE / threads;
        let start = (random.below(stripes) * threads + thread) * STRIPE;
        start..start + 1 + random.below(STRIPE)
    };
    let (offset, len) = (range.start * 512, (range.end - range.start) * 512);
    match random.below(20) {
        0..=2 => log.record(Done::Flush, || disk.flush()),
        3..=4 => log.record(Done::Discard(range), || disk.discard(offset, len)),
        5..=6 => {
            let unmap = random.below(2) == 0;
            log.record(Done::Write(range, 0), || {
                disk.write_zeroes(offset, len, unmap)
            });
        }
        7 if threads == 1 => {
            let cluster = disk.image.layout.cluster_size();
            let offset = offset - offset % cluster;
            let range = offset / 512..(offset + cluster).min(disk.size()) / 512;
            let stamp = log.next_stamp();
            let data = stamped(stamp).repeat((range.end - range.start) as usize);
            log.record(Done::Write(range, stamp), || {
                disk.write_compressed(offset, &data)
            });
        }
        _ => {
            let stamp = log.next_stamp();
            let mut data = stamped(stamp).repeat((range.end - range.start) as usize);
            let bufs = [VolatileSlice::from(&mut data[..])];
            log.record(Done::Write(range, stamp), || {
                disk.write_vectored(&bufs, offset)
            });
        }
    }
}

/// What a sector may be if the power fails after `events` events.
fn possible(ops: &[Op], sector: u64, first: u64, events: usize) -> Vec<u64> {
    let flushed = ops
        .iter()
        .filter(|op| matches!(op.done, Done::Flush) && op.end < events)
        .map(|op| op.begin)
        .max();
    // What it may be durably, and otherwise.
    let mut possible = vec![first];
    let mut latest = vec![first];
    for op in ops.iter().filter(|op| op.begin < events) {
        match &op.done {
            Done::Write(range, stamp) if range.contains(&sector) => latest = vec![*stamp],
            Done::Discard(range) if range.contains(&sector) => latest.push(0),
            _ => continue,
        }
        if flushed.is_some_and(|flushed| op.end < flushed) {
            possible.clear();
        }
        possible.extend(&latest);
    }
    possible
}

/// What a sector is before anything is done.
pub fn first_stamp(shape: &Shape, sector: u64) -> u64 {
    if shape.snapshot && sector < shape.options.size / 2 / 512 {
        SNAPSHOT_STAMP
    } else if sector < shape.below / 512 && sector < SECTORS {
        below_stamp(sector)
    } else {
        0
    }
}

/// A run of which everything is known.
struct Run {
    shape: Shape,
    image: Image,
    before: Vec<Disk>,
    events: Vec<(usize, Event)>,
    ops: Vec<Op>,
}

fn run(shape: &Shape, threads: u64, count: u64, random: &mut Random) -> Run {
    let image = Image::new(shape);
    let mut before = vec![Disk::of(&image.file)];
    before.extend(image.data.as_ref().map(Disk::of));
    let log = Log::default();
    let disk = open(&image, Some(&log.recorder)).unwrap();
    let grows = threads == 1 && !(shape.snapshot && shape.options.version == 2);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let mut random = Random::from(random.below(u64::MAX));
            let (disk, log) = (&disk, &log);
            scope.spawn(move || {
                for step in 0..count / threads {
                    if grows && step == count / 2 {
                        log.record(Done::Grow, || disk.resize(GROWN));
                    }
                    act(disk, log, thread, threads, &mut random);
                }
            });
        }
    });
    drop(disk);
    let mut ops = log.ops.into_inner().unwrap();
    // As they were done, where they are about the same sectors.
    ops.sort_by_key(|op| op.begin);
    Run {
        shape: shape.clone(),
        image,
        before,
        events: log.recorder.take(),
        ops,
    }
}

impl Run {
    /// Has the power fail after so many events, and looks at what is left.
    fn cut(&self, events: usize, random: &mut Random, with_qemu: bool) {
        let left = crash(&self.before, &self.events[..events], random);
        for (file, disk) in [Some(&self.image.file), self.image.data.as_ref()]
            .into_iter()
            .flatten()
            .zip(&left)
        {
            file.set_len(0).unwrap();
            file.write_all_at(&disk.bytes, 0).unwrap();
        }
        let says = format!(
            "{}, {events} of {} events",
            self.shape.name,
            self.events.len()
        );
        let report = self.check();
        assert_eq!(report.corruptions, 0, "{says}: {:?}", report.messages);
        if with_qemu {
            let args = ["check", "-q", "-r", "leaks"];
            let text = qemu("qemu-img", &args, &self.image.path("image"));
            assert!(!text.contains("ERROR"), "{says}: {text}");
        }
        let disk = open(&self.image, None).unwrap_or_else(|error| panic!("{says}: {error}"));
        self.check_content(&disk, events, &says);
        // The next session goes well too.
        let log = Log::default();
        for _ in 0..8 {
            act(&disk, &log, 0, 1, random);
        }
        drop(disk);
        let after = self.check();
        assert_eq!(after.corruptions, 0, "{says}: {:?}", after.messages);
        if self.shape.snapshot {
            self.check_snapshot(&says);
        }
    }

    fn check(&self) -> CheckReport {
        let file = std::fs::File::open(self.image.path("image")).unwrap();
        check(file, "image", Repair::No, &mut |_, _| {}).unwrap()
    }

    fn check_content(&self, disk: &Qcow2Disk, events: usize, says: &str) {
        let grown = self
            .ops
            .iter()
            .any(|op| matches!(op.done, Done::Grow) && op.end < events);
        let size = disk.size();
        assert!(size == GROWN || (size == SIZE && !grown), "{says}: {size}");
        let mut bytes = vec![0xee; size as usize];
        disk.read_vectored(&[VolatileSlice::from(&mut bytes[..])], 0)
            .unwrap_or_else(|error| panic!("{says}: {error:?}"));
        for (sector, content) in bytes.chunks_exact(512).enumerate() {
            let sector = sector as u64;
            let possible = possible(&self.ops, sector, first_stamp(&self.shape, sector), events);
            let stamp = stamp_of(content);
            assert!(
                stamp.is_some_and(|stamp| possible.contains(&stamp)),
                "{says}: sector {sector} is {stamp:x?}, not of {possible:x?}"
            );
        }
        assert!(bytes.len() as u64 / 512 <= GROWN_SECTORS);
    }

    fn check_snapshot(&self, says: &str) {
        let layer = open_layer(host(&self.image.file, None), vec![], Some("kept")).unwrap();
        let mut layers = vec![layer.layer];
        layers.extend(below(&self.image).layers().iter().cloned());
        let stack = Stack::new(layers);
        let mut bytes = vec![0xee; SIZE as usize];
        let bufs = [VolatileSlice::from(&mut bytes[..])];
        stack.read(crate::host::Window::new(&bufs), 0).unwrap();
        for (sector, content) in bytes.chunks_exact(512).enumerate() {
            let expected = first_stamp(&self.shape, sector as u64);
            assert_eq!(stamp_of(content), Some(expected), "{says}: sector {sector}");
        }
    }
}

fn cuts() -> u64 {
    std::env::var("POWER_CUTS").map_or(45, |cuts| cuts.parse().unwrap())
}

fn cut_all(threads: u64, count: u64, cuts: u64) {
    let seed = Random::new().below(1 << 40);
    let shapes = shapes(SIZE);
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(shape) = shapes.get(at) else { return };
                    let mut random = Random::from(seed + at as u64);
                    let run = run(shape, threads, count, &mut random);
                    for cut in 0..cuts {
                        let events = random.below(run.events.len() as u64 + 1) as usize;
                        run.cut(events, &mut random, cut % 15 == 0);
                    }
                }
            });
        }
    });
}

#[test]
fn nothing_acknowledged_is_lost() {
    cut_all(1, 120, cuts());
}

#[test]
fn nothing_acknowledged_to_several_threads_is_lost() {
    cut_all(4, 240, cuts() / 3);
}
