//! Disks whose host fails, and limits.

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use edgevmm_block::{BlockError, Limits, VolatileSlice};

use super::*;
use crate::disk::{ErrorPolicy, Rate};

/// A disk that can be made to fail, and counts its flushes.
#[derive(Debug)]
pub(super) struct Faulty {
    below: Arc<dyn BlockBackend>,
    /// What fails with it, if not 0.
    pub(super) errno: AtomicI32,
    flushes: AtomicU32,
    /// Bytes of its sectors.
    pub(super) logical_block: AtomicU32,
}

impl Faulty {
    fn fail(&self, op: &'static str) -> Result<(), BlockError> {
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(BlockError::Io {
                op,
                offset: 0,
                len: 0,
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }
}

impl BlockBackend for Faulty {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_only(&self) -> bool {
        self.below.read_only()
    }

    fn limits(&self) -> Limits {
        let logical_block = self.logical_block.load(Ordering::SeqCst);
        Limits {
            logical_block,
            physical_block: logical_block.max(4096),
            ..self.below.limits()
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.fail("read")?;
        self.below.read_vectored(bufs, offset)
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.fail("write")?;
        self.below.write_vectored(bufs, offset)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.below.write_zeroes(offset, len, may_unmap)
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.below.resize(size)
    }
}

pub(super) fn faulty(policy: ErrorPolicy) -> (Rig, Arc<Faulty>) {
    let mut faulty = None;
    let wrap = |below| -> Arc<dyn BlockBackend> {
        let disk = Arc::new(Faulty {
            below,
            errno: AtomicI32::new(0),
            flushes: AtomicU32::new(0),
            logical_block: AtomicU32::new(512),
        });
        faulty = Some(Arc::clone(&disk));
        disk
    };
    let rig = Rig::with(|config| config.error_policy = policy, wrap, None);
    (rig, faulty.unwrap())
}

#[test]
fn a_policy_may_tell_the_guest_or_not() {
    let (mut rig, disk) = faulty(ErrorPolicy::Report);
    disk.errno.store(libc::EIO, Ordering::SeqCst);
    assert_eq!(rig.run(&Ata::new(0xc8, 0, 1), &[(DATA, 512)]), 0x4051);
    rig.disk.restart(&mut rig.ahci);
    assert_eq!(rig.run(&Ata::new(0xca, 0, 1), &[(DATA, 512)]), 0x0451);
    let (mut rig, disk) = faulty(ErrorPolicy::Ignore);
    disk.errno.store(libc::EIO, Ordering::SeqCst);
    assert_eq!(rig.run(&Ata::new(0xca, 0, 1), &[(DATA, 512)]), 0x50);
    assert_eq!(rig.control.pauses(), 0);
}

#[test]
fn what_is_kept_is_tried_again() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    disk.errno.store(libc::ENOSPC, Ordering::SeqCst);
    rig.disk.put(DATA, &[7; 4096]);
    for slot in 0..4 {
        let ata = Ata::queued(0x61, slot, 8 * slot as u64, 8);
        rig.disk.prepare(slot, &ata, &[(DATA, 4096)]);
    }
    rig.disk.set(&mut rig.ahci, SACT, 15);
    rig.disk.set(&mut rig.ahci, CI, 15);
    assert!(rig.control.wait_pauses(1)[0].contains("disk0"));
    rig.retry.retry();
    rig.control.wait_pauses(2);
    assert_eq!(rig.disk.get(&mut rig.ahci, SACT), 15);
    disk.errno.store(0, Ordering::SeqCst);
    rig.retry.retry();
    assert_eq!(rig.disk.wait(&mut rig.ahci, 15), 0x50);
    assert_eq!(rig.stored(0, 16384), [7; 16384]);
    // A driver may give up on what is kept.
    disk.errno.store(libc::ENOSPC, Ordering::SeqCst);
    rig.disk.prepare(0, &Ata::new(0xca, 100, 1), &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, CI, 1);
    rig.control.wait_pauses(3);
    rig.disk.restart(&mut rig.ahci);
    disk.errno.store(0, Ordering::SeqCst);
    rig.retry.retry();
    assert_eq!(rig.run(&Ata::new(0xe7, 0, 0), &[]), 0x50);
    assert_eq!(rig.stored(51200, 512), pattern(51200, 512));
}

#[test]
fn writes_are_flushed_without_a_cache_or_when_that_is_asked_for() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    let flushes = || disk.flushes.load(Ordering::SeqCst);
    rig.run(&Ata::new(0x35, 0, 1), &[(DATA, 512)]);
    assert_eq!(flushes(), 0);
    rig.run(&Ata::new(0x3d, 0, 1), &[(DATA, 512)]);
    assert_eq!(flushes(), 1);
    let durable = Ata {
        device: 0xc0,
        ..Ata::queued(0x61, 0, 0, 1)
    };
    rig.disk.prepare(0, &durable, &[(DATA, 512)]);
    rig.disk.set(&mut rig.ahci, SACT, 1);
    rig.disk.set(&mut rig.ahci, CI, 1);
    rig.disk.wait(&mut rig.ahci, 1);
    assert_eq!(flushes(), 2);
    let off = Ata {
        features: 0x82,
        ..Ata::new(0xef, 0, 0)
    };
    rig.run(&off, &[]);
    assert_eq!(flushes(), 3);
    rig.run(&Ata::new(0x35, 0, 1), &[(DATA, 512)]);
    assert_eq!(flushes(), 4);
}

#[test]
fn limits_hold() {
    let limit = |config: &mut DriveConfig| {
        config.rate_limits.requests.total = Some(Rate {
            per_second: 100,
            burst: Some(1),
        });
    };
    let mut rig = Rig::with(limit, |disk| disk, None);
    let start = Instant::now();
    for _ in 0..21 {
        assert_eq!(rig.run(&Ata::new(0xc8, 0, 1), &[(DATA, 512)]), 0x50);
    }
    assert!(
        start.elapsed() >= Duration::from_millis(190),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_larger_disk_is_told_when_it_is_asked() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.run(&Ata::new(0x25, DISK / 512, 1), &[(DATA, 512)]),
        0x1051
    );
    rig.disk.restart(&mut rig.ahci);
    rig.retry.resize(2 * DISK).unwrap();
    assert_eq!(rig.run(&Ata::new(0xec, 0, 0), &[(DATA, 512)]), 0x50);
    assert_eq!(word(&rig.disk.bytes(DATA, 512), 100), 16384);
    assert_eq!(
        rig.run(&Ata::new(0x25, DISK / 512, 1), &[(DATA, 512)]),
        0x50
    );
}
