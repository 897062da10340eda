//! Guest RAM, mapped below and above the PCI hole. Pages come into being when the guest touches
//! them.
//!
//! RAM is a memfd where that can have huge pages, so that another process can map it later
//! (vhost-user, live upgrade). Most kernels are set to give none to shared memory though
//! (`shmem_enabled` is `never`), and then each 4 KiB page of the guest costs a fault of its own: a
//! Linux boot takes 18 thousand of them instead of a few hundred. There RAM is private memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::layout::{HIGH_RAM_START, LOW_RAM_END};

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be made or sized.
    #[error("Can't reserve {size} bytes of guest memory{}", if *hugepages {
        " in huge pages; reserve them first: sysctl vm.nr_hugepages=N (see /proc/meminfo)"
    } else { "" })]
    Reserve {
        /// Size in bytes.
        size: u64,
        /// Whether huge pages were asked for.
        hugepages: bool,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The memfd could not be mapped.
    #[error("Can't map guest memory")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The regions do not fit together.
    #[error("Guest memory regions do not fit together")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// The size is beyond what this host can address.
    #[error("{0} bytes of guest memory are beyond what this host can address")]
    TooLarge(u64),
}

/// The parts of RAM as (guest-physical start, length), for `size` bytes in all.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_END);
    let high = size - low;
    let mut ranges = vec![(0, low)];
    if high > 0 {
        ranges.push((HIGH_RAM_START, high));
    }
    ranges
}

/// How the kernel hands out huge pages for shared memory.
const SHARED_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether a memfd gets transparent huge pages on this host when it asks for them.
fn shared_memory_has_huge_pages() -> bool {
    let setting = std::fs::read_to_string(SHARED_HUGE_PAGES).unwrap_or_default();
    ["[always]", "[within_size]", "[advise]", "[force]"]
        .iter()
        .any(|on| setting.contains(on))
}

/// Makes guest RAM of `size` bytes.
///
/// # Errors
/// Fails when the host can't give that much, in the form asked for.
pub fn create(size: u64, hugepages: bool) -> Result<Arc<GuestMemory>, MemoryError> {
    let file = if hugepages || shared_memory_has_huge_pages() {
        let memfd = reserve(size, hugepages).map_err(|source| MemoryError::Reserve {
            size,
            hugepages,
            source,
        })?;
        Some(Arc::new(File::from(memfd)))
    } else {
        None
    };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, len) in ram_ranges(size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::TooLarge(size))?;
        let builder = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_hugetlbfs(hugepages);
        let builder = match &file {
            Some(file) => builder
                .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
            None => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        let mapping = builder.build().map_err(MemoryError::Map)?;
        advise(&mapping, libc::MADV_HUGEPAGE, "huge pages for");
        // What the guest keeps in memory is no business of the host's crash reports.
        advise(&mapping, libc::MADV_DONTDUMP, "core dumps without");
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or(MemoryError::TooLarge(size))?;
        regions.push(region);
        offset += len;
    }
    Ok(Arc::new(
        GuestMemory::from_regions(regions).map_err(MemoryError::Layout)?,
    ))
}

/// Gives the kernel advice on guest memory. One that does not take it runs the guest all the same.
fn advise(mapping: &MmapRegion, advice: libc::c_int, what: &str) {
    // SAFETY: the range is the mapping's own, and neither advice given changes its content.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "The kernel has no {what} guest memory");
    }
}

fn reserve(size: u64, hugepages: bool) -> Result<OwnedFd, Errno> {
    let mut flags = MFdFlags::MFD_CLOEXEC;
    if hugepages {
        flags |= MFdFlags::MFD_HUGETLB;
    }
    let fd = memfd_create(c"edgevmm-ram", flags)?;
    let len = libc::off_t::try_from(size).map_err(|_| Errno::EFBIG)?;
    nix::unistd::ftruncate(&fd, len)?;
    if hugepages {
        // Huge pages that are not there would be a SIGBUS at the guest's first touch.
        nix::fcntl::fallocate(&fd, nix::fcntl::FallocateFlags::empty(), 0, len)?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(
            ram_ranges(5 << 30),
            [(0, LOW_RAM_END), (HIGH_RAM_START, (5 << 30) - LOW_RAM_END)]
        );
        assert_eq!(ram_ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
    }

    #[test]
    fn both_parts_are_memory_and_the_hole_is_not() {
        let memory = create(5 << 30, false).unwrap();
        for address in [0, LOW_RAM_END - 8, HIGH_RAM_START] {
            memory
                .write_obj(0x1234_5678_u64, GuestAddress(address))
                .unwrap();
            assert_eq!(
                memory.read_obj::<u64>(GuestAddress(address)).unwrap(),
                0x1234_5678
            );
        }
        assert!(!memory.address_in_range(GuestAddress(LOW_RAM_END)));
    }
}
