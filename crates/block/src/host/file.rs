//! One file or block device of the host.
//!
//! Memory that requests go to or come from is always described by `iovec`s, never by slices: a
//! guest may change its memory at any moment, so no Rust reference to it may exist.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::iovec;

use super::direct::{Alignment, Buffers};
#[cfg(test)]
use super::record::Event;
use crate::BlockError;

mod ioctl {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, 0x127b, libc::c_uint);
    nix::ioctl_read_bad!(blkroget, 0x125e, libc::c_int);
}

/// Bytes of zeroes written at a time where the host cannot zero a range itself.
const ZEROES_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// An opened file or block device.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    name: String,
    align: Alignment,
    device: Option<Device>,
    /// Memory for requests that don't fit `align`.
    pub(super) buffers: Buffers,
    /// Held while a write that does not fit `align` is in progress.
    pub(super) rewriting: Mutex<()>,
    /// Where the file must end at the latest.
    limit: AtomicU64,
    /// How long the file must be if it was not cut; 0 if nobody cares.
    expected: AtomicU64,
    /// The error by which written data was lost. Held while waiting for the disk.
    lost: Mutex<Option<i32>>,
    /// Where tests have everything noted.
    #[cfg(test)]
    pub recording: Option<super::record::Recording>,
}

/// What only block devices have.
#[derive(Clone, Copy, Debug)]
struct Device {
    /// Smallest unit, in bytes.
    sector: usize,
    physical_block: u32,
}

impl HostFile {
    /// Takes a file that the caller opened; `direct` turns the host's page cache off for it.
    ///
    /// # Errors
    /// It is neither a regular file nor a block device, or has no direct I/O where that is wanted.
    pub fn new(file: File, name: &str, direct: bool) -> Result<Self, BlockError> {
        let failed = |op| {
            move |source: io::Error| BlockError::File {
                op,
                path: name.to_owned(),
                source,
            }
        };
        let metadata = file.metadata().map_err(failed("examine"))?;
        check_kind(&metadata, name)?;
        let device = if metadata.file_type().is_block_device() {
            Some(Device::examine(&file).map_err(failed("examine"))?)
        } else {
            None
        };
        let align = if direct {
            let sector = device.map_or(1, |device| device.sector);
            set_direct(&file)
                .and_then(|()| Alignment::of_direct(&file, sector))
                .map_err(failed("use direct I/O on"))?
        } else {
            Alignment::NONE
        };
        Ok(Self {
            file,
            name: name.to_owned(),
            align,
            device,
            buffers: Buffers::default(),
            rewriting: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
            expected: AtomicU64::new(0),
            lost: Mutex::default(),
            #[cfg(test)]
            recording: None,
        })
    }

    /// The file itself, for locks.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The image as the user named it, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Alignment of requests; 1 unless the page cache is off.
    pub fn align(&self) -> Alignment {
        self.align
    }

    /// Has the file ask for another alignment than it needs.
    #[cfg(test)]
    pub(super) fn set_align(&mut self, align: Alignment) {
        self.align = align;
    }

    /// Whether the page cache is off.
    pub fn is_direct(&self) -> bool {
        self.align.request > 1
    }

    /// Whether it is a block device, whose length is what it is.
    pub fn is_device(&self) -> bool {
        self.device.is_some()
    }

    /// Smallest unit that can be zeroed or discarded without writing, in bytes.
    pub fn zero_align(&self) -> usize {
        self.device.map_or(1, |device| device.sector)
    }

    /// Smallest unit the host writes without a read-modify-write, in bytes.
    pub fn physical_block(&self) -> u32 {
        self.device.map_or(4096, |device| device.physical_block)
    }

    /// Current length in bytes.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn len(&self) -> io::Result<u64> {
        if self.device.is_some() {
            device_size(&self.file)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    /// Makes a regular file at least `len` bytes long; the new ones read as zeroes.
    ///
    /// # Errors
    /// The host has no room, or it is a block device and shorter.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        let _no_cut_meanwhile = self
            .rewriting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.limit.load(Ordering::Acquire) < len {
            self.limit.store(len, Ordering::Release);
        }
        if self.len()? >= len {
            Ok(())
        } else if self.device.is_some() {
            Err(io::Error::other("the block device is smaller"))
        } else {
            self.file.set_len(len)?;
            if self.expected.load(Ordering::Acquire) > 0 {
                self.expect_len(len);
            }
            #[cfg(test)]
            self.note(Event::SetLen(len));
            Ok(())
        }
    }

