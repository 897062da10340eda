//! A virtio disk (virtio 1.2, 4.1 and 5.2), read only and polled: one queue, as many requests at
//! once as there is to read.

use alloc::alloc::alloc_zeroed;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::sync::atomic::{Ordering, fence};

use edgevmm_fast::disk::Sectors;

use super::pci::Function;
use super::{cpu, memory};

const VENDOR: u16 = 0x1af4;
const BLOCK: u16 = 0x1042;

const CAPABILITY_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_DEVICE: u8 = 4;

const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// `VIRTIO_F_VERSION_1`, of the upper half of the features.
const VERSION_1: u32 = 1;

const SIZE: usize = 256;
/// Header, data and status.
const PER_REQUEST: usize = 3;
const REQUESTS: usize = SIZE / PER_REQUEST;
/// What one request reads. Several of this keep a disk busier than one of their sum.
const REQUEST_LEN: usize = 256 << 10;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const STATUS_OK: u8 = 0;
const STATUS_PENDING: u8 = 0xff;

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RequestHeader {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// What the device reads and writes. In one piece, as every part of it is mapped where it is.
#[repr(C, align(4096))]
struct Shared {
    descriptors: [Descriptor; SIZE],
    available_flags: u16,
    available_index: u16,
    available: [u16; SIZE],
    used_event: u16,
    used: Used,
    headers: [RequestHeader; REQUESTS],
    statuses: [u8; REQUESTS],
}

impl Shared {
    fn new() -> Option<Box<Self>> {
        let layout = Layout::new::<Self>();
        // SAFETY: All of it may be zero, and the layout is its own.
        unsafe {
            let memory = alloc_zeroed(layout).cast::<Self>();
            (!memory.is_null()).then(|| Box::from_raw(memory))
        }
    }
}

#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; SIZE],
    event: u16,
}

/// A disk.
pub struct VirtioBlk {
    common: u64,
    doorbell: u64,
    sectors: u64,
    size: u16,
    shared: Box<Shared>,
    /// Requests that the device has taken so far.
    index: u16,
}

