//! Images whose data is in another file, each cluster at its guest offset.

use std::io;

use super::disk::Qcow2Disk;
use super::entry::{Entry, Place};
use super::freed::Run;
use super::image::{Image, Meta};

impl Image {
    /// Gives the space of clusters back that the disk does not have any more, unless it has them
    /// again: each has but one place in the data file.
    pub(super) fn give_back_external(&self, run: &Run) -> Result<(), (u64, io::Error)> {
        let mut cluster = run.clusters.start;
        while run.punch && cluster < run.clusters.end {
            let meta = self.lock();
            let (key, first) = meta.tables.position(cluster);
            let (mut meta, slot) = self.slice(meta, key).map_err(|error| (cluster, error))?;
            let left = self.layout.slice_entries() - first as u64;
            let end = run.clusters.end.min(cluster + left);
            let unused = |meta: &Meta, cluster: u64, at: usize| match slot {
                _ if meta.is_busy(&(cluster..cluster + 1)) => false,
                Some(slot) => {
                    matches!(meta.tables.entry(slot, at), Ok(entry) if entry.place == Place::None)
                }
                None => true,
            };
            let count = (cluster..end)
                .zip(first..)
                .take_while(|(cluster, at)| unused(&meta, *cluster, *at))
                .count() as u64;
            if count == 0 {
                cluster += 1;
                continue;
            }
            let gone = cluster..cluster + count;
            meta.busy.push(gone.clone());
            drop(meta);
            let bits = self.layout.cluster_bits;
            // Not being able to only costs space of the host.
            let _ = self.data.discard(gone.start << bits, count << bits);
            let mut meta = self.lock();
            meta.not_busy(&gone);
            self.tell(meta);
            cluster = gone.end;
        }
        Ok(())
    }
}

impl Qcow2Disk {
    /// Has the tables point at the data file from `start` to `end`, so that both always read the
    /// same.
    pub(super) fn preallocate(&self, start: u64, end: u64) -> io::Result<()> {
        let image = &*self.image;
        let _pin = image.in_flight.join();
        let layout = image.layout;
        let (mut cluster, end) = (layout.cluster_of(start), layout.clusters(end));
        while cluster < end {
            image.make_room()?;
            let meta = image.lock();
            Image::check_sound(&meta)?;
            let (key, first) = meta.tables.position(cluster);
            let (mut meta, slot) = image.own_slice(meta, key)?;
            let entries = usize::try_from(layout.slice_entries()).unwrap_or(0);
            for at in first..entries {
                if cluster == end {
                    break;
                }
                let offset = cluster << layout.cluster_bits;
                let old = image.entry(&meta, slot, at, cluster)?;
                if old.place == Place::None {
                    let new = Entry {
                        place: Place::At { offset, own: true },
                        data: layout.all_subclusters() & !old.zero,
                        zero: old.zero,
                    };
                    meta.tables.set_entry(slot, at, new);
                }
                cluster += 1;
            }
        }
        Ok(())
    }
}
