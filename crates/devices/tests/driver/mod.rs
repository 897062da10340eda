//! The guest's side of a virtqueue, for tests. Used by unit tests too, so it knows nothing but
//! memory and rings.

#![allow(dead_code, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes that the rings of one queue take.
pub const RINGS: u64 = 0x3000;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub writable: bool,
}

pub fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: false,
    }
}

pub fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: true,
    }
}

/// Fills the rings of a queue of at most 256 entries at `base`.
#[derive(Debug)]
pub struct Driver {
    pub memory: Arc<GuestMemoryMmap>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    pub kick: Arc<EventFd>,
}

impl Driver {
    pub fn new(memory: &Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            available: 0,
            used: 0,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    /// The queue as the transport would hand it to the device.
    pub fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(low(self.base)), Some(0));
        queue.set_avail_ring_address(Some(low(self.avail_ring())), Some(0));
        queue.set_used_ring_address(Some(low(self.used_ring())), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    pub fn avail_ring(&self) -> u64 {
        self.base + 0x1000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    /// Writes one descriptor.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.base + 16 * u64::from(index), address, len, flags, next);
    }

    /// Writes one descriptor anywhere, as for an indirect table.
    pub fn descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes a chain of `buffers` available and returns its head. Takes the descriptors in turn:
    /// a test keeps less than a table of them in flight.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let mut flags = if buffer.writable { WRITE } else { 0 };
            if position + 1 < buffers.len() {
                flags |= NEXT;
            }
            self.descriptor(
                index,
                buffer.address,
                buffer.len,
                flags,
                self.next_descriptor,
            );
        }
        self.offer(head);
        head
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Sets the available index, right or wrong.
    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        self.memory
            .store(
                index,
                GuestAddress(self.avail_ring() + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Asks for an interrupt once the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Rings the doorbell.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Chains returned so far.
    pub fn used_index(&self) -> u16 {
        self.memory
            .load(
                GuestAddress(self.used_ring() + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap()
    }

    /// Takes the next returned chain: head and length.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let id = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((id, len))
    }

    /// Waits for the next returned chain.
    pub fn wait_used(&mut self) -> (u32, u32) {
        let start = std::time::Instant::now();
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(start.elapsed().as_secs() < 20, "no chain was returned");
            std::thread::yield_now();
        }
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap()
}
