//! Writing: in place where the image has a place of its own for the data, else to a new one.
//!
//! A write to new clusters takes them, leaves the lock to write the data, with what else of the
//! cluster has to be copied, and then has the tables point there. Meanwhile the clusters of the
//! disk count as busy, and whoever wants to change where they are waits.

use std::io;
use std::ops::Range;

use super::disk::Qcow2Disk;
use super::entry::{Entry, Place, touched};
use super::freed::{Kind, Run};
use super::image::{Image, Meta};
use super::payload::Payload;
use crate::host::Window;
use crate::stack::Source;

/// What is to be done for the first part of a write.
#[derive(Debug)]
enum Step {
    /// Nothing but to write it, at this offset of the data file.
    InPlace { at: u64, len: u64 },
    /// What is described.
    Move(Move),
}

/// A write to clusters of the disk that get their data places, or part of their data.
#[derive(Debug)]
struct Move {
    /// The clusters of the disk, which are busy until [`Qcow2Disk::settle`].
    clusters: Range<u64>,
    /// The slot with their entries, which is held, and the first entry.
    slot: usize,
    first: usize,
    /// Where in the data file their place begins, in bytes.
    place: u64,
    /// The place was free before, and is to be so again if the write fails.
    taken: bool,
    /// The place reads as zeroes where it is not written.
    fresh: bool,
    /// The part of the disk that is written, in bytes.
    written: Range<u64>,
    /// The part that has its data in the place afterwards; more than is written.
    filled: Range<u64>,
}

impl Qcow2Disk {
    /// Writes `payload` at `offset`. The range lies within the disk.
    pub(super) fn write(&self, mut payload: Payload<'_>, mut offset: u64) -> io::Result<()> {
        let _pin = self.image.in_flight.join();
        while payload.len() > 0 {
            self.image.make_room()?;
            let len = match self.step(offset, payload.len())? {
                Step::InPlace { at, len } => {
                    let part = payload.split_off(len);
                    // SAFETY: a payload's memory is readable for as long as it is borrowed.
                    unsafe { self.image.data.write_at(part.iovecs(), at) }?;
                    len
                }
                Step::Move(moved) => {
                    let len = moved.written.end - moved.written.start;
                    let part = payload.split_off(len);
                    let done = self.fill(&moved, part);
                    self.settle(&moved, done.is_ok());
                    done?;
                    len
                }
            };
            offset += len;
        }
        Ok(())
    }

    /// Where `len` bytes at `offset` of the disk can be written without further ado, and how many
    /// of them; none if that is not so for the first of them.
    pub(super) fn in_place(&self, offset: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
        let image = &*self.image;
        let meta = image.lock();
        Image::check_sound(&meta)?;
        let (key, at) = meta.tables.position(image.layout.cluster_of(offset));
        let (mut meta, slot) = image.slice(meta, key)?;
        match slot {
            Some(slot) => image.in_place(&mut meta, slot, at, offset, len),
            None => Ok(None),
        }
    }

    fn step(&self, offset: u64, len: u64) -> io::Result<Step> {
        let image = &*self.image;
        let cluster = image.layout.cluster_of(offset);
        let mut meta = image.lock();
        let (key, at) = meta.tables.position(cluster);
        loop {
            Image::check_sound(&meta)?;
            let slot;
            (meta, slot) = image.slice(meta, key)?;
            if let Some(slot) = slot
                && let Some((at, len)) = image.in_place(&mut meta, slot, at, offset, len)?
            {
                return Ok(Step::InPlace { at, len });
            }
            let slot;
            (meta, slot) = image.own_slice(meta, key)?;
            if meta.is_busy(&(cluster..cluster + 1)) {
                meta = image.wait(meta);
                continue;
            }
            // The lock may have been released since the first look.
            if image.in_place(&mut meta, slot, at, offset, len)?.is_none() {
                let moved = image.begin_move(&mut meta, slot, at, offset..offset + len)?;
                return Ok(Step::Move(moved));
            }
        }
    }

