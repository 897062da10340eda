//! A chain of images read as one disk.

use std::io;
use std::sync::Arc;

use crate::host::{HostFile, Window};
use crate::in_flight::Pin;
use crate::layer::{Extent, Layer};
use crate::plan::Piece;

/// Where the bytes of a range of a chain are.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// In a file of the host, from `offset` bytes into it.
    Data {
        /// The file.
        file: &'a Arc<HostFile>,
        /// Where in it the range begins, in bytes.
        offset: u64,
    },
    /// Nowhere: the range reads as zeroes.
    Zero,
    /// In a form that only this layer can read.
    Packed(&'a dyn Layer),
}

impl Source<'_> {
    /// `len` bytes of it as a part of a plan, unless only a layer can read it.
    pub fn piece(self, len: u64) -> Option<Piece> {
        let (file, offset) = match self {
            Self::Data { file, offset } => (Some(Arc::clone(file)), offset),
            Self::Zero => (None, 0),
            Self::Packed(_) => return None,
        };
        Some(Piece { file, offset, len })
    }
}

/// Images on top of each other.
#[derive(Clone, Debug, Default)]
pub struct Stack {
    layers: Vec<Arc<dyn Layer>>,
}

impl Stack {
    /// A chain of images, the topmost first.
    pub fn new(layers: Vec<Arc<dyn Layer>>) -> Self {
        Self { layers }
    }

    /// Its layers, the topmost first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// Size of the topmost image in bytes; 0 if there is none.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size())
    }

    /// As [`Layer::pin`]; only the topmost image ever changes.
    pub fn pin(&self) -> Pin {
        self.layers
            .first()
            .map_or_else(Pin::default, |layer| layer.pin())
    }

    /// Tells where the bytes from `offset` are and for how many of `len` bytes (at least 1) that
    /// is true. Whatever lies past the end of a layer reads as zeroes there.
    ///
    /// # Errors
    /// As [`Layer::map`].
    pub fn map(&self, offset: u64, mut len: u64) -> io::Result<(Source<'_>, u64)> {
        for layer in &self.layers {
            let within = layer.size().saturating_sub(offset);
            if within == 0 {
                break;
            }
            let mapping = layer.map(offset, len.min(within))?;
            len = mapping.len.min(len).max(1);
            match mapping.extent {
                Extent::Data { file, offset } => return Ok((Source::Data { file, offset }, len)),
                Extent::Zero => break,
                Extent::Packed => return Ok((Source::Packed(&**layer), len)),
                Extent::Below => {}
            }
        }
        Ok((Source::Zero, len))
    }

    /// Fills `window` from `offset`.
    ///
    /// # Errors
    /// The tables or the data can't be read.
    pub fn read(&self, mut window: Window<'_>, mut offset: u64) -> io::Result<()> {
        let _pin = self.pin();
        while !window.is_empty() {
            let (source, len) = self.map(offset, window.len())?;
            let part = window.split_off(len);
            match source {
                // SAFETY: a window's memory is writable for as long as it is borrowed.
                Source::Data { file, offset } => unsafe { file.read_at(part.iovecs(), offset)? },
                Source::Zero => part.fill_zero(),
                Source::Packed(layer) => layer.read_packed(part, offset)?,
            }
            offset += len;
        }
        Ok(())
    }
}
