#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod new_data;

use std::fs::File;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use proptest::prelude::*;
use tempfile::{NamedTempFile, tempfile_in};

use super::*;
use crate::host::HostFile;
use crate::plan::Piece;
use crate::{DiskOptions, ImageFormat, Limits, check_range, open};

const DISK: u64 = 1 << 20;

/// How an engine can be.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Ring,
    /// As with a kernel that counts all waiting in io_uring as waiting for I/O.
    OldRing,
    Threads,
}

const KINDS: [Kind; 3] = [Kind::Ring, Kind::OldRing, Kind::Threads];

struct Rig {
    // Goes first: it waits for its requests.
    engine: Engine,
    event: Arc<EventFd>,
    cancelled: Arc<AtomicBool>,
}

impl Rig {
    fn new(kind: Kind, backend: Arc<dyn BlockBackend>) -> Self {
        let event = Arc::new(EventFd::new().unwrap());
        let cancelled = Arc::new(AtomicBool::new(false));
        let aio = match kind {
            Kind::Threads => Aio::Threads,
            Kind::Ring | Kind::OldRing => Aio::Auto,
        };
        let helper = Arc::new(Helpers::new("helper", &backend));
        let events = [event.as_fd()];
        let flag = Arc::clone(&cancelled);
        let mut engine = Engine::new(backend, helper, aio, &events, flag).unwrap();
        match (kind, &mut engine.waiter) {
            (Kind::Threads, Waiter::Events(_)) | (Kind::Ring, Waiter::Ring(_)) => {}
            (Kind::OldRing, Waiter::Ring(ring)) => {
                let mail = engine.mailbox.event();
                let events = [event.as_fd(), mail.as_fd()];
                **ring = Uring::new_compatible(&events).unwrap();
            }
            (kind, waiter) => panic!("{kind:?}, but {waiter:?}"),
        }
        Self {
            engine,
            event,
            cancelled,
        }
    }

    fn begin(
        &mut self,
        token: usize,
        operation: Operation,
        offset: u64,
        memory: &mut [u8],
    ) -> Option<Result<(), BlockError>> {
        let len = memory.len();
        let (first, second) = memory.split_at_mut(len / 3);
        let bufs = [VolatileSlice::from(first), VolatileSlice::from(second)];
        let request = Request {
            operation,
            offset,
            len: len as u64,
        };
        // SAFETY: tests keep the memory until the request has ended.
        unsafe { self.engine.begin(token, request, &bufs, false) }
    }

    fn wait_end(&mut self) -> (usize, Ending) {
        loop {
            if let Some(ended) = self.engine.ended() {
                return ended;
            }
            self.engine.wait(None).unwrap();
        }
    }

    /// Does one request to its end.
    fn run(
        &mut self,
        operation: Operation,
        offset: u64,
        memory: &mut [u8],
    ) -> Result<(), BlockError> {
        if let Some(result) = self.begin(0, operation, offset, memory) {
            return result;
        }
        match self.wait_end() {
            (0, Ending::Done(result)) => result,
            (0, Ending::Unfinished) => {
                let access = match operation {
                    Operation::Write => Access::Write,
                    _ => Access::Read,
                };
                self.engine
                    .call(access, offset, &[VolatileSlice::from(memory)])
            }
            (token, _) => panic!("request {token} was not begun"),
        }
    }
}

fn raw(direct: bool) -> (NamedTempFile, Arc<dyn BlockBackend>) {
    let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(DISK).unwrap();
    let disk = open(DiskOptions {
        format: Some(ImageFormat::Raw),
        direct,
        ..DiskOptions::new(file.reopen().unwrap(), "disk")
    });
    (file, disk.unwrap())
}