impl VirtioBlk {
    /// Starts the disk that `function` is; `None` when it is none, or none that works.
    pub fn new(function: Function) -> Option<Self> {
        if (function.vendor(), function.device()) != (VENDOR, BLOCK) {
            return None;
        }
        function.enable();
        let (common, _) = region(function, CFG_COMMON)?;
        let (notify, notify_at) = region(function, CFG_NOTIFY)?;
        let (device, _) = region(function, CFG_DEVICE)?;
        let multiplier: u32 = function.read(notify_at + 16);

        let mut disk = Self {
            common,
            doorbell: 0,
            sectors: memory::read(device),
            size: 0,
            shared: Shared::new()?,
            index: 0,
        };
        disk.set_status(0)?;
        disk.set_status(ACKNOWLEDGE | DRIVER)?;
        disk.write(DRIVER_FEATURE_SELECT, 0_u32);
        disk.write(DRIVER_FEATURE, 0_u32);
        disk.write(DRIVER_FEATURE_SELECT, 1_u32);
        disk.write(DRIVER_FEATURE, VERSION_1);
        disk.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        disk.write(QUEUE_SELECT, 0_u16);
        disk.size = memory::read::<u16>(common + QUEUE_SIZE).min(SIZE as u16);
        if !disk.size.is_power_of_two() || usize::from(disk.size) < PER_REQUEST {
            return None;
        }
        disk.write(QUEUE_SIZE, disk.size);
        let shared = &*disk.shared;
        let areas = [
            (QUEUE_DESC, &raw const shared.descriptors as u64),
            (QUEUE_DRIVER, &raw const shared.available_flags as u64),
            (QUEUE_DEVICE, &raw const shared.used as u64),
        ];
        for (register, address) in areas {
            disk.write(register, address as u32);
            disk.write(register + 4, (address >> 32) as u32);
        }
        disk.shared.available_flags = NO_INTERRUPT;
        disk.write(QUEUE_ENABLE, 1_u16);
        let offset: u16 = memory::read(common + QUEUE_NOTIFY_OFF);
        disk.doorbell = notify + u64::from(offset) * u64::from(multiplier);
        disk.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)?;
        Some(disk)
    }

    fn write<T: Copy>(&self, register: u64, value: T) {
        memory::write(self.common + register, value);
    }

    /// Sets the status; `None` when the device does not take it.
    fn set_status(&self, status: u8) -> Option<()> {
        self.write(STATUS, status);
        (memory::read::<u8>(self.common + STATUS) == status).then_some(())
    }

    /// Puts a request in place `slot` of the queue.
    fn prepare(&mut self, slot: usize, sector: u64, into: &mut [u8]) {
        let shared = &mut *self.shared;
        shared.headers[slot] = RequestHeader {
            kind: 0,
            reserved: 0,
            sector,
        };
        shared.statuses[slot] = STATUS_PENDING;
        let header = &raw const shared.headers[slot] as u64;
        let status = &raw const shared.statuses[slot] as u64;
        let first = slot * PER_REQUEST;
        let parts = [
            (header, size_of::<RequestHeader>(), NEXT),
            (into.as_mut_ptr() as u64, into.len(), NEXT | DEVICE_WRITES),
            (status, 1, DEVICE_WRITES),
        ];
        for (at, (address, len, flags)) in (first..).zip(parts) {
            shared.descriptors[at] = Descriptor {
                address,
                len: len as u32,
                flags,
                next: at as u16 + 1,
            };
        }
        let place = usize::from(self.index.wrapping_add(slot as u16) % self.size);
        shared.available[place] = first as u16;
    }

    /// Has the device do the `count` requests that were prepared. False when one fails.
    fn run(&mut self, count: usize) -> bool {
        self.index = self.index.wrapping_add(count as u16);
        let available = &raw mut self.shared.available_index;
        fence(Ordering::SeqCst);
        // SAFETY: A field of our own, which the device reads too.
        unsafe { available.write_volatile(self.index) };
        fence(Ordering::SeqCst);
        memory::write(self.doorbell, 0_u16);
        let used = &raw const self.shared.used.index;
        // The guard's timer ends this when the device never does.
        let mut turns = 0_u32;
        // SAFETY: A field of our own, which the device writes.
        while unsafe { used.read_volatile() } != self.index {
            turns = turns.wrapping_add(1);
            // Hypervisors take many pauses for a wait that is worth an exit.
            if turns.is_multiple_of(64) {
                cpu::relax();
            }
        }
        fence(Ordering::SeqCst);
        (0..count).all(|slot| {
            let status = &raw const self.shared.statuses[slot];
            // SAFETY: A field of our own, which the device has written.
            unsafe { status.read_volatile() == STATUS_OK }
        })
    }
}

impl Sectors for VirtioBlk {
    fn count(&self) -> u64 {
        self.sectors
    }

    fn read(&mut self, first: u64, into: &mut [u8]) -> bool {
        let places = (usize::from(self.size) / PER_REQUEST).min(REQUESTS);
        let mut sector = first;
        for batch in into.chunks_mut(places * REQUEST_LEN) {
            let mut count = 0;
            for request in batch.chunks_mut(REQUEST_LEN) {
                self.prepare(count, sector, request);
                sector += request.len() as u64 / 512;
                count += 1;
            }
            if !self.run(count) {
                return false;
            }
        }
        true
    }
}

impl Drop for VirtioBlk {
    /// Leaves the device as it was found: it touches memory no more.
    fn drop(&mut self) {
        self.write(STATUS, 0_u8);
        while memory::read::<u8>(self.common + STATUS) != 0 {
            cpu::relax();
        }
    }
}

/// Where a part of the device is, and the offset of the capability that says so.
fn region(function: Function, kind: u8) -> Option<(u64, u64)> {
    let mut capabilities = function.capabilities(CAPABILITY_VENDOR);
    let at = capabilities.find(|at| function.read::<u8>(at + 3) == kind)?;
    let bar = function.bar(function.read(at + 4))?;
    let offset: u32 = function.read(at + 8);
    Some((bar + u64::from(offset), at))
}