    /// Writes the data of a move, and copies what has to be.
    fn fill(&self, moved: &Move, data: Payload<'_>) -> io::Result<()> {
        let Move {
            written, filled, ..
        } = moved;
        let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(0);
        let (before, after) = (filled.start..written.start, written.end..filled.end);
        let (skip_before, zero_before) = self.is_zero(&before, moved.fresh)?;
        let (skip_after, zero_after) = self.is_zero(&after, moved.fresh)?;
        let mut head = self.spare.take(if zero_before { 0 } else { len(&before) });
        let mut tail = self.spare.take(if zero_after { 0 } else { len(&after) });
        if !zero_before {
            self.read_copy(head.slice(), &before)?;
        }
        if !zero_after {
            self.read_copy(tail.slice(), &after)?;
        }
        let (head, tail) = ([head.slice()], [tail.slice()]);
        let part = |skip, zero, slices, range: &Range<u64>| match (skip, zero) {
            (true, _) => Payload::nothing(),
            (_, true) => Payload::zeroes(range.end - range.start),
            _ => Payload::window(Window::new(slices)),
        };
        let head = part(skip_before, zero_before, &head, &before);
        let tail = part(skip_after, zero_after, &tail, &after);
        let start = written.start - head.len();
        let base = moved.clusters.start << self.image.layout.cluster_bits;
        let iovecs = head.iovecs().chain(data.iovecs()).chain(tail.iovecs());
        // SAFETY: a payload's memory is readable for as long as it is borrowed.
        unsafe {
            self.image
                .data
                .write_at(iovecs, moved.place + (start - base))
        }
    }

    /// Whether a range that is to be copied need not even be written, and whether it is zeroes.
    fn is_zero(&self, range: &Range<u64>, fresh: bool) -> io::Result<(bool, bool)> {
        let end = range.end.min(self.image.disk_size());
        let mut at = range.start;
        while at < end {
            match self.stack.map(at, end - at)? {
                (Source::Zero, len) => at += len,
                _ => return Ok((false, false)),
            }
        }
        Ok((fresh || range.is_empty(), true))
    }

    /// Reads a range that is to be copied; what is behind the end of the disk is zeroes.
    fn read_copy(&self, slice: vm_memory::VolatileSlice<'_>, range: &Range<u64>) -> io::Result<()> {
        let slices = [slice];
        let mut rest = Window::new(&slices);
        let within = self.image.disk_size().saturating_sub(range.start);
        let part = rest.split_off(within);
        rest.fill_zero();
        self.stack.read(part, range.start)
    }

    /// Ends a move: the tables point at the new places, or those are free again.
    fn settle(&self, moved: &Move, success: bool) {
        let image = &*self.image;
        let mut meta = image.lock();
        if success {
            image.end_move(&mut meta, moved);
        } else if moved.taken {
            let start = image.layout.cluster_of(moved.place);
            let count = moved.clusters.end - moved.clusters.start;
            for cluster in start..start + count {
                let freed = meta.space().and_then(|space| space.free(cluster));
                if freed.is_err() {
                    meta.freed.push(Run {
                        clusters: cluster..cluster + 1,
                        kind: Kind::Data,
                        punch: false,
                    });
                }
            }
        }
        meta.tables.cache().release(moved.slot);
        meta.not_busy(&moved.clusters);
        image.tell(meta);
    }
}

impl Image {
    /// [`Qcow2Disk::in_place`] in the slice at `slot`, whose entry `at` is that of `offset`.
    fn in_place(
        &self,
        meta: &mut Meta,
        slot: usize,
        mut at: usize,
        offset: u64,
        len: u64,
    ) -> io::Result<Option<(u64, u64)>> {
        let layout = self.layout;
        let end = usize::try_from(layout.slice_entries()).unwrap_or(0);
        let mut start = None;
        let mut total = 0;
        while total < len && at < end {
            let guest = offset + total;
            let within = layout.within_cluster(guest);
            let part = (layout.cluster_size() - within).min(len - total);
            let entry = self.entry(meta, slot, at, layout.cluster_of(guest))?;
            let mask = touched(layout, within, within + part);
            let place = match entry.place {
                Place::At { offset, own: true } if entry.data & mask == mask => offset,
                _ => break,
            };
            self.check_data(guest - within, place)?;
            if *start.get_or_insert(place + within) + total != place + within {
                break;
            }
            total += part;
            at += 1;
        }
        let Some(start) = start else {
            return Ok(None);
        };
        self.check_no_metadata(meta, start, total)?;
        Ok(Some((start, total)))
    }

    /// Takes places for as much of `range` as possible: at least for its first cluster, whose
    /// entry is `first` in the slice at `slot` of a table of the image's own.
    fn begin_move(
        &self,
        meta: &mut Meta,
        slot: usize,
        first: usize,
        range: Range<u64>,
    ) -> io::Result<Move> {
        let layout = self.layout;
        let start = layout.cluster_of(range.start);
        let left = layout.slice_entries() - first as u64;
        let end = layout.clusters(range.end).min(start + left);
        let head = self.entry(meta, slot, first, start)?;
        let own = own_place(head);
        let alike = self.alike(meta, slot, first, start..end, own)?;
        let (place, count, fresh) = self.take_place(meta, start, own, alike)?;
        let tail = first + usize::try_from(count - 1).unwrap_or(0);
        let tail = self.entry(meta, slot, tail, start + count - 1)?;
        let clusters = start..start + count;
        let written = range.start..range.end.min(clusters.end << layout.cluster_bits);
        let filled = self.filled(&clusters, &written, head, tail);
        meta.tables.cache().hold(slot);
        meta.busy.push(clusters.clone());
        Ok(Move {
            clusters,
            slot,
            first,
            place,
            taken: own.is_none() && !layout.external,
            fresh,
            written,
            filled,
        })
    }

