//! What a guest tells of its memory (virtio 1.2, 5.5.6.4).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Statistics of the guest's memory, in bytes where nothing else is said. What the guest does not
/// tell is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestMemoryStats {
    /// Read back from swap.
    pub swap_in: Option<u64>,
    /// Written to swap.
    pub swap_out: Option<u64>,
    /// Page faults that needed the disk, counted.
    pub major_faults: Option<u64>,
    /// Page faults that did not, counted.
    pub minor_faults: Option<u64>,
    /// In no use at all.
    pub free: Option<u64>,
    /// All that the guest knows of.
    pub total: Option<u64>,
    /// To be had without swapping, an estimate.
    pub available: Option<u64>,
    /// In caches of files.
    pub caches: Option<u64>,
}

/// One value of a guest's buffer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Stat {
    pub tag: U16,
    pub value: U64,
}

impl GuestMemoryStats {
    /// Takes up a value. One of a kind that is not known here is left out.
    pub(super) fn take(&mut self, stat: Stat) {
        let field = match stat.tag.get() {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            _ => return,
        };
        *field = Some(stat.value.get());
    }
}
