//! Images whose data is in another file, which is a raw image by itself.

use std::io;

use super::disk::Qcow2Disk;
use super::entry::{Entry, Place};
use super::image::Image;

impl Qcow2Disk {
    /// Has the tables point at the data file from `start` to `end`, so that both always read the
    /// same.
    pub(super) fn preallocate(&self, start: u64, end: u64) -> io::Result<()> {
        let image = &*self.image;
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
