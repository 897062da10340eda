//! Discarding and zeroing, as far as possible by changes of the tables alone.

use std::io;
use std::ops::Range;

use super::disk::Qcow2Disk;
use super::entry::{Entry, Place, touched};
use super::image::{Image, Meta};
use super::payload::Payload;
use crate::stack::Source;

/// What becomes of a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nobody needs it any more.
    Discard,
    /// It reads as zeroes, and its space goes back to the host if `unmap`.
    Zero { unmap: bool },
}

/// What has to be done so that a cluster, or some subclusters, get their fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Nothing.
    None,
    /// The entry becomes this.
    Entry(Entry),
    /// Zeroes have to be written.
    Data,
}

impl Qcow2Disk {
    /// Tells that a range, which lies within the disk, holds nothing of value.
    ///
    /// Only whole clusters or subclusters are dealt with.
    pub(super) fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.image.raw_external {
            return self.image.data.write_zeroes(offset, len, true);
        }
        let unit = self.image.layout.subcluster_size();
        let range = offset.next_multiple_of(unit)..self.up_to(offset + len, unit);
        self.change(range, Fate::Discard)
    }

    /// Makes a range, which lies within the disk, read as zeroes.
    pub(super) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.image.raw_external {
            return self.image.data.write_zeroes(offset, len, unmap);
        }
        let unit = self.image.layout.subcluster_size();
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(unit), self.up_to(end, unit));
        if first >= last {
            return self.zero_data(offset..end);
        }
        self.zero_data(offset..first)?;
        self.change(first..last, Fate::Zero { unmap })?;
        self.zero_data(last.min(end)..end)
    }

    /// The end of the last unit that ends at `end` or before. The end of the disk ends one.
    fn up_to(&self, end: u64, unit: u64) -> u64 {
        if end >= self.image.disk_size() {
            end.next_multiple_of(unit)
        } else {
            end - end % unit
        }
    }

    /// Writes zeroes where there are none yet.
    fn zero_data(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (source, len) = {
                let _pin = self.stack.pin();
                self.stack.map(at, range.end - at)?
            };
            if !matches!(source, Source::Zero) {
                self.write(Payload::zeroes(len), at)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Gives a range of whole clusters, or subclusters, its fate.
    fn change(&self, range: Range<u64>, fate: Fate) -> io::Result<()> {
        let _pin = self.image.in_flight.join();
        let mut at = range.start;
        while at < range.end {
            self.image.make_room()?;
            let (until, data) = self.change_some(at..range.end, fate)?;
            at = until;
            if data {
                let cluster = self.image.layout.cluster_size();
                let end = (at - at % cluster + cluster).min(range.end);
                self.zero_data(at..end.min(self.image.disk_size()))?;
                at = end;
            }
        }
        Ok(())
    }

    /// Gives the first part of a range its fate, as far as one slice of a table tells of it.
    /// Returns how far that is, and whether zeroes have to be written from there on.
    fn change_some(&self, range: Range<u64>, fate: Fate) -> io::Result<(u64, bool)> {
        let image = &*self.image;
        let layout = image.layout;
        let cluster = layout.cluster_of(range.start);
        let mut meta = image.lock();
        let (key, first) = meta.tables.position(cluster);
        loop {
            Image::check_sound(&meta)?;
            let slot;
            (meta, slot) = image.slice(meta, key)?;
            let Some(slot) = slot else {
                let change =
                    self.fate_of(Entry::ABSENT, layout.all_subclusters(), range.start, fate);
                match change {
                    Change::None => {
                        let reach = layout.table_reach();
                        let end = range.start - range.start % reach + reach;
                        return Ok((end.min(range.end), false));
                    }
                    Change::Data => return Ok((range.start, true)),
                    Change::Entry(_) => {
                        (meta, _) = image.own_slice(meta, key)?;
                        continue;
                    }
                }
            };
            let own = matches!(
                meta.tables.table(meta.tables.l1_index(key)),
                Some((_, true))
            );
            let done = self.change_in(&mut meta, slot, first, range.clone(), fate, own)?;
            match done {
                Done::Until(at) if at > range.start => return Ok((at, false)),
                Done::Data(at) => return Ok((at, true)),
                Done::NotOwn => (meta, _) = image.own_slice(meta, key)?,
                Done::Until(_) => meta = image.wait(meta),
            }
        }
    }

    /// [`Self::change_some`] in the slice at `slot`, whose entry `at` is that of the range's start.
    fn change_in(
        &self,
        meta: &mut Meta,
        slot: usize,
        mut at: usize,
        range: Range<u64>,
        fate: Fate,
        own: bool,
    ) -> io::Result<Done> {
        let image = &*self.image;
        let layout = image.layout;
        let end = usize::try_from(layout.slice_entries()).unwrap_or(0);
        let mut guest = range.start;
        while guest < range.end && at < end {
            let cluster = layout.cluster_of(guest);
            if meta.is_busy(&(cluster..cluster + 1)) {
                break;
            }
            let within = layout.within_cluster(guest);
            let part = (layout.cluster_size() - within).min(range.end - guest);
            let mask = touched(layout, within, within + part);
            let old = image.entry(meta, slot, at, cluster)?;
            match self.fate_of(old, mask, guest, fate) {
                Change::None => {}
                Change::Data => return Ok(Done::Data(guest)),
                Change::Entry(_) if !own => return Ok(Done::NotOwn),
                Change::Entry(new) => {
                    if new.place == Place::None {
                        image.leave(meta, old.place, true)?;
                    }
                    meta.tables.set_entry(slot, at, new);
                }
            }
            guest += part;
            at += 1;
        }
        Ok(Done::Until(guest))
    }

    /// What has to be done for the subclusters in `mask` of a cluster with this entry. `guest` is
    /// where they begin.
    fn fate_of(&self, old: Entry, mask: u32, guest: u64, fate: Fate) -> Change {
        let layout = self.image.layout;
        let all = layout.all_subclusters();
        let below = self.below.size() > guest;
        let flags = layout.version > 2;
        if let Place::Packed(_) = old.place {
            return match fate {
                _ if below && !flags => no_flag(fate),
                Fate::Discard if mask != all => Change::None,
                Fate::Zero { .. } if mask != all => Change::Data,
                _ => Change::Entry(Entry {
                    place: Place::None,
                    data: 0,
                    zero: if below { all } else { 0 },
                }),
            };
        }
        let unmap = match fate {
            Fate::Discard if old.is_absent(mask) => return Change::None,
            Fate::Discard => true,
            Fate::Zero { .. } if old.is_absent(mask) && !below => return Change::None,
            Fate::Zero { unmap } => unmap,
        };
        if !flags && (below || (!unmap && old.data != 0)) {
            return no_flag(fate);
        }
        // What is absent stays so when it is discarded.
        let zeroed = match fate {
            Fate::Discard => mask & (old.data | old.zero),
            Fate::Zero { .. } => mask,
        };
        let mut new = Entry {
            place: old.place,
            data: old.data & !mask,
            zero: if below || (!unmap && flags) {
                old.zero | zeroed
            } else {
                old.zero & !mask
            },
        };
        let shared = matches!(old.place, Place::At { own: false, .. });
        if new.data == 0 && (unmap || shared) {
            new.place = Place::None;
            if !below && !flags {
                new.zero = 0;
            }
        }
        if new == old {
            Change::None
        } else {
            Change::Entry(new)
        }
    }
}

/// How far [`Qcow2Disk::change_in`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// Up to here.
    Until(u64),
    /// Up to here, where zeroes have to be written.
    Data(u64),
    /// Up to where the table has to be changed, which has other users.
    NotOwn,
}

/// What has to be done where no entry can say that a cluster reads as zeroes.
fn no_flag(fate: Fate) -> Change {
    match fate {
        Fate::Discard => Change::None,
        Fate::Zero { .. } => Change::Data,
    }
}
