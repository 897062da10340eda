//! [`HostFile`] as imago's storage below an image format.
//!
//! imago has a storage of its own for files. This one shares the I/O of raw images, does not hold
//! up requests while a flush waits for the disk, and has no way to open a file by name.

use std::fmt;
use std::io;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::host_file::HostFile;

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Storage for HostFile {
    fn mem_align(&self) -> usize {
        self.align().memory
    }

    fn req_align(&self) -> usize {
        self.align().request
    }

    fn zero_align(&self) -> usize {
        HostFile::zero_align(self)
    }

    fn discard_align(&self) -> usize {
        HostFile::zero_align(self)
    }

    fn size(&self) -> io::Result<u64> {
        self.len()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the vector borrows its memory mutably until this returns.
        unsafe { self.read_at(bufv.as_iovec().iter().copied(), offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the vector borrows its memory until this returns.
        unsafe { self.write_at(bufv.as_iovec().iter().copied(), offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, false)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        HostFile::sync(self)
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.helper()
    }
}
