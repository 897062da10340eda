//! A request's memory, or a part of it, without copying what describes it.

use libc::iovec;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;

/// The part of a request's memory that belongs to one extent.
///
/// The memory may be a guest's, which can change it at any moment: it is only ever handed to the
/// kernel or copied to and from, never referred to.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    bufs: &'a [VolatileSlice<'a, BS<'a, ()>>],
    skip: u64,
    len: u64,
}

impl<'a> Window<'a> {
    /// All of `bufs`.
    pub fn new(bufs: &'a [VolatileSlice<'a>]) -> Self {
        Self {
            bufs,
            skip: 0,
            len: crate::total_len(bufs),
        }
    }

    /// Bytes in the window.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts off the first `len` bytes, or what there is, and returns them.
    pub fn split_off(&mut self, len: u64) -> Self {
        let len = len.min(self.len);
        let first = Self { len, ..*self };
        self.skip += len;
        self.len -= len;
        while let Some((buf, rest)) = self.bufs.split_first()
            && self.skip >= buf.len() as u64
        {
            self.skip -= buf.len() as u64;
            self.bufs = rest;
        }
        first
    }

    /// The window's memory, piece by piece, none of them empty.
    pub fn slices(self) -> impl Iterator<Item = VolatileSlice<'a>> + Clone {
        let (mut skip, mut left) = (self.skip, self.len);
        self.bufs.iter().filter_map(move |buf| {
            let start = skip.min(buf.len() as u64);
            skip -= start;
            let len = left.min(buf.len() as u64 - start);
            left -= len;
            // Both fit, as they are within the buffer.
            let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
            (len > 0).then(|| buf.subslice(start, len).ok()).flatten()
        })
    }

    /// The window's memory as the kernel wants it. It is readable and writable for `'a`.
    pub fn iovecs(self) -> impl Iterator<Item = iovec> + Clone {
        self.slices().map(|slice| {
            // The guard holds nothing: guest memory is always mapped here.
            let guard = slice.ptr_guard_mut();
            iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            }
        })
    }

    /// Copies the first bytes of `from` into the window, as many as fit.
    pub fn copy_from(self, mut from: &[u8]) {
        for slice in self.slices() {
            let (now, rest) = from.split_at(slice.len().min(from.len()));
            slice.copy_from(now);
            from = rest;
        }
    }

    /// Fills the window with zeroes.
    pub fn fill_zero(self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for slice in self.slices() {
            let mut at = 0;
            while at < slice.len() {
                let len = ZEROES.len().min(slice.len() - at);
                if let Ok(part) = slice.subslice(at, len) {
                    part.copy_from(&ZEROES[..len]);
                }
                at += len;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn windows_cut_across_buffers() {
        let mut memory = [[0_u8; 10], [0; 10], [0; 10]];
        let bufs: Vec<_> = memory
            .iter_mut()
            .map(|part| VolatileSlice::from(&mut part[..]))
            .collect();
        let mut rest = Window::new(&bufs);
        assert_eq!(rest.len(), 30);
        let first = rest.split_off(7);
        let second = rest.split_off(16);
        assert_eq!((first.len(), second.len(), rest.len()), (7, 16, 7));
        first.copy_from(&[1; 100]);
        second.copy_from(&[2; 16]);
        rest.copy_from(&[3; 3]);
        assert_eq!(
            second.slices().map(|it| it.len()).collect::<Vec<_>>(),
            [3, 10, 3]
        );
        rest.fill_zero();
        assert!(rest.split_off(100).len() == 7 && rest.is_empty());
        assert_eq!(rest.slices().count(), 0);
        let flat = memory.concat();
        assert_eq!(flat[..7], [1; 7]);
        assert_eq!(flat[7..23], [2; 16]);
        assert_eq!(flat[23..], [0; 7]);
    }
}