    /// Fails if tests want it to.
    #[cfg(test)]
    pub(super) fn check_fault(&self) -> io::Result<()> {
        let recording = self.recording.as_ref();
        recording.map_or(Ok(()), super::record::Recording::check)
    }

    /// Has something noted that was done, for tests.
    #[cfg(test)]
    pub(super) fn note(&self, event: Event) -> usize {
        let recording = self.recording.as_ref();
        recording.map_or(0, |recording| recording.note(event))
    }

    /// Notes that the file has `len` bytes, and has reads past its end fail once it has less: then
    /// somebody has cut it, and zeroes are not what was there.
    pub fn expect_len(&self, len: u64) {
        self.expected.fetch_max(len, Ordering::AcqRel);
    }

    /// Checks that a read may find zeroes from the end of the file on.
    ///
    /// # Errors
    /// The file was cut, or the host does not tell.
    pub(super) fn check_end(&self) -> io::Result<()> {
        let expected = self.expected.load(Ordering::Acquire);
        if expected == 0 {
            return Ok(());
        }
        let len = self.len()?;
        if len >= expected {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!(
                "{:?} was cut to {len} bytes while it is in use; put back what is missing",
                self.name
            ),
        ))
    }

    /// Promises that no byte from `len` on will ever be wanted. A write without the page cache that
    /// does not fit the file's alignment then cuts off what it has put behind that.
    pub fn keep_within(&self, len: u64) {
        self.limit.store(len, Ordering::Release);
    }

    /// Cuts off what is behind the file's limit, after a write up to `end`. The caller holds
    /// `rewriting`, as writes that reach behind the limit always do.
    pub(super) fn cut_excess(&self, end: u64) -> io::Result<()> {
        let limit = self.limit.load(Ordering::Acquire);
        if end > limit && self.device.is_none() && self.len()? > limit {
            self.file.set_len(limit)?;
        }
        Ok(())
    }

    /// Makes a range read as zeroes, as cheaply as the host can; `unmap` lets its space go.
    ///
    /// # Errors
    /// The host fails the request.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let (start, end) = self.whole_units(offset, len)?;
        if start >= end {
            return self.write_zero_data(offset, len);
        }
        self.write_zero_data(offset, start - offset)?;
        self.zero_units(start, end - start, unmap)?;
        self.write_zero_data(end, len - (end - offset))
    }

    fn zero_units(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let modes: &[libc::c_int] = if unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for mode in modes {
            match self.fallocate(mode | keep, offset, len) {
                Err(err) if is_unsupported(&err) => {}
                done => return done,
            }
        }
        self.write_zero_data(offset, len)
    }

    /// Gives the space of a range back; whether it then reads as zeroes depends on the host.
    ///
    /// A host that cannot do it leaves the range as it is, which is what discarding allows.
    ///
    /// # Errors
    /// The host fails the request.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (start, end) = self.whole_units(offset, len)?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(mode, start, end.saturating_sub(start)) {
            Err(err) if is_unsupported(&err) => Ok(()),
            done => done,
        }
    }

    /// Start and end of the units that are zeroed or discarded as a whole.
    fn whole_units(&self, offset: u64, len: u64) -> io::Result<(u64, u64)> {
        let unit = self.zero_align() as u64;
        let end = offset.checked_add(len);
        let start = offset.checked_next_multiple_of(unit);
        match (start, end) {
            (Some(start), Some(end)) => Ok((start, end - end % unit)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn write_zero_data(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut at = offset;
        while at < end {
            let chunk = usize::try_from(end - at)
                .unwrap_or(ZEROES_LEN)
                .min(ZEROES_LEN);
            let vec = iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len: chunk,
            };
            // SAFETY: the static array is at least `chunk` bytes long and only read.
            unsafe { self.write_at(std::iter::once(vec), at) }?;
            at += chunk as u64;
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (offset, len) = (to_off(offset)?, to_off(len)?);
        #[cfg(test)]
        self.check_fault()?;
        retry(|| {
            // SAFETY: fallocate touches no memory of this process.
            unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) as isize }
                .into_result()
        })
        .map(drop)?;
        #[cfg(test)]
        self.note(Event::Zero {
            offset: offset.unsigned_abs(),
            len: len.unsigned_abs(),
        });
        Ok(())
    }

    /// Makes written data durable, with the metadata needed to read it back.
    ///
    /// Once that has failed through the page cache it fails for ever: Linux tells of an error in
    /// writing back once, and then takes the pages that it could not write for clean.
    pub fn sync(&self) -> io::Result<()> {
        self.sync_by(File::sync_data)
    }

    fn sync_by(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(errno) = *lost {
            let earlier = io::Error::from_raw_os_error(errno);
            return Err(io::Error::new(
                earlier.kind(),
                format!("data was lost when an earlier flush failed: {earlier}"),
            ));
        }
        #[cfg(test)]
        let begin = self.note(Event::SyncBegins);
        let done = sync(&self.file);
        #[cfg(test)]
        if done.is_ok() {
            self.note(Event::SyncEnds(begin));
        }
        if let Err(error) = &done
            && !self.is_direct()
        {
            *lost = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        done
    }
}

/// Refuses what is neither a regular file nor a block device.
pub fn check_kind(metadata: &std::fs::Metadata, name: &str) -> Result<(), BlockError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a pipe"
    };
    Err(BlockError::NotADisk {
        path: name.to_owned(),
        kind: what,
    })
}

