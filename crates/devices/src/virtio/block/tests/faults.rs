//! Disks whose host fails, is slow, or has to be given up.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use edgevmm_block::{BlockError, Limits};
use vm_memory::VolatileSlice;

use super::*;

/// A disk that can be made to fail, and whose flush takes until the driver was interrupted.
#[derive(Debug)]
struct Faulty {
    below: Arc<dyn BlockBackend>,
    notifier: Arc<MockNotifier>,
    /// What writes and flushes fail with, if not 0.
    errno: AtomicI32,
    slow_flush: AtomicBool,
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
        self.below.limits()
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.below.read_vectored(bufs, offset)
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.fail("write")?;
        self.below.write_vectored(bufs, offset)
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.slow_flush.load(Ordering::SeqCst) {
            self.notifier.wait_queue(0, 1);
        }
        self.fail("flush")?;
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.fail("discard")?;
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.fail("zero")?;
        self.below.write_zeroes(offset, len, may_unmap)
    }

    fn resize(&self, new_size: u64) -> Result<(), BlockError> {
        self.below.resize(new_size)
    }
}

fn faulty(policy: ErrorPolicy) -> (Rig, Arc<Faulty>) {
    let mut faulty = None;
    let wrap = |below, notifier: &Arc<_>| -> Arc<dyn BlockBackend> {
        let disk = Arc::new(Faulty {
            below,
            notifier: Arc::clone(notifier),
            errno: AtomicI32::new(0),
            slow_flush: AtomicBool::new(false),
        });
        faulty = Some(Arc::clone(&disk));
        disk
    };
    let mut rig = Rig::configured(|_| (), wrap, |config| config.error_policy = policy);
    rig.activate(1, u64::MAX);
    (rig, faulty.unwrap())
}

/// Begins a write of `fill` to sector 8 and returns its head.
fn write(rig: &mut Rig, fill: u8) -> u16 {
    rig.header(VIRTIO_BLK_T_OUT, 8);
    let driver = rig.driver();
    driver.write(DATA, &[fill; 4096]);
    let chain = [
        readable(HEADER, 16),
        readable(DATA, 4096),
        writable(STATUS, 1),
    ];
    let head = driver.add(&chain);
    driver.kick();
    head
}

#[test]
fn a_read_is_told_of_before_the_flush_behind_it_is_done() {
    let (mut rig, disk) = faulty(ErrorPolicy::Report);
    disk.slow_flush.store(true, Ordering::SeqCst);
    rig.header(VIRTIO_BLK_T_IN, 0);
    let driver = rig.driver();
    let flush = HEADER + 0x100;
    driver.write(flush, &VIRTIO_BLK_T_FLUSH.to_le_bytes());
    let chain = [
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 1),
    ];
    // The flush comes first, and yet the read behind it is done.
    let flush = driver.add(&[readable(flush, 16), writable(STATUS + 1, 1)]);
    let read = driver.add(&chain);
    driver.kick();
    assert_eq!(driver.wait_used(), (read.into(), 513));
    assert_eq!(driver.wait_used(), (flush.into(), 1));
}

#[test]
fn policies_answer_or_keep_what_failed() {
    for (policy, errno, expected) in [
        (ErrorPolicy::Report, libc::EIO, Some(VIRTIO_BLK_S_IOERR)),
        (ErrorPolicy::Report, libc::ENOSPC, Some(VIRTIO_BLK_S_IOERR)),
        (ErrorPolicy::Ignore, libc::EIO, Some(VIRTIO_BLK_S_OK)),
        (ErrorPolicy::EnoSpace, libc::EIO, Some(VIRTIO_BLK_S_IOERR)),
        (ErrorPolicy::EnoSpace, libc::ENOSPC, None),
        (ErrorPolicy::Stop, libc::EIO, None),
        (ErrorPolicy::Stop, libc::ENOSPC, None),
    ] {
        let (mut rig, disk) = faulty(policy);
        disk.errno.store(errno, Ordering::SeqCst);
        let head = write(&mut rig, 0xa5);
        if let Some(status) = expected {
            assert_eq!(rig.driver().wait_used(), (head.into(), 1));
            assert_eq!(rig.status(), status, "{policy:?} {errno}");
            assert_eq!(rig.control.pauses(), 0);
            continue;
        }
        let reasons = rig.control.wait_pauses(1);
        let words = io::Error::from_raw_os_error(errno).to_string();
        assert!(
            reasons[0].starts_with("blk0: ") && reasons[0].contains(&words),
            "{reasons:?}"
        );
        // It fails once more, and the machine has to wait once more.
        rig.block.handle().retry();
        rig.control.wait_pauses(2);
        assert_eq!((rig.driver().used_index(), rig.status()), (0, 0xee));
        disk.errno.store(0, Ordering::SeqCst);
        rig.block.handle().retry();
        assert_eq!(rig.driver().wait_used(), (head.into(), 1));
        assert_eq!(rig.status(), VIRTIO_BLK_S_OK);
        assert_eq!(rig.on_disk(4096, 4096), [0xa5; 4096]);
        assert_eq!(rig.control.pauses(), 2);
    }
}

