//! The bytes of an image: numbers in both byte orders, text fields and directory records.

use crate::datetime::DateTime;

pub(super) const SECTOR: usize = 2048;

/// Where a file or directory lies: its first sector and its length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Sectors that `bytes` take.
pub(super) fn sectors(bytes: u64) -> u64 {
    bytes.div_ceil(SECTOR as u64)
}

/// Bytes of a directory record (ECMA-119 9.1): 33, the identifier, and a byte to make it even.
pub(super) fn record_bytes(identifier: usize) -> usize {
    (33 + identifier).next_multiple_of(2)
}

/// An image written from its start to its end.
#[derive(Debug)]
pub(super) struct Image(Vec<u8>);

impl Image {
    /// Starts an empty image with room for `count` sectors.
    pub(super) fn with_sectors(count: u64) -> Self {
        Self(Vec::with_capacity(
            usize::try_from(count).unwrap_or(0).saturating_mul(SECTOR),
        ))
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn zeroes(&mut self, count: u64) {
        self.0.extend((0..count).map(|_| 0));
    }

    pub(super) fn fill_sector(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(SECTOR), 0);
    }

    /// Bytes left in the sector being written.
    pub(super) fn room(&self) -> usize {
        SECTOR - self.0.len() % SECTOR
    }

    pub(super) fn little32(&mut self, value: u64) {
        self.bytes(&narrow(value).to_le_bytes());
    }

    pub(super) fn big32(&mut self, value: u64) {
        self.bytes(&narrow(value).to_be_bytes());
    }

    pub(super) fn both32(&mut self, value: u64) {
        self.little32(value);
        self.big32(value);
    }

    pub(super) fn both16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
        self.bytes(&value.to_be_bytes());
    }

    /// Writes `text` into a field of `width` bytes, the rest spaces; in UCS-2 when `wide`.
    pub(super) fn text(&mut self, wide: bool, text: &str, width: usize) {
        let end = self.0.len() + width;
        if wide {
            let units = text
                .encode_utf16()
                .chain(std::iter::repeat(u16::from(b' ')));
            for unit in units.take(width / 2) {
                self.bytes(&unit.to_be_bytes());
            }
            self.0.resize(end, 0);
        } else {
            self.0.extend(text.bytes().take(width));
            self.0.resize(end, b' ');
        }
    }

    /// Writes a directory record (ECMA-119 9.1).
    pub(super) fn record(&mut self, id: &[u8], extent: Extent, directory: bool, date: DateTime) {
        let length = record_bytes(id.len());
        let end = self.0.len() + length;
        self.bytes(&[byte(length), 0]);
        self.both32(extent.start);
        self.both32(extent.bytes);
        self.bytes(&date.short());
        self.bytes(&[if directory { 2 } else { 0 }, 0, 0]);
        self.both16(1);
        self.bytes(&[byte(id.len())]);
        self.bytes(id);
        self.0.resize(end, 0);
    }
}

/// Sector numbers and sizes are in bounds by the limit on the image's size.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Identifier lengths are in bounds by the limit on names.
pub(super) fn byte(value: usize) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}