/// A disk whose requests take as long as a test wants.
#[derive(Debug)]
struct Slow {
    begun: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl Slow {
    fn new() -> (Arc<Self>, Receiver<()>, Sender<()>) {
        let (begun, wait_begun) = channel();
        let (release, go_on) = channel();
        let slow = Self {
            begun: Mutex::new(begun),
            go_on: Mutex::new(go_on),
        };
        (Arc::new(slow), wait_begun, release)
    }

    fn block(&self) -> Result<(), BlockError> {
        self.begun.lock().unwrap().send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        Ok(())
    }
}

impl BlockBackend for Slow {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits {
            logical_block: 512,
            physical_block: 512,
            discard_granularity: 512,
        }
    }
    fn read_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        Ok(())
    }
    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        self.block()
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.block()
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        self.block()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        self.block()
    }
}

/// A disk in pieces of 64 KiB: of one file, of another, and of nothing, in turns.
#[derive(Debug)]
struct Pieces {
    files: [Arc<HostFile>; 2],
}

const PIECE: u64 = 64 << 10;

impl BlockBackend for Pieces {
    fn size(&self) -> u64 {
        DISK
    }
    fn read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        Slow::new().0.limits()
    }
    fn read_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        panic!("there is a plan for each request");
    }
    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
    fn plan(&self, _: Access, offset: u64, len: u64, plan: &mut Plan) -> Result<bool, BlockError> {
        check_range(offset, len, DISK)?;
        let mut at = offset;
        while at < offset + len {
            let end = (at / PIECE + 1) * PIECE;
            let index = (at / PIECE % 3) as usize;
            let piece = Piece {
                file: self.files.get(index).cloned(),
                offset: at,
                len: end.min(offset + len) - at,
            };
            at += piece.len;
            assert!(plan.push(piece));
        }
        Ok(true)
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Each request has a part of the disk for itself, so that their order makes no difference.
    #[test]
    fn many_at_once_do_what_was_asked(
        direct: bool,
        rounds in proptest::collection::vec(
            proptest::collection::vec((any::<bool>(), 0..64_u64, 1..65_u64), 1..16),
            1..5,
        ),
    ) {
        const PART: u64 = DISK / 16;
        for kind in KINDS {
            let (file, disk) = raw(direct);
            let mut rig = Rig::new(kind, disk);
            let mut model = vec![0; DISK as usize];
            for (round, requests) in (1_u8..).zip(&rounds) {
                let mut memories = Vec::new();
                for (number, (write, sector, count)) in requests.iter().enumerate() {
                    let offset = PART * number as u64 + 512 * sector;
                    let len = 512 * count.min(&(128 - sector));
                    let fill = if *write { round * 16 + number as u8 } else { 0xee };
                    memories.push((offset, *write, vec![fill; len as usize]));
                }
                let mut under_way = 0;
                for (token, (offset, write, memory)) in memories.iter_mut().enumerate() {
                    let operation = if *write { Operation::Write } else { Operation::Read };
                    match rig.begin(token, operation, *offset, memory) {
                        Some(result) => result.unwrap(),
                        None => under_way += 1,
                    }
                }
                while under_way > 0 {
                    let (token, ending) = rig.wait_end();
                    prop_assert!(matches!(ending, Ending::Done(Ok(()))), "{} {:?}", token, ending);
                    under_way -= 1;
                }
                prop_assert!(!rig.engine.is_busy());
                for (offset, write, memory) in &memories {
                    let place = &mut model[*offset as usize..][..memory.len()];
                    if *write {
                        place.copy_from_slice(memory);
                    } else {
                        prop_assert_eq!(&*place, &memory[..]);
                    }
                }
            }
            prop_assert!(std::fs::read(file.path()).unwrap() == model, "{:?}", kind);
        }
    }
}