    /// How many of `clusters`, the first of which has the entry `first` in the slice at `slot` and
    /// its place at `own`, are like that: all without a place of their own, or each with one that
    /// is behind the one before.
    fn alike(
        &self,
        meta: &Meta,
        slot: usize,
        first: usize,
        clusters: Range<u64>,
        own: Option<u64>,
    ) -> io::Result<u64> {
        let layout = self.layout;
        let mut count = 1;
        for (cluster, at) in (clusters.start + 1..clusters.end).zip(first + 1..) {
            let next = self.entry(meta, slot, at, cluster)?;
            let wanted = own.map(|place| place + (count << layout.cluster_bits));
            let done = own.is_some() && next.data == layout.all_subclusters();
            if meta.is_busy(&(cluster..cluster + 1)) || own_place(next) != wanted || done {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// A place for up to `count` clusters of the disk from `start` on, which have one at `own` or
    /// none; for how many, and whether it reads as zeroes.
    fn take_place(
        &self,
        meta: &mut Meta,
        start: u64,
        own: Option<u64>,
        count: u64,
    ) -> io::Result<(u64, u64, bool)> {
        let bits = self.layout.cluster_bits;
        if let Some(place) = own {
            self.check_data(start << bits, place)?;
            self.check_no_metadata(meta, place, count << bits)?;
            return Ok((place, count, false));
        }
        if self.layout.external {
            return Ok((start << bits, count, false));
        }
        let found = meta.space()?.allocate(count)?;
        let got = found.clusters.end - found.clusters.start;
        Ok((found.clusters.start << bits, got, found.fresh))
    }

    /// What has to be in the new places of `clusters`, of which `written` is written; `head` and
    /// `tail` are the entries of the first and the last of them.
    fn filled(
        &self,
        clusters: &Range<u64>,
        written: &Range<u64>,
        head: Entry,
        tail: Entry,
    ) -> Range<u64> {
        let layout = self.layout;
        let size = layout.subcluster_size();
        let first = clusters.start << layout.cluster_bits;
        let last = (clusters.end - 1) << layout.cluster_bits;
        let (from, to) = (written.start - first, written.end - last);
        let start = match head.place {
            // What is there already need not be copied.
            Place::At { own: true, .. } if head.data & touched(layout, from, from + 1) != 0 => from,
            Place::None | Place::At { own: true, .. } => from - from % size,
            Place::At { own: false, .. } => {
                (u64::from(head.data.trailing_zeros()) * size).min(from - from % size)
            }
            Place::Packed(_) => 0,
        };
        let end = match tail.place {
            Place::At { own: true, .. } if tail.data & touched(layout, to - 1, to) != 0 => to,
            Place::None | Place::At { own: true, .. } => to.next_multiple_of(size),
            Place::At { own: false, .. } => {
                let used = 32 - tail.data.leading_zeros();
                (u64::from(used) * size).max(to.next_multiple_of(size))
            }
            Place::Packed(_) => layout.cluster_size(),
        };
        first + start..last + end
    }

    /// Has the tables point at where a move has put the data.
    fn end_move(&self, meta: &mut Meta, moved: &Move) {
        let layout = self.layout;
        for (number, cluster) in moved.clusters.clone().enumerate() {
            let at = moved.first + number;
            // It was decoded before, and nobody else changes the entries of busy clusters.
            let old = meta.tables.entry(moved.slot, at).unwrap_or(Entry::ABSENT);
            let base = cluster << layout.cluster_bits;
            let start = moved.filled.start.max(base) - base;
            let end = moved.filled.end.min(base + layout.cluster_size()) - base;
            let mask = touched(layout, start, end);
            let place = Place::At {
                offset: moved.place + ((number as u64) << layout.cluster_bits),
                own: true,
            };
            let data = if old.place == place {
                old.data | mask
            } else {
                // What is called a place of metadata keeps its reference.
                let _ = self.leave(meta, old.place, false);
                mask
            };
            let zero = old.zero & !mask;
            meta.tables
                .set_entry(moved.slot, at, Entry { place, data, zero });
        }
    }
}

/// Where the place is that a cluster has for itself.
fn own_place(entry: Entry) -> Option<u64> {
    match entry.place {
        Place::At { offset, own: true } => Some(offset),
        _ => None,
    }
}
