//! What formats have in common whose disk is an array of blocks, each in its own place.

use std::io;

use super::range::FileRange;
use super::refusal::invalid;
use crate::layer::{Extent, Mapping};

/// Most blocks looked up for one range, so that a long one does not take long to find.
const MERGE_MAX: u32 = 1024;

/// Where one block of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it reads as zeroes.
    Zero,
    /// From this byte of the image on.
    At(u64),
    /// From this byte of the image on, compressed.
    Packed(u64),
}

/// Tells where up to `len` bytes of a disk from `offset` are, given where each block is.
///
/// Blocks that follow each other in the image are one range.
pub fn map<'a>(
    range: &'a FileRange,
    block_len: u64,
    offset: u64,
    len: u64,
    place: impl Fn(u64) -> io::Result<Place>,
) -> io::Result<Mapping<'a>> {
    let (mut block, within) = (offset / block_len, offset % block_len);
    let first = place(block)?;
    let mut reach = block_len - within;
    if let Place::Packed(_) = first {
        return Ok(Mapping {
            extent: Extent::Packed,
            len: reach.min(len),
        });
    }
    for _ in 1..MERGE_MAX {
        if reach >= len {
            break;
        }
        block += 1;
        let next = match first {
            Place::At(start) => start
                .checked_add(within)
                .and_then(|start| start.checked_add(reach))
                .map(Place::At),
            same => Some(same),
        };
        // What is wrong with a later block is told when that block is asked for.
        if place(block).ok() != next {
            break;
        }
        reach = reach.saturating_add(block_len);
    }
    let len = reach.min(len);
    match first {
        Place::At(start) => match start.checked_add(within) {
            Some(at) => range.map(at, len),
            None => Err(invalid(format!("a block can't be at byte {start}"))),
        },
        _ => Ok(Mapping {
            extent: Extent::Zero,
            len,
        }),
    }
}
