//! One file or block device of the host, read and written at offsets.
//!
//! This is the only room of the crate that hands memory to the kernel. Memory is always described
//! by `iovec`s, never by slices: a guest may change its memory at any moment, so no Rust reference
//! to it may exist.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::iovec;

use crate::BlockError;

mod ioctl {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, 0x127b, libc::c_uint);
}

/// Buffers handed to the kernel in one call; the array of them lives on the stack.
const BATCH: usize = 64;
/// Alignment of direct I/O that every Linux filesystem and disk accepts.
const SAFE_DIRECT_ALIGN: usize = 4096;
/// Bytes of zeroes written at a time where the host cannot zero a range itself.
const ZEROES_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// Alignment that requests to a file must keep, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of offsets and lengths.
    pub request: usize,
    /// Of memory addresses.
    pub memory: usize,
}

/// An opened file or block device.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    name: String,
    align: Alignment,
    /// Smallest unit of the device, 1 for a regular file.
    sector: usize,
    physical_block: u32,
    device_size: Option<u64>,
    /// The error by which written data was lost. Held while waiting for the disk.
    lost: Mutex<Option<i32>>,
}

impl HostFile {
    /// Takes a file that the caller opened; `direct` turns the host's page cache off for it.
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
        let device = metadata.file_type().is_block_device();
        let (device_size, sector, physical) = if device {
            let (size, sector, physical) = device_geometry(&file).map_err(failed("examine"))?;
            (Some(size), sector, physical)
        } else {
            (None, 1, 4096)
        };
        if direct {
            set_direct(&file).map_err(failed("use direct I/O on"))?;
        }
        let align = match (direct, device) {
            (false, _) => Alignment {
                request: 1,
                memory: 1,
            },
            (true, true) => Alignment {
                request: sector,
                memory: sector.max(512),
            },
            (true, false) => Alignment {
                request: SAFE_DIRECT_ALIGN,
                memory: SAFE_DIRECT_ALIGN,
            },
        };
        Ok(Self {
            file,
            name: name.to_owned(),
            align,
            sector,
            physical_block: physical.max(512),
            device_size,
            lost: Mutex::default(),
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

    /// Whether the page cache is off.
    pub fn is_direct(&self) -> bool {
        self.align.request > 1
    }

    /// Smallest unit that can be zeroed or discarded, in bytes.
    pub fn zero_align(&self) -> usize {
        self.sector.max(self.align.request)
    }

    /// Smallest unit the host writes without a read-modify-write, in bytes.
    pub fn physical_block(&self) -> u32 {
        self.physical_block
    }

    /// Current length in bytes.
    pub fn len(&self) -> io::Result<u64> {
        match self.device_size {
            Some(size) => Ok(size),
            None => Ok(self.file.metadata()?.len()),
        }
    }

    /// Fills the memory of `iovecs` from `offset`; past the end of the file it reads zeroes.
    ///
    /// # Safety
    ///
    /// Every `iovec` must describe memory that is writable until this returns.
    pub unsafe fn read_at(
        &self,
        iovecs: impl Iterator<Item = iovec>,
        offset: u64,
    ) -> io::Result<()> {
        let mut at = offset;
        in_batches(iovecs, |batch| {
            let len = batch_len(batch);
            // SAFETY: the caller vouches for the memory.
            unsafe { self.read_batch(batch, at) }?;
            at = at.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(())
        })
    }

    /// Writes the memory of `iovecs` at `offset`, growing a regular file as needed.
    ///
    /// # Safety
    ///
    /// Every `iovec` must describe memory that is readable until this returns.
    pub unsafe fn write_at(
        &self,
        iovecs: impl Iterator<Item = iovec>,
        offset: u64,
    ) -> io::Result<()> {
        let mut at = offset;
        in_batches(iovecs, |batch| {
            let mut rest = batch;
            while !rest.is_empty() {
                // SAFETY: the caller vouches for the memory; the array of iovecs is ours.
                let done = retry(|| unsafe {
                    libc::pwritev(
                        self.file.as_raw_fd(),
                        rest.as_ptr(),
                        count(rest),
                        to_off(at)?,
                    )
                    .into_result()
                })?;
                if done == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                at = at
                    .checked_add(done as u64)
                    .ok_or(io::ErrorKind::InvalidInput)?;
                rest = advance(rest, done);
            }
            Ok(())
        })
    }

    /// [`Self::read_at`] for memory of this process.
    pub fn read_buf(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let vec = iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: the buffer is borrowed mutably until this returns.
        unsafe { self.read_at(std::iter::once(vec), offset) }
    }

    /// [`Self::write_at`] for memory of this process.
    pub fn write_buf(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let vec = iovec {
            iov_base: buf.as_ptr().cast_mut().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: the buffer is borrowed until this returns, and only read.
        unsafe { self.write_at(std::iter::once(vec), offset) }
    }

    /// # Safety
    ///
    /// As for [`Self::read_at`].
    unsafe fn read_batch(&self, batch: &mut [iovec], offset: u64) -> io::Result<()> {
        let mut at = offset;
        let mut rest = batch;
        while !rest.is_empty() {
            let wanted = batch_len(rest);
            // SAFETY: the caller vouches for the memory; the array of iovecs is ours.
            let done = retry(|| unsafe {
                libc::preadv(
                    self.file.as_raw_fd(),
                    rest.as_ptr(),
                    count(rest),
                    to_off(at)?,
                )
                .into_result()
            })?;
            at = at
                .checked_add(done as u64)
                .ok_or(io::ErrorKind::InvalidInput)?;
            rest = advance(rest, done);
            // A direct read that met the end of the file must not be continued at the odd offset
            // it stopped at, so the end is looked for rather than read for.
            if (done as u64) < wanted && (done == 0 || at >= self.len()?) {
                for vec in &mut *rest {
                    // SAFETY: the caller vouches for the memory.
                    unsafe { std::ptr::write_bytes(vec.iov_base.cast::<u8>(), 0, vec.iov_len) };
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Makes a range read as zeroes, as cheaply as the host can; `unmap` lets its space go.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
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
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(mode, offset, len) {
            Err(err) if is_unsupported(&err) => Ok(()),
            done => done,
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
        retry(|| {
            // SAFETY: fallocate touches no memory of this process.
            unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) as isize }
                .into_result()
        })
        .map(drop)
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
        let done = sync(&self.file);
        if let Err(error) = &done
            && !self.is_direct()
        {
            *lost = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        done
    }
}

/// Whether a disk has changes that are not yet durable.
#[derive(Debug, Default)]
pub struct Unflushed {
    changed: AtomicBool,
    /// Held from taking `changed` until the changes are durable: another flush that finds nothing
    /// left to do must not end before them.
    flushing: Mutex<()>,
}

impl Unflushed {
    /// Notes a change. To be called once it is done, not before: a flush that runs meanwhile may
    /// come too early for the change, and must not take the note away.
    pub fn note(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Has `sync` make all changes durable that were noted before, if there are any.
    pub fn flush(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<(), BlockError> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.changed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        sync().map_err(|source| {
            self.note();
            BlockError::Flush(source)
        })
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

/// Size, logical sector and physical block of a block device, in bytes.
fn device_geometry(file: &File) -> io::Result<(u64, usize, u32)> {
    let (mut size, mut sector, mut physical) = (0, 0, 0);
    let fd = file.as_raw_fd();
    // SAFETY: each ioctl writes one integer of the type its definition says.
    unsafe {
        ioctl::blkgetsize64(fd, &raw mut size)?;
        ioctl::blksszget(fd, &raw mut sector)?;
        ioctl::blkpbszget(fd, &raw mut physical)?;
    }
    let sector = usize::try_from(sector)
        .ok()
        .filter(|size| size.is_power_of_two());
    Ok((size, sector.unwrap_or(SAFE_DIRECT_ALIGN), physical))
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

/// Calls `op` with up to [`BATCH`] non-empty iovecs at a time.
fn in_batches(
    iovecs: impl Iterator<Item = iovec>,
    mut op: impl FnMut(&mut [iovec]) -> io::Result<()>,
) -> io::Result<()> {
    let mut batch = [iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let mut filled = 0;
    for vec in iovecs.filter(|vec| vec.iov_len > 0) {
        batch[filled] = vec;
        filled += 1;
        if filled == BATCH {
            op(&mut batch)?;
            filled = 0;
        }
    }
    if filled == 0 {
        Ok(())
    } else {
        op(&mut batch[..filled])
    }
}

/// What is left of `iovecs` once the first `done` bytes are dealt with.
fn advance(iovecs: &mut [iovec], mut done: usize) -> &mut [iovec] {
    let mut first = 0;
    for vec in iovecs.iter_mut() {
        if done < vec.iov_len {
            vec.iov_base = vec.iov_base.cast::<u8>().wrapping_add(done).cast();
            vec.iov_len -= done;
            break;
        }
        done -= vec.iov_len;
        first += 1;
    }
    &mut iovecs[first..]
}

fn batch_len(iovecs: &[iovec]) -> u64 {
    iovecs
        .iter()
        .fold(0, |sum, vec| sum.saturating_add(vec.iov_len as u64))
}

fn count(iovecs: &[iovec]) -> libc::c_int {
    // A batch has at most BATCH entries.
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

fn to_off(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn is_unsupported(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

trait IntoResult {
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
    use std::sync::mpsc;
    use std::time::Duration;

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
        file.align.request = SAFE_DIRECT_ALIGN;
        file.sync_by(fails).unwrap_err();
        file.sync().unwrap();
    }

    #[test]
    fn a_flush_waits_for_the_one_under_way() {
        let unflushed = Unflushed::default();
        unflushed.note();
        let (started, wait_start) = mpsc::channel();
        let (release, blocked) = mpsc::channel::<()>();
        let (done, wait_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let unflushed = &unflushed;
            // Dropped here if the test fails, which frees the thread that waits for it.
            let release = release;
            scope.spawn(move || {
                let sync = || {
                    started.send(()).unwrap();
                    blocked.recv().unwrap();
                    Ok(())
                };
                unflushed.flush(sync).unwrap();
            });
            wait_start.recv().unwrap();
            scope.spawn(move || {
                unflushed.flush(|| unreachable!()).unwrap();
                done.send(()).unwrap();
            });
            wait_done
                .recv_timeout(Duration::from_millis(100))
                .unwrap_err();
            release.send(()).unwrap();
            wait_done.recv().unwrap();
        });
    }

    #[test]
    fn a_failed_flush_leaves_its_changes_to_the_next() {
        let unflushed = Unflushed::default();
        unflushed.note();
        unflushed
            .flush(|| Err(io::ErrorKind::Other.into()))
            .unwrap_err();
        let mut synced = false;
        let sync = || {
            synced = true;
            Ok(())
        };
        unflushed.flush(sync).unwrap();
        assert!(synced);
    }
}
