//! Compressed grains of streamOptimized extents, with those used last kept in plain form.

use std::io;
use std::sync::{Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use zerocopy::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::SECTOR_SIZE;
use crate::formats::range::FileRange;
use crate::formats::refusal::invalid;
use crate::host::Window;

/// Independent parts of the cache, each with its lock, so that threads rarely wait for another.
const SHARDS: usize = 4;
/// Grains kept in each part.
const SLOTS: usize = 4;

/// What stands before a compressed grain.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Marker {
    /// The sector of the extent where the grain begins.
    sector: le::U64,
    /// Bytes of compressed data that follow.
    size: le::U32,
}

/// A grain in plain form.
#[derive(Debug, Default)]
struct Grain {
    number: u64,
    /// Empty if the slot is.
    bytes: Vec<u8>,
    used: u64,
}

#[derive(Debug)]
struct Shard {
    grains: [Grain; SLOTS],
    /// Counts uses, to find the grain not used for longest.
    clock: u64,
    packed: Vec<u8>,
    inflate: Decompress,
}

/// Reads compressed grains. Keeps up to 16 of them, and 4 in compressed form.
#[derive(Debug)]
pub struct GrainReader {
    shards: [Mutex<Shard>; SHARDS],
    grain_len: usize,
}

impl GrainReader {
    /// A reader of grains of `grain_len` bytes.
    pub fn new(grain_len: usize) -> Self {
        let shard = || {
            Mutex::new(Shard {
                grains: Default::default(),
                clock: 0,
                packed: Vec::new(),
                inflate: Decompress::new(true),
            })
        };
        Self {
            shards: std::array::from_fn(|_| shard()),
            grain_len,
        }
    }

    /// Fills `window` from `within` the grain `number`, which is at byte `at` of `range`.
    pub fn read(
        &self,
        window: Window<'_>,
        range: &FileRange,
        number: u64,
        at: u64,
        within: usize,
    ) -> io::Result<()> {
        let index = usize::try_from(number % SHARDS as u64).unwrap_or_default();
        let mut shard = self.shards[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let bytes = shard.grain(range, number, at, self.grain_len)?;
        let wanted = usize::try_from(window.len()).unwrap_or(usize::MAX);
        let part = within
            .checked_add(wanted)
            .and_then(|end| bytes.get(within..end))
            .ok_or_else(|| invalid(format!("the compressed grain at byte {at} is too short")))?;
        window.copy_from(part);
        Ok(())
    }
}

impl Shard {
    fn grain(
        &mut self,
        range: &FileRange,
        number: u64,
        at: u64,
        grain_len: usize,
    ) -> io::Result<&[u8]> {
        self.clock = self.clock.wrapping_add(1);
        let kept = self
            .grains
            .iter()
            .position(|grain| grain.number == number && !grain.bytes.is_empty());
        let index = match kept {
            Some(index) => index,
            None => self.load(range, number, at, grain_len)?,
        };
        let grain = &mut self.grains[index];
        grain.used = self.clock;
        Ok(&grain.bytes)
    }

    /// Unpacks a grain into the slot that was not used for longest.
    fn load(
        &mut self,
        range: &FileRange,
        number: u64,
        at: u64,
        grain_len: usize,
    ) -> io::Result<usize> {
        let marker: Marker = range.read_struct(at)?;
        let sectors = grain_len as u64 / SECTOR_SIZE;
        if Some(marker.sector.get()) != number.checked_mul(sectors) {
            return Err(invalid(format!(
                "a table leads to byte {at} for grain {number}, where another is"
            )));
        }
        let size = usize::try_from(marker.size.get()).unwrap_or(usize::MAX);
        // What can't be made smaller grows by a few bytes in thousand.
        if size > grain_len + grain_len / 8 + 64 {
            return Err(invalid(format!(
                "the compressed grain at byte {at} is said to have {size} bytes, more than it \
                 can have"
            )));
        }
        self.packed.resize(size, 0);
        range.read(
            &mut self.packed,
            at.saturating_add(size_of::<Marker>() as u64),
        )?;
        let index = self.oldest();
        let grain = &mut self.grains[index];
        // Empty until it is whole, so that a failure leaves nothing wrong behind.
        let mut bytes = std::mem::take(&mut grain.bytes);
        bytes.resize(grain_len, 0);
        self.inflate.reset(true);
        let status = self
            .inflate
            .decompress(&self.packed, &mut bytes, FlushDecompress::Finish);
        if !matches!(status, Ok(Status::StreamEnd)) {
            return Err(invalid(format!(
                "the compressed grain at byte {at} is damaged"
            )));
        }
        bytes.truncate(usize::try_from(self.inflate.total_out()).unwrap_or(grain_len));
        (grain.number, grain.bytes) = (number, bytes);
        Ok(index)
    }

    fn oldest(&self) -> usize {
        let ages = self.grains.iter().map(|grain| grain.used).enumerate();
        ages.min_by_key(|&(_, used)| used)
            .map_or(0, |(index, _)| index)
    }
}