#[test]
fn nothing_new_begins_while_the_machine_has_to_wait() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    disk.errno.store(libc::EIO, Ordering::SeqCst);
    let head = write(&mut rig, 1);
    rig.control.wait_pauses(1);
    let second = write(&mut rig, 2);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!((rig.driver().used_index(), rig.control.pauses()), (0, 1));
    disk.errno.store(0, Ordering::SeqCst);
    rig.block.handle().retry();
    let mut done = [rig.driver().wait_used().0, rig.driver().wait_used().0];
    done.sort_unstable();
    assert_eq!(done, [head, second].map(u32::from));
}

#[test]
fn a_failed_flush_of_a_write_through_disk_keeps_the_write() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    rig.block.write_config(CONFIG_WCE, 32, &[0]);
    disk.errno.store(libc::ENOSPC, Ordering::SeqCst);
    let head = write(&mut rig, 7);
    rig.control.wait_pauses(1);
    disk.errno.store(0, Ordering::SeqCst);
    rig.block.handle().retry();
    assert_eq!(rig.driver().wait_used(), (head.into(), 1));
    assert_eq!(rig.on_disk(4096, 4096), [7; 4096]);
}

#[test]
fn kept_requests_go_with_the_state_and_end_with_a_reset() {
    let (mut rig, disk) = faulty(ErrorPolicy::Stop);
    disk.errno.store(libc::ENOSPC, Ordering::SeqCst);
    let head = write(&mut rig, 9);
    rig.control.wait_pauses(1);
    let queues = rig.block.deactivate();
    let state = rig.block.state();
    let text = serde_json::to_string(&state).unwrap();
    let expected = format!(r#"{{"writeback":true,"kept":[{{"queue":0,"heads":[{head}]}}]}}"#);
    assert_eq!(text, expected);

    // Another device with that state, on the same queue, does it.
    disk.errno.store(0, Ordering::SeqCst);
    rig.block.reset();
    assert!(rig.block.state().kept.is_empty());
    let state: BlockState = serde_json::from_str(&text).unwrap();
    rig.block
        .restore(&crate::virtio::DeviceState::Block(state))
        .unwrap();
    rig.serve(queues, u64::MAX);
    assert_eq!(rig.driver().wait_used(), (head.into(), 1));
    assert_eq!(rig.on_disk(4096, 4096), [9; 4096]);
    rig.block.deactivate();
    assert!(rig.block.state().kept.is_empty());
}

#[test]
fn impossible_kept_requests_are_refused() {
    let (mut rig, _) = faulty(ErrorPolicy::Stop);
    rig.block.deactivate();
    for (queue, count) in [(1, 1), (0, 257)] {
        let heads = vec![0; count];
        let kept = vec![super::super::QueueRequests { queue, heads }];
        let writeback = true;
        let state = crate::virtio::DeviceState::Block(BlockState { writeback, kept });
        rig.block.restore(&state).unwrap_err();
    }
}

#[test]
fn the_driver_hears_of_a_larger_disk() {
    let (mut rig, _) = faulty(ErrorPolicy::Stop);
    let capacity = |rig: &Rig| {
        let mut field = [0; 8];
        rig.block.read_config(0, &mut field);
        u64::from_le_bytes(field) * 512
    };
    let last = [writable(DATA, 512)];
    assert_eq!(
        rig.request(VIRTIO_BLK_T_IN, DISK / 512, &last).0,
        VIRTIO_BLK_S_IOERR
    );
    rig.block.handle().resize(DISK + 4096).unwrap();
    assert_eq!(
        (capacity(&rig), rig.notifier.log().config),
        (DISK + 4096, 1)
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_IN, DISK / 512, &last).0,
        VIRTIO_BLK_S_OK
    );
    assert_eq!(rig.driver().read(DATA, 512), [0; 512]);
    for wrong in [DISK, DISK + 4096 + 100] {
        rig.block.handle().resize(wrong).unwrap_err();
    }
    assert_eq!(
        (capacity(&rig), rig.notifier.log().config),
        (DISK + 4096, 1)
    );
    rig.block.deactivate();
    rig.block.handle().resize(DISK + 8192).unwrap();
    assert_eq!(
        (capacity(&rig), rig.notifier.log().config),
        (DISK + 8192, 1)
    );
}
