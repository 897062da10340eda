//! The descriptors of one chain, by its head (virtio 1.2, 2.7.5).
//!
//! The `virtio-queue` crate walks only chains that it takes from the available ring.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;

/// Bytes of a descriptor.
const SIZE: u32 = 16;

/// Walks a chain. Ends where the chain ends or breaks a rule; the last descriptor tells which:
/// only in a broken chain it has a next.
#[derive(Debug)]
pub(super) struct Descriptors<'a> {
    memory: &'a GuestMemory,
    table: GuestAddress,
    size: u16,
    next: Option<u16>,
    /// Descriptors that may still come; more would be a circle.
    left: u16,
    indirect: bool,
}

impl<'a> Descriptors<'a> {
    /// The chain that begins with descriptor `head` of a table of `size`.
    pub(super) fn new(memory: &'a GuestMemory, table: GuestAddress, size: u16, head: u16) -> Self {
        Self {
            memory,
            table,
            size,
            next: Some(head),
            left: size,
            indirect: false,
        }
    }

    fn read(&mut self) -> Option<Descriptor> {
        let index = self.next.take().filter(|index| *index < self.size)?;
        self.left = self.left.checked_sub(1)?;
        let offset = u64::from(index) * u64::from(SIZE);
        let address = self.table.0.checked_add(offset)?;
        self.memory.read_obj(GuestAddress(address)).ok()
    }

    /// Goes on in the table that `descriptor` refers to. It must be the last of its own.
    fn enter(&mut self, descriptor: &Descriptor) -> Option<()> {
        let len = descriptor.len();
        if self.indirect || descriptor.has_next() || !len.is_multiple_of(SIZE) {
            return None;
        }
        self.table = descriptor.addr();
        self.size = u16::try_from(len / SIZE).ok()?;
        self.left = self.size;
        self.next = Some(0);
        self.indirect = true;
        Some(())
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(&descriptor)?;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        if descriptor.has_next() {
            self.next = Some(descriptor.next());
        }
        Some(descriptor)
    }
}
