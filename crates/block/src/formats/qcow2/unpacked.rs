//! Compressed clusters, with those used last kept in plain form.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::codec::Unpacker;
use super::create::Compression;
use super::entry::Packed;
use crate::host::{HostFile, Window};

/// Independent parts, each with its lock, so that threads rarely wait for another.
const PARTS: usize = 4;
/// Most clusters kept in each part, and most bytes of them if it is more than one.
const MAX_KEPT: usize = 4;
const MAX_KEPT_BYTES: usize = 512 << 10;

#[derive(Debug, Default)]
struct Kept {
    /// Where it is in the file; none if there is nothing here.
    place: Option<Packed>,
    bytes: Vec<u8>,
    used: u64,
}

#[derive(Debug, Default)]
struct Part {
    kept: Vec<Kept>,
    /// Counts uses, to find the cluster not used for longest.
    clock: u64,
    packed: Vec<u8>,
    unpacker: Unpacker,
}

/// Reads compressed clusters.
#[derive(Debug)]
pub struct Unpacked {
    parts: [Mutex<Part>; PARTS],
    cluster_len: usize,
    how: Compression,
}

impl Unpacked {
    /// A reader of clusters of `cluster_len` bytes.
    pub fn new(cluster_len: usize, how: Compression) -> Self {
        Self {
            parts: std::array::from_fn(|_| Mutex::default()),
            cluster_len,
            how,
        }
    }

    /// Fills `window` from `within` the cluster at `place` of `file`.
    ///
    /// # Errors
    /// It can't be read or unpacked.
    pub fn read(
        &self,
        window: Window<'_>,
        file: &HostFile,
        place: Packed,
        within: usize,
    ) -> io::Result<()> {
        let mut part = self.part(place.offset);
        let bytes = part.cluster(file, place, self.how, self.cluster_len)?;
        window.copy_from(bytes.get(within..).unwrap_or_default());
        Ok(())
    }

    /// Forgets what begins within `len` bytes of the file from `start`, as it is not there any
    /// more.
    pub fn forget(&self, start: u64, len: u64) {
        for part in &self.parts {
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            for kept in &mut part.kept {
                let end = start.saturating_add(len);
                let gone = |place: &Packed| {
                    place.offset < end && place.offset.saturating_add(place.len) > start
                };
                if kept.place.as_ref().is_some_and(gone) {
                    kept.place = None;
                }
            }
        }
    }

    fn part(&self, offset: u64) -> MutexGuard<'_, Part> {
        // Neighbours in the file are in different parts.
        let number = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = usize::try_from(number).unwrap_or(0) % PARTS;
        self.parts[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    fn cluster(
        &mut self,
        file: &HostFile,
        place: Packed,
        how: Compression,
        len: usize,
    ) -> io::Result<&[u8]> {
        self.clock = self.clock.wrapping_add(1);
        let known = self.kept.iter().position(|kept| kept.place == Some(place));
        let index = match known {
            Some(index) => index,
            None => self.load(file, place, how, len)?,
        };
        let kept = &mut self.kept[index];
        kept.used = self.clock;
        Ok(&kept.bytes)
    }

    fn load(
        &mut self,
        file: &HostFile,
        place: Packed,
        how: Compression,
        len: usize,
    ) -> io::Result<usize> {
        let room = (MAX_KEPT_BYTES / len).clamp(1, MAX_KEPT);
        if self.kept.len() < room {
            self.kept.push(Kept::default());
        }
        let oldest = self.kept.iter().enumerate();
        let oldest = oldest.min_by_key(|(_, kept)| (kept.place.is_some(), kept.used));
        let index = oldest.map_or(0, |(index, _)| index);
        // An entry can't tell of more than two clusters' worth of compressed data.
        self.packed
            .resize(usize::try_from(place.len).unwrap_or(0), 0);
        file.read_buf(&mut self.packed, place.offset)?;
        let kept = &mut self.kept[index];
        kept.place = None;
        kept.bytes.resize(len, 0);
        self.unpacker
            .unpack(how, &self.packed, &mut kept.bytes)
            .map_err(|error| {
                let message = format!(
                    "The compressed cluster at offset {} is damaged: {error}",
                    place.offset
                );
                io::Error::new(io::ErrorKind::InvalidData, message)
            })?;
        kept.place = Some(place);
        Ok(index)
    }
}
