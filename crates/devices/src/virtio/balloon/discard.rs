//! Gives pages of guest memory back to the host.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use crate::GuestMemory;

/// The host's pages, and the unit in which a driver tells of its own.
pub(super) const PAGE: usize = 4096;

/// How guest memory goes back. Afterwards it reads as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Discard {
    /// Pages of a file that others may map: a hole in the file.
    Shared,
    /// Pages of this process alone.
    Private,
    /// Not at all: reserved huge pages, which requests of disks may have pinned.
    Never,
}

impl Discard {
    pub(super) fn of(memory: &GuestMemory) -> Self {
        let any = |what: fn(&vm_memory::GuestRegionMmap<()>) -> bool| memory.iter().any(what);
        if any(|region| region.is_hugetlbfs() == Some(true)) {
            Self::Never
        } else if any(|region| region.file_offset().is_some()) {
            Self::Shared
        } else {
            Self::Private
        }
    }

    /// Gives back the whole pages in `slice`, which is guest memory. Returns their bytes.
    pub(super) fn pages(self, slice: &VolatileSlice<'_>) -> u64 {
        let advice = match self {
            Self::Shared => libc::MADV_REMOVE,
            Self::Private => libc::MADV_DONTNEED,
            Self::Never => return 0,
        };
        let guard = slice.ptr_guard_mut();
        let before = guard.as_ptr().align_offset(PAGE);
        let len = slice.len().saturating_sub(before) / PAGE * PAGE;
        if len == 0 {
            return 0;
        }
        // SAFETY: `before + len` is at most the slice's length, so these are pages of guest memory
        // and of nothing else. Guest memory may change at any time, also to zeroes.
        let result = unsafe { libc::madvise(guard.as_ptr().add(before).cast(), len, advice) };
        if result == 0 {
            return len as u64;
        }
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "The host does not take back guest memory");
        0
    }
}
