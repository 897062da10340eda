//! What a file asks of requests when the page cache is off, and memory for those that don't fit.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use libc::iovec;
use vm_memory::VolatileSlice;

/// Alignment of direct I/O that every Linux filesystem and disk accepts, as far as known.
const SAFE: usize = 4096;
/// Bytes of a buffer, and of the unaligned part of a request that goes through one at a time.
const BUFFER_LEN: usize = 128 << 10;
/// Alignment of buffers; the most that memory is ever asked for.
const BUFFER_ALIGN: usize = 4096;
/// Buffers kept for the next requests.
const KEPT: usize = 4;

/// Alignment that requests to a file must keep, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of offsets and lengths.
    pub request: usize,
    /// Of memory addresses.
    pub memory: usize,
}

impl Alignment {
    /// What any request fits.
    pub const NONE: Self = Self {
        request: 1,
        memory: 1,
    };

    /// What direct I/O on `file` asks for; `sector` is its device's if it is one, otherwise 1.
    ///
    /// # Errors
    /// It is more than a buffer has, or there is no direct I/O on this file at all.
    pub fn of_direct(file: &File, sector: usize) -> io::Result<Self> {
        let align = match statx(file)? {
            Some(align) => align,
            None if sector > 1 => Self {
                request: sector,
                memory: sector.max(512),
            },
            None => Self {
                request: SAFE,
                memory: SAFE,
            },
        };
        let fits = |align: usize, most| align.is_power_of_two() && align <= most;
        if !fits(align.request, BUFFER_LEN) || !fits(align.memory, BUFFER_ALIGN) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(align)
    }

    /// Whether the kernel takes these buffers at `offset` as they are.
    pub fn fits(self, iovecs: impl Iterator<Item = iovec>, offset: u64) -> bool {
        let request = self.request as u64 - 1;
        if self.request == 1 {
            return true;
        }
        let (mut bases, mut lens) = (0, 0);
        for vec in iovecs {
            bases |= vec.iov_base.addr();
            lens |= vec.iov_len as u64;
        }
        (offset | lens) & request == 0 && bases & (self.memory - 1) == 0
    }

    /// The next boundary at or before `offset`.
    pub fn before(self, offset: u64) -> u64 {
        offset & !(self.request as u64 - 1)
    }

    /// The next boundary at or after `offset`.
    pub fn after(self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.request as u64)
    }
}

/// Asks the kernel for the alignment; `None` where it is too old to know (before 6.1) or the
/// filesystem does not say.
fn statx(file: &File) -> io::Result<Option<Alignment>> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string and the answer lives here.
    let failed = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    } != 0;
    if failed {
        return Ok(None);
    }
    // SAFETY: zeroed memory is a valid answer, and the kernel has filled it.
    let answer = unsafe { answer.assume_init() };
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    match (answer.stx_dio_offset_align, answer.stx_dio_mem_align) {
        (0, _) | (_, 0) => Err(io::ErrorKind::Unsupported.into()),
        (request, memory) => {
            let convert = |align| usize::try_from(align).map_err(io::Error::other);
            Ok(Some(Alignment {
                request: convert(request)?,
                memory: convert(memory)?,
            }))
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; BUFFER_ALIGN]);

/// Aligned memory of the host.
pub struct Buffer(Box<[Page]>);

impl Buffer {
    fn new() -> Self {
        Self(vec![Page([0; BUFFER_ALIGN]); BUFFER_LEN / BUFFER_ALIGN].into())
    }

    /// Bytes in it.
    pub const LEN: usize = BUFFER_LEN;

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let len = size_of_val(&*self.0);
        // SAFETY: a page is its bytes and nothing else, so pages in a row are bytes in a row.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// Lends buffers; keeps a few, so that requests don't allocate.
#[derive(Default)]
pub struct Buffers(Mutex<Vec<Buffer>>);

impl Buffers {
    /// Calls `work` with a buffer that nobody else has. What is in it is left from earlier.
    pub fn lend<T>(&self, work: impl FnOnce(&mut Buffer) -> T) -> T {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().pop();
        let mut buffer = kept.unwrap_or_else(Buffer::new);
        let result = work(&mut buffer);
        let mut kept = lock();
        if kept.len() < KEPT {
            kept.push(buffer);
        }
        result
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").finish_non_exhaustive()
    }
}

/// The memory of a request, taken from front to back.
pub struct Cursor<I> {
    rest: I,
    current: iovec,
}

impl<I: Iterator<Item = iovec>> Cursor<I> {
    /// # Safety
    ///
    /// Every `iovec` must describe memory that is readable, and writable if it is to be filled,
    /// for as long as the cursor lives.
    pub unsafe fn new(iovecs: I) -> Self {
        Self {
            rest: iovecs,
            current: iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
        }
    }

    /// Copies `from` into the next bytes.
    pub fn fill(&mut self, mut from: &[u8]) {
        while let Some(part) = self.take(from.len()) {
            let (now, rest) = from.split_at(part.len());
            part.copy_from(now);
            from = rest;
        }
    }

    /// Copies the next bytes into `to`.
    pub fn copy_to(&mut self, mut to: &mut [u8]) {
        while let Some(part) = self.take(to.len()) {
            let (now, rest) = to.split_at_mut(part.len());
            part.copy_to(now);
            to = rest;
        }
    }

    /// The next bytes in one piece, at most `most`; `None` at the end or if none are wanted.
    fn take(&mut self, most: usize) -> Option<VolatileSlice<'_>> {
        if most == 0 {
            return None;
        }
        while self.current.iov_len == 0 {
            self.current = self.rest.next()?;
        }
        let base: *mut u8 = self.current.iov_base.cast();
        let len = self.current.iov_len.min(most);
        self.current.iov_base = base.wrapping_add(len).cast();
        self.current.iov_len -= len;
        // SAFETY: whoever made the cursor vouches for the memory.
        Some(unsafe { VolatileSlice::new(base, len) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_told_by_every_part() {
        let align = Alignment {
            request: 512,
            memory: 4,
        };
        let vec = |base: usize, iov_len| iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len,
        };
        let fits = |vecs: &[iovec], offset| align.fits(vecs.iter().copied(), offset);
        assert!(fits(&[vec(0x1000, 512), vec(0x2004, 1024)], 512));
        assert!(!fits(&[vec(0x1000, 512)], 511));
        assert!(!fits(&[vec(0x1000, 256), vec(0x2000, 256)], 0));
        assert!(!fits(&[vec(0x1000, 512), vec(0x2002, 512)], 0));
        assert!(Alignment::NONE.fits([vec(1, 1)].into_iter(), 1));
        assert_eq!((align.before(1023), align.after(513)), (512, Some(1024)));
        assert_eq!(align.after(u64::MAX), None);
    }

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let buffers = Buffers::default();
        let address = |buffer: &mut Buffer| {
            assert_eq!(buffer.bytes().len(), Buffer::LEN);
            buffer.bytes().as_ptr().addr()
        };
        let first = buffers.lend(|outer| {
            assert_ne!(buffers.lend(address), address(outer));
            address(outer)
        });
        assert_eq!(first % BUFFER_ALIGN, 0);
        assert_eq!(buffers.lend(address), first);
    }
}