/// Device and inode number, by which two names of one file are recognised.
pub fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Device {
    fn examine(file: &File) -> io::Result<Self> {
        let (mut sector, mut physical) = (0, 0);
        // SAFETY: each ioctl writes one integer of the type its definition says.
        unsafe {
            ioctl::blksszget(file.as_raw_fd(), &raw mut sector)?;
            ioctl::blkpbszget(file.as_raw_fd(), &raw mut physical)?;
        }
        let sector = usize::try_from(sector)
            .ok()
            .filter(|size| size.is_power_of_two());
        Ok(Self {
            sector: sector.unwrap_or(4096),
            physical_block: physical.max(512),
        })
    }
}

/// Whether a block device refuses writes. Opening it for them may go well all the same.
///
/// # Errors
/// It is no block device, or the host does not tell.
pub fn is_read_only_device(file: &File) -> io::Result<bool> {
    let mut read_only = 0;
    // SAFETY: the ioctl writes one integer of the type its definition says.
    unsafe { ioctl::blkroget(file.as_raw_fd(), &raw mut read_only)? };
    Ok(read_only != 0)
}

fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: the ioctl writes one integer of the type its definition says.
    unsafe { ioctl::blkgetsize64(file.as_raw_fd(), &raw mut size)? };
    Ok(size)
}

fn set_direct(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: reading and setting status flags touches no memory.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

pub(super) fn to_off(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn is_unsupported(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

pub(super) fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

pub(super) trait IntoResult {
    fn into_result(self) -> io::Result<usize>;
}

impl IntoResult for isize {
    fn into_result(self) -> io::Result<usize> {
        usize::try_from(self).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fails(_: &File) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    #[test]
    fn a_failed_sync_through_the_page_cache_is_final() {
        let file = HostFile::new(tempfile::tempfile().unwrap(), "test", false).unwrap();
        file.sync().unwrap();
        file.sync_by(fails).unwrap_err();
        for _ in 0..2 {
            let error = file.sync().unwrap_err().to_string();
            assert!(
                error.contains("earlier flush") && error.contains("os error 5"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_failed_sync_of_direct_writes_is_tried_again() {
        let mut file = HostFile::new(tempfile::tempfile().unwrap(), "test", false).unwrap();
        file.set_align(Alignment {
            request: 4096,
            memory: 1,
        });
        file.sync_by(fails).unwrap_err();
        file.sync().unwrap();
    }
}
