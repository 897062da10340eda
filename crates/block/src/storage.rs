//! An image's file as imago's storage below the format.
//!
//! imago has a storage of its own for files. This one shares the I/O of raw images, does not hold
//! up requests while a flush waits for the disk, keeps the writes of a qcow2 image in order, and
//! has no way to open a file by name.

use std::fmt;
use std::io;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use libc::iovec;

use crate::formats::imago_qcow2::WriteOrder;
use crate::host::HostFile;

/// Where the version 3 header has the low byte of the incompatible features.
const FEATURES_AT: u64 = 79;

/// The file of one image.
#[derive(Debug)]
pub struct ImageFile {
    host: Arc<HostFile>,
    helper: CommonStorageHelper,
    hidden_features: u8,
    order: Option<Arc<WriteOrder>>,
}

impl ImageFile {
    /// Wraps an opened file.
    pub fn new(host: HostFile) -> Self {
        Self {
            host: Arc::new(host),
            helper: CommonStorageHelper::default(),
            hidden_features: 0,
            order: None,
        }
    }

    /// The file itself.
    pub fn host(&self) -> &Arc<HostFile> {
        &self.host
    }

    /// Lets the qcow2 header of a file that is only read appear without the feature bits `mask`.
    ///
    /// "Not closed cleanly" and "corrupt" forbid writing, not reading, but imago refuses both.
    pub fn hide_features(&mut self, mask: u8) {
        self.hidden_features = mask;
    }

    /// Sends all writes from now on through `order`.
    pub fn set_order(&mut self, order: Arc<WriteOrder>) {
        self.order = Some(order);
    }

    /// Reads all of `buf` from `offset`; fails if the file ends before.
    pub fn read_exact(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset
            .checked_add(buf.len() as u64)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.host.len()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        StorageExt::read(self, buf, offset)
    }

    /// Clears the hidden feature bits in memory just read from `offset`.
    ///
    /// # Safety
    ///
    /// Every `iovec` must describe memory that is writable.
    unsafe fn hide_in(&self, iovecs: &[iovec], offset: u64) {
        let Some(mut skip) = FEATURES_AT
            .checked_sub(offset)
            .and_then(|at| at.try_into().ok())
        else {
            return;
        };
        for vec in iovecs {
            if skip < vec.iov_len {
                // SAFETY: `skip` is inside this iovec, whose memory the caller vouches for.
                unsafe { *vec.iov_base.cast::<u8>().add(skip) &= !self.hidden_features };
                return;
            }
            skip -= vec.iov_len;
        }
    }

    /// Does a change that does not go through [`WriteOrder::write`], if it may be done.
    fn change(&self, offset: u64, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(order) = &self.order else {
            return change();
        };
        order.check_place(offset)?;
        let done = change();
        order.data_written();
        done
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.host.name())
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.host.align().memory
    }

    fn req_align(&self) -> usize {
        self.host.align().request
    }

    fn zero_align(&self) -> usize {
        self.host.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.host.zero_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.host.len()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the vector borrows its memory mutably until this returns.
        unsafe {
            let iovecs = bufv.as_iovec();
            self.host.read_at(iovecs.iter().copied(), offset)?;
            if self.hidden_features != 0 {
                self.hide_in(iovecs, offset);
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the vector borrows its memory until this returns.
        unsafe {
            match &self.order {
                None => self.host.write_at(bufv.as_iovec().iter().copied(), offset),
                Some(order) => order.write(bufv.as_iovec(), bufv.len(), offset),
            }
        }
    }

    // A range past the end of the file reads as zeroes already, so zeroing need not extend it.
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, || self.host.write_zeroes(offset, length, true))
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, || self.host.write_zeroes(offset, length, false))
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, || self.host.discard(offset, length))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.order {
            None => self.host.sync(),
            Some(order) => order.sync(),
        }
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
