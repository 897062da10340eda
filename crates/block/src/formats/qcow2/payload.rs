//! What is written: somebody's memory, or zeroes; and memory for what is copied.

use std::sync::{Mutex, PoisonError};

use libc::iovec;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::host::Window;

const PAGE: usize = 4096;
/// Bytes of zeroes that one piece of a request has.
const ZEROES_LEN: usize = 64 << 10;
/// Buffers kept for the next requests.
const MAX_SPARE: usize = 4;

#[repr(C, align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// A page of memory, as direct I/O wants it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// What is written.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    window: Window<'a>,
    /// Zeroes after that, in bytes; one of the two is empty.
    zeroes: u64,
}

impl<'a> Payload<'a> {
    /// Nothing.
    pub fn nothing() -> Self {
        Self::zeroes(0)
    }

    /// That many zeroes.
    pub fn zeroes(len: u64) -> Self {
        Self {
            window: Window::new(&[]),
            zeroes: len,
        }
    }

    /// The memory of a request, or a part of it.
    pub fn window(window: Window<'a>) -> Self {
        Self { window, zeroes: 0 }
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.window.len() + self.zeroes
    }

    /// Cuts off the first `len` bytes, or what there is, and returns them.
    pub fn split_off(&mut self, len: u64) -> Self {
        let window = self.window.split_off(len);
        let zeroes = self.zeroes.min(len - window.len());
        self.zeroes -= zeroes;
        Self { window, zeroes }
    }

    /// The memory as the kernel wants it. It is readable for `'a`.
    pub fn iovecs(self) -> impl Iterator<Item = iovec> + Clone {
        let pieces = self.zeroes.div_ceil(ZEROES_LEN as u64);
        let zeroes = (0..pieces).map(move |piece| {
            let left = self.zeroes - piece * ZEROES_LEN as u64;
            iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len: usize::try_from(left).unwrap_or(ZEROES_LEN).min(ZEROES_LEN),
            }
        });
        self.window.iovecs().chain(zeroes)
    }
}

/// Memory for what is copied, kept from request to request.
#[derive(Default)]
pub struct Spare {
    buffers: Mutex<Vec<Vec<Page>>>,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").finish_non_exhaustive()
    }
}

/// Some memory, which goes back to where it came from when it is dropped.
pub struct Buffer<'a> {
    from: &'a Spare,
    pages: Vec<Page>,
    len: usize,
}

impl Spare {
    /// `len` bytes of memory, whatever is in them.
    pub fn take(&self, len: usize) -> Buffer<'_> {
        let mut spare = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages = spare.pop().unwrap_or_default();
        drop(spare);
        if pages.len() < len.div_ceil(PAGE) {
            pages.resize(len.div_ceil(PAGE), Page([0; PAGE]));
        }
        Buffer {
            from: self,
            pages,
            len,
        }
    }
}

impl Buffer<'_> {
    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.pages
            .as_mut_bytes()
            .get_mut(..self.len)
            .unwrap_or_default()
    }

    /// The memory as one that requests can be done with.
    pub fn slice(&mut self) -> VolatileSlice<'_> {
        VolatileSlice::from(self.bytes())
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let mut spare = self
            .from
            .buffers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.push(std::mem::take(&mut self.pages));
        }
    }
}
