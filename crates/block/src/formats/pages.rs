//! Tables of an image, read as they are needed.
//!
//! The tables of a large disk take hundreds of megabytes, and those of a hostile image as many as
//! its header likes to say. So no table is ever read whole: 4 KiB pages of the files are kept in a
//! cache of fixed size, at most 16 MiB for one image.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use super::range::FileRange;

/// Bytes of the file that are read at a time.
const PAGE_LEN: usize = 4096;
/// Most pages kept, 16 MiB of them.
const PAGES_MAX: usize = 4096;

/// A page of a file, or none yet.
#[derive(Debug, Default)]
struct Page {
    /// Which file, and which page of it, `bytes` is.
    id: (u32, u64),
    /// Less than a page at the end of the file.
    bytes: Vec<u8>,
}

/// The cache of an image. Costs some 50 bytes for each of its pages, and 4 KiB once one is used.
#[derive(Clone, Debug)]
pub struct PageCache {
    /// Each page of the files has one slot where it may be.
    slots: Arc<[RwLock<Page>]>,
}

impl PageCache {
    /// A cache for tables that have about `len` bytes in all.
    pub fn new(len: u64) -> Self {
        let pages = usize::try_from(len / PAGE_LEN as u64).unwrap_or(PAGES_MAX);
        // Some more, as tables may begin anywhere in a page, and pages share slots.
        let slots = pages.saturating_add(4).min(PAGES_MAX).next_power_of_two();
        Self {
            slots: (0..slots).map(|_| RwLock::default()).collect(),
        }
    }

    /// Tables tend to stand at equal distances, so their pages are spread by a multiplicative hash
    /// (Fibonacci's).
    fn slot(&self, id: (u32, u64)) -> &RwLock<Page> {
        let number = id.1.wrapping_add(u64::from(id.0) << 40);
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = usize::try_from(hash).unwrap_or_default() & (self.slots.len() - 1);
        &self.slots[index]
    }
}

/// The tables in one file of an image.
#[derive(Debug)]
pub struct TablePages {
    range: FileRange,
    file: u32,
    cache: PageCache,
}

impl TablePages {
    /// Prepares to read tables of `range` through `cache`, where its pages are those of `file`.
    pub fn new(range: FileRange, file: u32, cache: PageCache) -> Self {
        Self { range, file, cache }
    }

    /// The image that the tables are of.
    pub fn range(&self) -> &FileRange {
        &self.range
    }

    /// Reads the `N` bytes at `offset` into the image.
    ///
    /// # Errors
    /// The image ends before, or the host fails.
    pub fn read<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut value = [0; N];
        let mut done = 0;
        while done < N {
            let at = offset.saturating_add(done as u64);
            done += self.copy(at, &mut value[done..])?;
        }
        Ok(value)
    }

    /// Copies what one page has from `offset` into `buf`; returns how much that was.
    fn copy(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let number = offset / PAGE_LEN as u64;
        let within = usize::try_from(offset % PAGE_LEN as u64).unwrap_or_default();
        let id = (self.file, number);
        let slot = self.cache.slot(id);
        {
            let page = slot.read().unwrap_or_else(PoisonError::into_inner);
            if page.id == id
                && let Some(done) = copy_from(&page.bytes, within, buf)
            {
                return Ok(done);
            }
        }
        let mut page = slot.write().unwrap_or_else(PoisonError::into_inner);
        self.fill(&mut page, id)?;
        copy_from(&page.bytes, within, buf).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it is cut off: it ends before a table's entry at byte {offset}"),
            )
        })
    }

    fn fill(&self, page: &mut Page, id: (u32, u64)) -> io::Result<()> {
        let start = id.1.saturating_mul(PAGE_LEN as u64);
        let present = self.range.len().saturating_sub(start);
        let len = usize::try_from(present).unwrap_or(PAGE_LEN).min(PAGE_LEN);
        // Empty until it is read, so that a failure leaves nothing wrong behind.
        let mut bytes = std::mem::take(&mut page.bytes);
        bytes.resize(len, 0);
        self.range.read(&mut bytes, start)?;
        (page.id, page.bytes) = (id, bytes);
        Ok(())
    }
}

/// Copies from `bytes` at `at` as much as both have; nothing is an error.
fn copy_from(bytes: &[u8], at: usize, buf: &mut [u8]) -> Option<usize> {
    let from = bytes.get(at..).filter(|from| !from.is_empty())?;
    let len = from.len().min(buf.len());
    buf[..len].copy_from_slice(&from[..len]);
    Some(len)
}