#[test]
fn plans_of_many_pieces() {
    let file = |byte: u8| {
        let file = tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        io::Write::write_all(&mut &file, &vec![byte; DISK as usize]).unwrap();
        Arc::new(HostFile::new(file, "file", byte == 1).unwrap())
    };
    let files = [file(1), file(2)];
    for kind in [Kind::Ring, Kind::OldRing] {
        let files = files.clone();
        let mut rig = Rig::new(kind, Arc::new(Pieces { files }));
        for (offset, len) in [(0, 7 * PIECE), (PIECE - 512, 1024), (PIECE / 2, 4 * PIECE)] {
            let mut memory = vec![9; len as usize];
            rig.run(Operation::Read, offset, &mut memory).unwrap();
            for (at, byte) in (offset..).zip(memory) {
                assert_eq!(u64::from(byte), (at / PIECE + 1) % 3, "at {at}, {kind:?}");
            }
        }
        let error = rig.run(Operation::Read, DISK, &mut [0; 512]).unwrap_err();
        assert!(matches!(error, BlockError::OutOfRange { .. }));
    }
}

#[test]
fn a_file_that_ends_early_reads_as_zeroes_there() {
    for kind in KINDS {
        for direct in [false, true] {
            let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            io::Write::write_all(&mut file.as_file(), &[7; 1000]).unwrap();
            let disk = open(DiskOptions {
                format: Some(ImageFormat::Raw),
                direct,
                ..DiskOptions::new(file.reopen().unwrap(), "disk")
            });
            let mut rig = Rig::new(kind, disk.unwrap());
            let mut memory = [9; 1024];
            rig.run(Operation::Read, 0, &mut memory).unwrap();
            assert_eq!(
                (&memory[..1000], &memory[1000..]),
                (&[7; 1000][..], &[0; 24][..])
            );
            // It is not what was there if somebody cuts the file.
            file.as_file().set_len(900).unwrap();
            rig.run(Operation::Read, 0, &mut memory).unwrap_err();
        }
    }
}

#[test]
fn what_the_host_refuses_is_told() {
    for kind in KINDS {
        let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().set_len(DISK).unwrap();
        // Not open for writing, so that each write fails.
        let read_only = File::open(file.path()).unwrap();
        let disk = open(DiskOptions {
            format: Some(ImageFormat::Raw),
            direct: true,
            ..DiskOptions::new(read_only, "disk")
        });
        let mut rig = Rig::new(kind, disk.unwrap());
        let error = rig.run(Operation::Write, 512, &mut [0; 4096]).unwrap_err();
        let BlockError::Io {
            op,
            offset,
            len,
            source,
        } = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((op, offset, len), ("write", 512, 4096));
        assert_eq!(source.raw_os_error(), Some(libc::EBADF));
    }
}

#[test]
fn slow_requests_do_not_hold_up_others() {
    for kind in KINDS {
        let (slow, begun, release) = Slow::new();
        let mut rig = Rig::new(kind, slow);
        for operation in [
            Operation::Flush,
            Operation::Discard,
            Operation::WriteZeroes { may_unmap: true },
        ] {
            assert!(rig.begin(3, operation, 0, &mut [0; 512]).is_none());
            begun.recv().unwrap();
            rig.run(Operation::Read, 0, &mut [0; 512]).unwrap();
            assert!(rig.engine.is_busy() && rig.engine.ended().is_none());
            release.send(()).unwrap();
            assert!(matches!(rig.wait_end(), (3, Ending::Done(Ok(())))));
        }
    }
}

/// A disk during whose third call the request is given up.
#[derive(Debug, Default)]
struct GivenUp {
    calls: AtomicU64,
    cancelled: OnceLock<Arc<AtomicBool>>,
}

impl GivenUp {
    fn call(&self) -> Result<(), BlockError> {
        if self.calls.fetch_add(1, Ordering::SeqCst) == 2 {
            self.cancelled.get().unwrap().store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl BlockBackend for GivenUp {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Slow::new().0.limits()
    }
    fn read_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        self.call()
    }
    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        self.call()
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        self.call()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        self.call()
    }
}

