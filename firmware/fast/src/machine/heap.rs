//! The heap: blocks of powers of two, which are kept by size once they are free.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;

const CLASSES: usize = 32;
const SMALLEST: usize = 16;
const PAGE: usize = 4096;

struct State {
    next: usize,
    end: usize,
    /// Of each size the first free block; its first word leads to the next.
    free: [*mut u8; CLASSES],
}

/// The heap of the firmware.
pub struct Heap(UnsafeCell<State>);

// SAFETY: There is one processor, and no interrupt handler that returns.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State {
    next: 0,
    end: 0,
    free: [ptr::null_mut(); CLASSES],
}));

/// Gives the heap its memory, once.
///
/// # Safety
/// It must be RAM that nothing else uses.
pub unsafe fn init(start: u64, end: u64) {
    // SAFETY: Nothing was allocated before, so nobody looks at the state.
    let state = unsafe { &mut *HEAP.0.get() };
    state.next = start as usize;
    state.end = end as usize;
}

/// The size of a block for `layout` as a power of two.
fn class(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(SMALLEST);
    size.next_power_of_two().trailing_zeros() as usize
}

// SAFETY: Blocks come from the heap's memory once and are handed out again only when they were
// given back; each is aligned to its size, or to a page.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: One processor, no reference outlives a call.
        let state = unsafe { &mut *self.0.get() };
        let class = class(layout);
        let Some(free) = state.free.get_mut(class).filter(|_| layout.align() <= PAGE) else {
            return ptr::null_mut();
        };
        if !free.is_null() {
            let block = *free;
            // SAFETY: A free block begins with the address of the next.
            *free = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let size = 1 << class;
        // Whoever has the block later may want it aligned; nobody wants more than a page's.
        let start = state.next.next_multiple_of(size.min(PAGE));
        match start.checked_add(size).filter(|end| *end <= state.end) {
            Some(end) => {
                state.next = end;
                start as *mut u8
            }
            None => ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: One processor, no reference outlives a call.
        let state = unsafe { &mut *self.0.get() };
        if let Some(free) = state.free.get_mut(class(layout)) {
            // SAFETY: The block has room for an address, and is nobody's from here on.
            unsafe { block.cast::<*mut u8>().write(*free) };
            *free = block;
        }
    }
}
