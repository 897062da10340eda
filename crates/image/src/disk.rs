//! A disk that is worked on, with its name for errors.

use std::sync::Arc;

use edgevmm_block::{BlockBackend, DiskOptions, MapEntry, MapKind, VolatileSlice};

use crate::ImageError;
use crate::walk::Piece;
use crate::zero::is_zero;

/// An opened disk.
#[derive(Debug)]
pub struct Disk {
    backend: Arc<dyn BlockBackend>,
    name: String,
}

impl Disk {
    /// Opens and locks a disk.
    pub fn open(options: DiskOptions) -> Result<Self, ImageError> {
        let name = options.path_hint.clone();
        let backend = edgevmm_block::open(options)?;
        Ok(Self { backend, name })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.backend.size()
    }

    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.backend
            .read_vectored(&[VolatileSlice::from(buffer)], offset)
            .map_err(ImageError::io("read", &self.name))
    }

    /// As [`Disk::read`]; what is past the end reads as zeroes.
    pub fn read_padded(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let within = self.size().saturating_sub(offset);
        let within = usize::try_from(within)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (inside, outside) = buffer.split_at_mut(within);
        outside.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.read(inside, offset)
    }

    /// Writes `data`, which a disk may change meanwhile to compress or encrypt it.
    pub fn write(&self, data: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.backend
            .write_vectored(&[VolatileSlice::from(data)], offset)
            .map_err(ImageError::io("write", &self.name))
    }

    /// Writes one cluster, compressed if that makes it shorter.
    pub fn write_compressed(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        self.backend
            .write_compressed(offset, data)
            .map_err(ImageError::io("write", &self.name))
    }

    /// Makes a range read as zeroes and gives its space back.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.backend
            .write_zeroes(offset, len, true)
            .map_err(ImageError::io("write", &self.name))
    }

    pub fn resize(&self, size: u64) -> Result<(), ImageError> {
        self.backend
            .resize(size)
            .map_err(ImageError::io("resize", &self.name))
    }

    /// Makes all that was written durable.
    pub fn flush(&self) -> Result<(), ImageError> {
        self.backend
            .flush()
            .map_err(ImageError::io("write", &self.name))
    }

    pub fn map(&self, offset: u64, len: u64) -> Result<MapEntry, ImageError> {
        self.backend
            .map(offset, len)
            .map_err(ImageError::io("read", &self.name))
    }

    /// Brings `data` to a range, zeroes as such.
    pub fn write_or_zero(&self, data: &mut [u8], offset: u64) -> Result<(), ImageError> {
        if is_zero(data) {
            self.write_zeroes(offset, data.len() as u64)
        } else {
            self.write(data, offset)
        }
    }

    /// Tells `entry` of all ranges of a piece, with where they begin.
    pub fn entries(
        &self,
        piece: Piece,
        mut entry: impl FnMut(u64, &MapEntry) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let end = piece.offset + piece.len;
        let mut at = piece.offset;
        while at < end {
            let next = self.map(at, end - at)?;
            entry(at, &next)?;
            at += next.len.clamp(1, end - at);
        }
        Ok(())
    }

    /// Whether there may be anything but zeroes at `offset`, and for how many of `len` bytes that
    /// is true. There is nothing past the end.
    pub fn look(&self, offset: u64, len: u64) -> Result<(bool, u64), ImageError> {
        let within = self.size().saturating_sub(offset);
        if within == 0 {
            return Ok((false, len));
        }
        let entry = self.map(offset, len.min(within))?;
        let zero = matches!(entry.kind, MapKind::Zero | MapKind::Unallocated);
        Ok((!zero, entry.len))
    }
}