#[test]
fn long_requests_can_be_given_up() {
    let mut memory = vec![0; 32 << 20];
    for kind in KINDS {
        for operation in [
            Operation::Read,
            Operation::Write,
            Operation::Discard,
            Operation::WriteZeroes { may_unmap: false },
        ] {
            let disk = Arc::new(GivenUp::default());
            let mut rig = Rig::new(kind, disk.clone());
            disk.cancelled.set(rig.cancelled.clone()).unwrap();
            let request = Request {
                operation,
                offset: 512,
                len: 1 << 39,
            };
            let memory = [VolatileSlice::from(&mut memory[..])];
            // SAFETY: the memory lives longer than the engine.
            let result = unsafe { rig.engine.begin(0, request, &memory, false) };
            let result = result.unwrap_or_else(|| match rig.wait_end() {
                (_, Ending::Done(result)) => result,
                (_, Ending::Unfinished) => panic!("{operation:?} came to no end"),
            });
            assert!(matches!(result, Err(BlockError::Cancelled)), "{result:?}");
            assert_eq!(disk.calls.load(Ordering::SeqCst), 3);
        }
    }
}

/// A disk whose reads wait until so many are there.
#[derive(Debug)]
struct Meeting {
    missing: Mutex<usize>,
    changed: Condvar,
}

impl BlockBackend for Meeting {
    fn size(&self) -> u64 {
        DISK
    }
    fn read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        Slow::new().0.limits()
    }
    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        let mut missing = self.missing.lock().unwrap();
        *missing = missing.saturating_sub(1);
        self.changed.notify_all();
        let patience = Duration::from_secs(20);
        let waited = self
            .changed
            .wait_timeout_while(missing, patience, |missing| *missing > 0);
        assert!(!waited.unwrap().1.timed_out(), "the others did not come");
        bufs.iter().for_each(|buf| buf.copy_from(&[5_u8; 512]));
        Ok(())
    }
    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

#[test]
fn what_takes_time_is_done_by_several_threads() {
    for kind in KINDS {
        let meeting = Meeting {
            missing: Mutex::new(4),
            changed: Condvar::new(),
        };
        let mut rig = Rig::new(kind, Arc::new(meeting));
        let mut memory = vec![0; 9 * 512];
        let request = Request {
            operation: Operation::Read,
            offset: 0,
            len: 512,
        };
        for (token, part) in memory.chunks_mut(512).enumerate() {
            let bufs = [VolatileSlice::from(part)];
            // The last one has no more behind it, and still would keep those under way waiting.
            let more = token < 8;
            // SAFETY: the memory lives longer than the engine's requests.
            let ended = unsafe { rig.engine.begin(token, request, &bufs, more) };
            assert!(ended.is_none());
        }
        let mut ended: Vec<_> = (0..9).map(|_| rig.wait_end().0).collect();
        ended.sort_unstable();
        assert_eq!(ended, (0..9).collect::<Vec<_>>());
        assert!(memory.iter().all(|byte| *byte == 5));
    }
}

#[test]
fn events_and_time_end_a_wait() {
    for kind in KINDS {
        let mut rig = Rig::new(kind, raw(false).1);
        let start = Instant::now();
        rig.engine.wait(Some(Duration::from_millis(30))).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(29), "{kind:?}");
        for _ in 0..3 {
            let event = rig.event.clone();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(10));
                    event.write(1).unwrap();
                });
                rig.engine.wait(None).unwrap();
            });
            assert!(rig.engine.ended().is_none());
            // Each signal wakes once, though nobody reads it.
            let start = Instant::now();
            rig.engine.wait(Some(Duration::from_millis(10))).unwrap();
            assert!(rig.engine.ended().is_none());
            rig.engine.wait(Some(Duration::from_millis(10))).unwrap();
            assert!(rig.engine.ended().is_none());
            assert!(start.elapsed() >= Duration::from_millis(9), "{kind:?}");
        }
        rig.event.write(1).unwrap();
        rig.engine.wait(None).unwrap();
    }
}

#[test]
fn a_dropped_engine_waits_for_its_requests() {
    let (slow, begun, release) = Slow::new();
    let mut rig = Rig::new(Kind::Ring, slow.clone());
    assert!(rig.begin(0, Operation::Flush, 0, &mut []).is_none());
    begun.recv().unwrap();
    let dropper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        release.send(()).unwrap();
    });
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() >= Duration::from_millis(15));
    dropper.join().unwrap();
}
