//! Reading: where each byte of the disk is, as the tables have it.

use std::io;

use super::damage::damage;
use super::entry::{Packed, Place};
use super::image::{Image, Meta};
use crate::host::Window;
use crate::in_flight::Pin;
use crate::layer::{Extent, Layer, Mapping};

/// Where a range of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In the data file, from this offset on.
    Data(u64),
    /// Nowhere: it reads as zeroes.
    Zero,
    /// Not in this image.
    Below,
    /// In a compressed cluster.
    Packed(Packed),
}

impl Image {
    /// Tells where the bytes from `offset` are, for up to `len` (at least 1).
    pub(super) fn look_up(&self, offset: u64, len: u64) -> io::Result<(Found, u64)> {
        let cluster = self.layout.cluster_of(offset);
        let meta = self.lock();
        let (key, at) = meta.tables.position(cluster);
        let (meta, slot) = self.slice(meta, key)?;
        match slot {
            Some(slot) => self.look_up_in(&meta, slot, at, offset, len),
            None => Ok((Found::Below, self.without_table(&meta, offset, len))),
        }
    }

    /// How many of `len` bytes from `offset` are described by no table, given that the first is.
    fn without_table(&self, meta: &Meta, offset: u64, len: u64) -> u64 {
        let reach = self.layout.table_reach();
        let mut end = offset - offset % reach;
        let until = offset.saturating_add(len);
        while end < until {
            let index = usize::try_from(end / reach).unwrap_or(usize::MAX);
            if meta.tables.table(index).is_some() {
                break;
            }
            end = end.saturating_add(reach);
        }
        end.min(until) - offset
    }

    /// [`Self::look_up`] in the slice at `slot`, whose entry `at` is that of `offset`; goes no
    /// further than the slice does.
    pub(super) fn look_up_in(
        &self,
        meta: &Meta,
        slot: usize,
        mut at: usize,
        offset: u64,
        len: u64,
    ) -> io::Result<(Found, u64)> {
        let layout = self.layout;
        let end = usize::try_from(layout.slice_entries()).unwrap_or(0);
        let mut run: Option<Found> = None;
        let mut total = 0;
        while at < end && total < len {
            let guest = offset + total;
            let next = match self.look_up_cluster(meta, slot, at, guest) {
                Ok(next) => next,
                // What comes before can be told all the same.
                Err(_) if total > 0 => break,
                Err(error) => return Err(error),
            };
            let (found, reach) = next;
            let goes_on = match (run, found) {
                (None, _) => true,
                (Some(Found::Data(start)), Found::Data(here)) => start + total == here,
                (Some(Found::Packed(_)), _) => false,
                (Some(run), _) => run == found,
            };
            if !goes_on {
                break;
            }
            run.get_or_insert(found);
            total += reach;
            if layout.within_cluster(guest + reach) == 0 {
                at += 1;
            }
        }
        // The loop has run at least once, as `at` is within the slice.
        let run = run.ok_or(io::ErrorKind::InvalidInput)?;
        Ok((run, total.min(len)))
    }

    /// Where the byte at `guest` is, and how far in its cluster that is true, at the least.
    fn look_up_cluster(
        &self,
        meta: &Meta,
        slot: usize,
        at: usize,
        guest: u64,
    ) -> io::Result<(Found, u64)> {
        let layout = self.layout;
        let entry = self.entry(meta, slot, at, layout.cluster_of(guest))?;
        let within = layout.within_cluster(guest);
        let rest = layout.cluster_size() - within;
        let size = layout.subcluster_size();
        let bit = 1_u32
            .checked_shl(u32::try_from(within / size).unwrap_or(0))
            .unwrap_or(0);
        let alike = |mask: u32| {
            let count = (!mask >> bit.trailing_zeros())
                .trailing_zeros()
                .min(layout.subclusters());
            (u64::from(count) * size - within % size).min(rest)
        };
        match entry.place {
            Place::Packed(packed) => {
                self.file.check("compressed data", packed.offset)?;
                Ok((Found::Packed(packed), rest))
            }
            Place::At { offset, .. } if entry.data & bit != 0 => {
                self.check_data(guest - within, offset)?;
                Ok((Found::Data(offset + within), alike(entry.data)))
            }
            _ if entry.zero & bit != 0 => Ok((Found::Zero, alike(entry.zero))),
            _ => Ok((Found::Below, alike(!(entry.data | entry.zero)))),
        }
    }

    /// Fills `window` from `offset` with what this image has there; what it has not reads as
    /// zeroes.
    fn read_own(&self, mut window: Window<'_>, mut offset: u64) -> io::Result<()> {
        while !window.is_empty() {
            let (found, len) = self.look_up(offset, window.len())?;
            let part = window.split_off(len);
            match found {
                // SAFETY: a window's memory is writable for as long as it is borrowed.
                Found::Data(at) => unsafe { self.data.read_at(part.iovecs(), at)? },
                Found::Zero | Found::Below => part.fill_zero(),
                Found::Packed(packed) => {
                    let within = usize::try_from(self.layout.within_cluster(offset))
                        .map_err(|_| damage("a cluster is too long"))?;
                    self.unpacked.read(part, self.file.host(), packed, within)?;
                }
            }
            offset += len;
        }
        Ok(())
    }
}

impl Layer for Image {
    fn size(&self) -> u64 {
        self.disk_size()
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping<'_>> {
        let (found, len) = self.look_up(offset, len)?;
        let extent = match found {
            Found::Data(offset) => Extent::Data {
                file: &self.data,
                offset,
            },
            Found::Zero => Extent::Zero,
            Found::Below => Extent::Below,
            Found::Packed(_) => Extent::Packed,
        };
        Ok(Mapping { extent, len })
    }

    /// The cluster may have got another place since it was mapped; that makes no difference.
    fn read_packed(&self, window: Window<'_>, offset: u64) -> io::Result<()> {
        self.read_own(window, offset)
    }

    fn pin(&self) -> Pin {
        if self.flusher.is_some() {
            self.in_flight.join()
        } else {
            Pin::default()
        }
    }
}
