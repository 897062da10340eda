//! The bytes of an image: a file of the host, or a part of one such as a member of an archive.

use std::io;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use crate::host::HostFile;
use crate::layer::{Extent, Mapping};

/// A range of a file of the host that holds an image or a part of one.
#[derive(Clone, Debug)]
pub struct FileRange {
    file: Arc<HostFile>,
    start: u64,
    len: u64,
    /// Up to here, bytes past the end are zeroes; `len` or less means that none are.
    grown_to: u64,
}

impl FileRange {
    /// All of `file`, as long as it is now.
    ///
    /// # Errors
    /// The host can't tell how long it is.
    pub fn whole(file: Arc<HostFile>) -> io::Result<Self> {
        let len = file.len()?;
        Ok(Self {
            file,
            start: 0,
            len,
            grown_to: 0,
        })
    }

    /// The `len` bytes from `offset` of this range.
    ///
    /// # Errors
    /// They are not all within it.
    pub fn part(&self, offset: u64, len: u64) -> io::Result<Self> {
        let start = self.host_offset(offset, len)?;
        Ok(Self {
            file: Arc::clone(&self.file),
            start,
            len,
            grown_to: 0,
        })
    }

    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Has data up to `len` read as zeroes where the range ends before.
    pub fn grow(&mut self, len: u64) {
        self.grown_to = len;
    }

    /// The name of the image for messages, as the user gave it.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// Where the bytes from `offset` are, for up to `len` of them. For data, not tables: the file
    /// may have shrunk since, and then the host reads zeroes.
    ///
    /// # Errors
    /// The range ends before `offset`.
    pub fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let (extent, end) = if offset < self.len {
            let offset = self.start.saturating_add(offset);
            let file = &self.file;
            (Extent::Data { file, offset }, self.len)
        } else if offset < self.grown_to {
            (Extent::Zero, self.grown_to)
        } else {
            return Err(ends_early(offset, len));
        };
        Ok(Mapping {
            extent,
            len: len.min(end - offset),
        })
    }

    /// Fills all of `buf` from `offset`.
    ///
    /// # Errors
    /// The range, or by now the file, ends before; or the host fails.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        let at = self.host_offset(offset, len)?;
        // A file that shrank would read as zeroes, which mean something in most tables.
        if at.saturating_add(len) > self.file.len()? {
            return Err(ends_early(offset, len));
        }
        self.file.read_buf(buf, at)
    }

    /// Reads the structure at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_struct<T: FromBytes + IntoBytes>(&self, offset: u64) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.read(value.as_mut_bytes(), offset)?;
        Ok(value)
    }

    /// Where in the file `len` bytes from `offset` are, if they are within the range.
    fn host_offset(&self, offset: u64, len: u64) -> io::Result<u64> {
        offset
            .checked_add(len)
            .filter(|&end| end <= self.len)
            .and_then(|_| self.start.checked_add(offset))
            .ok_or_else(|| ends_early(offset, len))
    }
}

fn ends_early(offset: u64, len: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!(
            "it is cut off, or damaged: it ends before the {len} bytes that it should have at \
             byte {offset}"
        ),
    )
}
