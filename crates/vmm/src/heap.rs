//! The heap of the VMM itself.

/// Gives pages back to the kernel that only the start needed: command line, configuration and the
/// making of tables leave many free blocks between those that stay.
///
/// The C library does so by itself at the heap's end alone, where something always stays.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and gives up nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}
