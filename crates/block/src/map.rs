//! How the ranges of a disk are stored, for tools that show, copy or compare images.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::layer::Extent;
use crate::stack::Stack;

/// How a range of a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// As it is.
    Data,
    /// Compressed.
    Compressed,
    /// Not at all: an image says that it reads as zeroes, or its file has a hole there.
    Zero,
    /// Not at all: no image of the chain has it. It reads as zeroes.
    Unallocated,
}

/// How a range of a disk is stored, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// How.
    pub kind: MapKind,
    /// Bytes of the disk that this is true for; at least 1.
    pub len: u64,
    /// Which image of the chain decides: 0 is the topmost. For what no image has, the number of
    /// images.
    pub depth: usize,
    /// Where in a file of that image [`MapKind::Data`] begins, in bytes.
    pub host_offset: Option<u64>,
}

impl Stack {
    /// Tells how the bytes from `offset` are stored, for up to `len` of them (at least 1).
    ///
    /// Unlike [`Stack::map`] it takes holes in files for zeroes, and looking for them takes calls
    /// of the kernel.
    ///
    /// # Errors
    /// As [`Stack::map`].
    pub fn entry(&self, offset: u64, mut len: u64) -> io::Result<MapEntry> {
        let mut depth = 0;
        for layer in self.layers() {
            let within = layer.size().saturating_sub(offset);
            if within == 0 {
                break;
            }
            let mapping = layer.map(offset, len.min(within))?;
            len = mapping.len.min(len).max(1);
            let entry = |kind| MapEntry {
                kind,
                len,
                depth,
                host_offset: None,
            };
            return Ok(match mapping.extent {
                Extent::Below => {
                    depth += 1;
                    continue;
                }
                Extent::Zero => entry(MapKind::Zero),
                Extent::Packed => entry(MapKind::Compressed),
                Extent::Data { file, offset } => {
                    let (hole, len) = hole_or_data(file.file(), offset, len);
                    let (kind, host_offset) = if hole {
                        (MapKind::Zero, None)
                    } else {
                        (MapKind::Data, Some(offset))
                    };
                    MapEntry {
                        kind,
                        len,
                        depth,
                        host_offset,
                    }
                }
            });
        }
        Ok(MapEntry {
            kind: MapKind::Unallocated,
            len,
            depth: self.layers().len(),
            host_offset: None,
        })
    }
}

/// Whether there is a hole in the file at `offset`, and how many of `len` bytes (at least 1) that
/// is true for.
///
/// A file that cannot tell, such as a block device, is full.
pub fn hole_or_data(file: &File, offset: u64, len: u64) -> (bool, u64) {
    let seek = |whence| {
        let offset = libc::off_t::try_from(offset).ok()?;
        // SAFETY: seeking touches no memory. The file's position, which it moves, is not used.
        let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
        match u64::try_from(found) {
            Ok(found) => Some(found),
            // There is nothing but a hole from here on.
            Err(_) if errno() == libc::ENXIO => Some(u64::MAX),
            Err(_) => None,
        }
    };
    let until = |end: u64| end.saturating_sub(offset).min(len);
    match seek(libc::SEEK_DATA) {
        Some(data) if data > offset => (true, until(data)),
        Some(_) => {
            let hole = seek(libc::SEEK_HOLE).filter(|hole| *hole > offset);
            (false, hole.map_or(len, until))
        }
        None => (false, len),
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_are_told_from_data() {
        const MIB: u64 = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        file.write_all_at(&[1; 1 << 20], MIB).unwrap();
        assert_eq!(hole_or_data(&file, 0, 4 * MIB), (true, MIB));
        assert_eq!(hole_or_data(&file, 10, 20), (true, 20));
        assert_eq!(hole_or_data(&file, MIB, 4 * MIB), (false, MIB));
        assert_eq!(hole_or_data(&file, MIB + 1, 5), (false, 5));
        assert_eq!(hole_or_data(&file, 2 * MIB, 9 * MIB), (true, 9 * MIB));
        assert_eq!(hole_or_data(&file, 8 * MIB, 1), (true, 1));
    }

    #[test]
    fn a_file_that_cannot_tell_is_full() {
        let (pipe, _end) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(pipe));
        assert_eq!(hole_or_data(&file, 3, 7), (false, 7));
    }
}
