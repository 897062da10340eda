//! Reading and writing a file at offsets, whatever its alignment.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::PoisonError;

use libc::iovec;

use super::direct::{Buffer, Cursor};
use super::file::{HostFile, IntoResult, retry, to_off};

/// Buffers handed to the kernel in one call; the array of them lives on the stack.
const BATCH: usize = 64;

impl HostFile {
    /// Fills the memory of `iovecs` from `offset`; past the end of the file it reads zeroes.
    ///
    /// # Errors
    /// The host fails the request.
    ///
    /// # Safety
    /// Every `iovec` must describe memory that is writable until this returns.
    pub unsafe fn read_at(
        &self,
        iovecs: impl Iterator<Item = iovec> + Clone,
        offset: u64,
    ) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        if !self.align().fits(iovecs.clone(), offset) {
            // SAFETY: the caller vouches for the memory.
            return unsafe { self.read_unaligned(iovecs, offset) };
        }
        let mut at = offset;
        in_batches(iovecs, |batch| {
            let len = batch_len(batch);
            // SAFETY: the caller vouches for the memory.
            unsafe { self.read_batch(batch, at) }?;
            at = end_of(at, len)?;
            Ok(())
        })
    }

    /// Writes the memory of `iovecs` at `offset`, growing a regular file as needed.
    ///
    /// With the page cache off a write that does not fit the file's alignment reads what is around
    /// it and writes it back. Such writes wait for each other, but an aligned one that overlaps one
    /// of them in time and range may come before it in one place and behind it in another. Such a
    /// write may also leave zeroes behind the file's end, up to the next boundary; see
    /// [`keep_within`](Self::keep_within).
    ///
    /// # Errors
    /// The host fails the request.
    ///
    /// # Safety
    /// Every `iovec` must describe memory that is readable until this returns.
    pub unsafe fn write_at(
        &self,
        iovecs: impl Iterator<Item = iovec> + Clone,
        offset: u64,
    ) -> io::Result<()> {
        #[cfg(test)]
        self.check_fault()?;
        if !self.align().fits(iovecs.clone(), offset) {
            // SAFETY: the caller vouches for the memory.
            return unsafe { self.write_unaligned(iovecs, offset) };
        }
        let mut at = offset;
        in_batches(iovecs.clone(), |batch| {
            let len = batch_len(batch);
            // SAFETY: the caller vouches for the memory.
            unsafe { self.write_batch(batch, at) }?;
            at = end_of(at, len)?;
            Ok(())
        })?;
        #[cfg(test)]
        self.note_write(iovecs, offset);
        Ok(())
    }

    /// Has a write noted, for tests.
    #[cfg(test)]
    fn note_write(&self, iovecs: impl Iterator<Item = iovec>, offset: u64) {
        if self.recording.is_none() {
            return;
        }
        let mut data = Vec::new();
        for vec in iovecs {
            // SAFETY: whoever wrote vouches for the memory; tests change none meanwhile.
            data.extend(unsafe {
                std::slice::from_raw_parts(vec.iov_base.cast::<u8>(), vec.iov_len)
            });
        }
        self.note(super::record::Event::Write { offset, data });
    }

    /// [`Self::read_at`] for memory of this process.
    ///
    /// # Errors
    /// The host fails the request.
    pub fn read_buf(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let vec = iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: the buffer is borrowed mutably until this returns.
        unsafe { self.read_at(std::iter::once(vec), offset) }
    }

    /// [`Self::write_at`] for memory of this process.
    ///
    /// # Errors
    /// The host fails the request.
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
                let fd = self.file().as_raw_fd();
                libc::preadv(fd, rest.as_ptr(), count(rest), to_off(at)?).into_result()
            })?;
            at = end_of(at, done as u64)?;
            rest = advance(rest, done);
            // A direct read that met the end of the file must not be continued at the odd offset
            // it stopped at, so the end is looked for rather than read for.
            if (done as u64) < wanted && (done == 0 || at >= self.len()?) {
                self.check_end()?;
                for vec in &mut *rest {
                    // SAFETY: the caller vouches for the memory.
                    unsafe { std::ptr::write_bytes(vec.iov_base.cast::<u8>(), 0, vec.iov_len) };
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`Self::write_at`].
    unsafe fn write_batch(&self, batch: &mut [iovec], offset: u64) -> io::Result<()> {
        let mut at = offset;
        let mut rest = batch;
        while !rest.is_empty() {
            // SAFETY: the caller vouches for the memory; the array of iovecs is ours.
            let done = retry(|| unsafe {
                let fd = self.file().as_raw_fd();
                libc::pwritev(fd, rest.as_ptr(), count(rest), to_off(at)?).into_result()
            })?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at = end_of(at, done as u64)?;
            rest = advance(rest, done);
        }
        Ok(())
    }

    /// Reads what the kernel would refuse by way of a buffer.
    ///
    /// # Safety
    ///
    /// As for [`Self::read_at`].
    unsafe fn read_unaligned(
        &self,
        iovecs: impl Iterator<Item = iovec> + Clone,
        offset: u64,
    ) -> io::Result<()> {
        let end = end_of(offset, total(iovecs.clone()))?;
        // SAFETY: the caller vouches for the memory.
        let mut memory = unsafe { Cursor::new(iovecs) };
        self.buffers.lend(|buffer| {
            let mut at = offset;
            while at < end {
                let span = Span::next(self, at, end)?;
                self.fill(buffer, 0, span.start, span.len)?;
                let bytes = buffer.bytes();
                memory.fill(
                    bytes
                        .get(span.skip..span.skip + span.wanted)
                        .unwrap_or_default(),
                );
                at += span.wanted as u64;
            }
            Ok(())
        })
    }

    /// Writes what the kernel would refuse by way of a buffer.
    ///
    /// # Safety
    ///
    /// As for [`Self::write_at`].
    unsafe fn write_unaligned(
        &self,
        iovecs: impl Iterator<Item = iovec> + Clone,
        offset: u64,
    ) -> io::Result<()> {
        let end = end_of(offset, total(iovecs.clone()))?;
        // SAFETY: the caller vouches for the memory.
        let mut memory = unsafe { Cursor::new(iovecs) };
        self.buffers.lend(|buffer| {
            let mut at = offset;
            while at < end {
                let span = Span::next(self, at, end)?;
                let whole = span.wanted == span.len;
                // Nothing around it has to be kept, so it is as good as an aligned one.
                let _one_at_a_time = (!whole).then(|| {
                    self.rewriting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                });
                self.fill_edges(buffer, &span)?;
                let bytes = buffer.bytes();
                memory.copy_to(
                    bytes
                        .get_mut(span.skip..span.skip + span.wanted)
                        .unwrap_or_default(),
                );
                let mut all = [iovec {
                    iov_base: bytes.as_mut_ptr().cast(),
                    iov_len: span.len,
                }];
                // SAFETY: the buffer has at least that many bytes.
                unsafe { self.write_batch(&mut all, span.start)? };
                self.cut_excess(span.start + span.len as u64)?;
                at += span.wanted as u64;
            }
            Ok(())
        })
    }

    /// Reads the units at both ends of `span` of which only a part is to be written.
    fn fill_edges(&self, buffer: &mut Buffer, span: &Span) -> io::Result<()> {
        let unit = self.align().request;
        let last = span.len - unit;
        if span.skip > 0 || span.wanted < unit {
            self.fill(buffer, 0, span.start, unit)?;
        }
        if last > 0 && span.skip + span.wanted < span.len {
            self.fill(buffer, last, span.start + last as u64, unit)?;
        }
        Ok(())
    }

    /// Reads `len` bytes at `offset` into the buffer from byte `at` on; all of them aligned.
    fn fill(&self, buffer: &mut Buffer, at: usize, offset: u64, len: usize) -> io::Result<()> {
        let bytes = buffer.bytes().get_mut(at..at + len);
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let mut vec = [iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        // SAFETY: the memory is that of `bytes`.
        unsafe { self.read_batch(&mut vec, offset) }
    }
}

/// A part of an unaligned request that fits a buffer, with what is around it up to the next
/// boundaries.
struct Span {
    /// Where the buffer's content belongs, and how long it is.
    start: u64,
    len: usize,
    /// The part asked for: where in the buffer it begins and how long it is.
    skip: usize,
    wanted: usize,
}

impl Span {
    /// The part of a request at `at` that ends at `end`.
    fn next(file: &HostFile, at: u64, end: u64) -> io::Result<Self> {
        let align = file.align();
        let start = align.before(at);
        let stop = align.after(end).ok_or(io::ErrorKind::InvalidInput)?;
        let stop = stop.min(start + Buffer::LEN as u64);
        let size = |len: u64| usize::try_from(len).map_err(io::Error::other);
        Ok(Self {
            start,
            len: size(stop - start)?,
            skip: size(at - start)?,
            wanted: size(stop.min(end) - at)?,
        })
    }
}

fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    offset
        .checked_add(len)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn total(iovecs: impl Iterator<Item = iovec>) -> u64 {
    iovecs.fold(0, |sum, vec| sum.saturating_add(vec.iov_len as u64))
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
    total(iovecs.iter().copied())
}

fn count(iovecs: &[iovec]) -> libc::c_int {
    // A batch has at most BATCH entries.
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use proptest::prelude::*;

    use super::super::direct::Alignment;
    use super::*;

    /// A file that is asked as if the page cache were off and the disk had large sectors.
    fn strict() -> HostFile {
        let mut file = HostFile::new(tempfile::tempfile().unwrap(), "test", false).unwrap();
        file.set_align(Alignment {
            request: 4096,
            memory: 512,
        });
        file
    }

    fn direct() -> HostFile {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        HostFile::new(file, "test", true).unwrap()
    }

    /// Cuts memory into pieces of these lengths, and what is left over.
    fn pieces(memory: &mut [u8], cuts: &[usize]) -> Vec<iovec> {
        let mut rest = memory;
        let mut all = Vec::new();
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at_mut(cut.min(rest.len()));
            all.push(iovec {
                iov_base: now.as_mut_ptr().cast(),
                iov_len: now.len(),
            });
            rest = later;
        }
        all
    }

    fn write(file: &HostFile, offset: u64, data: &[u8], cuts: &[usize]) {
        let mut memory = data.to_vec();
        let vecs = pieces(&mut memory, cuts);
        // SAFETY: the memory lives to the end of this function.
        unsafe { file.write_at(vecs.iter().copied(), offset).unwrap() };
    }

    fn read(file: &HostFile, offset: u64, len: usize, cuts: &[usize]) -> Vec<u8> {
        let mut memory = vec![0xee; len];
        let vecs = pieces(&mut memory, cuts);
        // SAFETY: the memory lives to the end of this function.
        unsafe { file.read_at(vecs.iter().copied(), offset).unwrap() };
        memory
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_alignment_reads_what_was_written(
            writes in proptest::collection::vec(
                (0..300_000_u64, 1..200_000_usize, proptest::collection::vec(0..9000_usize, 0..5)),
                1..6,
            ),
            truly_direct: bool,
        ) {
            let file = if truly_direct { direct() } else { strict() };
            let mut model = vec![0; 600_000];
            for (number, (offset, len, cuts)) in (1_u8..).zip(&writes) {
                let data: Vec<u8> = (0..*len).map(|at| (at % 251) as u8 ^ number).collect();
                write(&file, *offset, &data, cuts);
                model[*offset as usize..][..*len].copy_from_slice(&data);
                prop_assert_eq!(&read(&file, *offset, *len, &[]), &data);
            }
            prop_assert_eq!(read(&file, 1, 599_998, &[3, 4093, 70_000]), &model[1..599_999]);
        }
    }

    #[test]
    fn neighbours_in_one_unit_keep_each_others_bytes() {
        let file = strict();
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let file = &file;
                scope.spawn(move || {
                    for round in 0..200 {
                        let at = u64::from(thread) * 500 + 4000 * (round % 4);
                        write(file, at, &[thread + 1; 500], &[77]);
                    }
                });
            }
        });
        for (at, byte) in read(&file, 0, 16_000, &[]).into_iter().enumerate() {
            assert_eq!(usize::from(byte), at % 4000 / 500 + 1, "at {at}");
        }
    }

    #[test]
    fn nothing_stays_behind_the_limit() {
        let file = strict();
        file.keep_within(5000);
        write(&file, 4900, &[7; 100], &[]);
        assert_eq!(file.len().unwrap(), 5000);
        let around = read(&file, 4890, 200, &[]);
        assert_eq!(
            (&around[..10], &around[10..110]),
            (&[0; 10][..], &[7; 100][..])
        );
        file.grow(10_000).unwrap();
        write(&file, 9_000, &[8; 1000], &[]);
        assert_eq!(file.len().unwrap(), 10_000);
    }

    #[test]
    fn writes_without_the_page_cache_are_in_the_file() {
        let named = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = HostFile::new(named.reopen().unwrap(), "test", true).unwrap();
        write(&file, 100, &[1; 10_000], &[5000]);
        let content = std::fs::read(named.path()).unwrap();
        assert_eq!(content[..100], [0; 100]);
        assert_eq!(content[100..10_100], [1; 10_000]);
        assert!(content[10_100..].iter().all(|byte| *byte == 0));
    }
}
