//! What every image format is to the rest of the crate: a map from the disk to bytes of the host.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use crate::host::{HostFile, Window};
use crate::in_flight::Pin;

/// Where the bytes of a range of a disk are.
#[derive(Clone, Copy, Debug)]
pub enum Extent<'a> {
    /// In a file of the host, from `offset` bytes into it, just as the guest sees them.
    Data {
        /// The file.
        file: &'a Arc<HostFile>,
        /// Where in it the range begins, in bytes.
        offset: u64,
    },
    /// Nowhere: the range reads as zeroes, whatever the layers below have.
    Zero,
    /// Not in this layer; the layer below decides. Zeroes if there is none.
    Below,
    /// In a form that only the format can read, such as compressed:
    /// [`Layer::read_packed`].
    Packed,
}

/// An [`Extent`] and how far it reaches.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// Where the range is.
    pub extent: Extent<'a>,
    /// Bytes of the disk that this is true for; at least 1, at most as many as were asked for.
    pub len: u64,
}

/// One image of a chain, opened.
///
/// Its file is data written by somebody else and may change while it is open: no content of it
/// may make a method panic, loop without end, or map to anything outside its files.
pub trait Layer: Send + Sync + Debug {
    /// Size of the disk in bytes. Ranges given to the other methods lie within.
    fn size(&self) -> u64;

    /// Bytes of the sectors that the disk was made with: 512 or 4096. Partition tables count in
    /// them. Ranges need not be multiples of it.
    fn logical_block(&self) -> u32 {
        512
    }

    /// Tells where the bytes from `offset` are, for up to `len` bytes (at least 1).
    ///
    /// What it says holds as long as the caller has a [`pin`](Self::pin) taken before.
    ///
    /// # Errors
    /// The image's tables can't be read or make no sense.
    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>>;

    /// Fills `window` from `offset`, which [`map`](Self::map) said to be [`Extent::Packed`].
    ///
    /// # Errors
    /// It can't be read or unpacked. The default is for formats that pack nothing.
    fn read_packed(&self, window: Window<'_>, offset: u64) -> io::Result<()> {
        let _ = (window, offset);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Keeps mappings from changing what they point at. Layers that are never written need none.
    fn pin(&self) -> Pin {
        Pin::default()
    }
}
