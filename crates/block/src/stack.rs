//! A chain of images read as one disk.

use std::io;
use std::sync::Arc;

use crate::host::{HostFile, Window};
use crate::in_flight::Pin;
use crate::layer::{Extent, Layer};
use crate::plan::{Piece, Plan};

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

    /// The largest of all layers' [`Layer::logical_block`]: an overlay takes over that of its base.
    pub fn logical_block(&self) -> u32 {
        let all = self.layers.iter().map(|layer| layer.logical_block());
        all.max().unwrap_or(512)
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

    /// Adds to `plan` how `len` bytes from `offset` are read. Returns whether that can be told: a
    /// pin is up to the caller, and so is what was added if it cannot.
    ///
    /// # Errors
    /// As [`Layer::map`].
    pub fn plan(&self, mut offset: u64, mut len: u64, plan: &mut Plan) -> io::Result<bool> {
        while len > 0 {
            let (source, part) = self.map(offset, len)?;
            let (file, at) = match source {
                Source::Data { file, offset } => (Some(Arc::clone(file)), offset),
                Source::Zero => (None, 0),
                Source::Packed(_) => return Ok(false),
            };
            let piece = Piece {
                file,
                offset: at,
                len: part,
            };
            if !plan.push(piece) {
                return Ok(false);
            }
            offset += part;
            len -= part;
        }
        Ok(true)
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
