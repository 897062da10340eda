//! Making a disk larger.
//!
//! The L1 table moves to where it has room, and whatever would show in the new part of the disk,
//! such as data of a longer image below, is hidden. Only when that is durable does the header tell
//! the new size.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::disk::Qcow2Disk;
use super::freed::Run;
use super::image::Image;
use super::layout::MAX_L1_BYTES;
use super::places::Use;
use crate::{BlockError, SECTOR_SIZE};

impl Qcow2Disk {
    /// Makes the disk `new_size` bytes large; it is durable once this returns.
    pub(super) fn grow(&self, new_size: u64) -> Result<(), BlockError> {
        let unsupported = |reason| {
            Err(BlockError::Unsupported {
                op: "resize",
                reason,
            })
        };
        let _one_at_a_time = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let image = &*self.image;
        let old = image.disk_size();
        if new_size < old {
            return unsupported("it would become smaller, and lose what is at its end");
        }
        if !new_size.is_multiple_of(SECTOR_SIZE) {
            return unsupported("its size has to be a multiple of 512 bytes");
        }
        let most = i64::MAX.unsigned_abs();
        if new_size > most || image.layout.l1_entries(new_size) * 8 > MAX_L1_BYTES {
            return unsupported("clusters of this size do not allow a disk as large as that");
        }
        if image.layout.version < 3 && image.has_snapshots {
            return unsupported(
                "images of version 2 with internal snapshots can't be resized; delete those first",
            );
        }
        let done = self.grow_from(old, new_size);
        if done.is_err() && image.lock().size_in_header == old {
            image.size.store(old, Ordering::Release);
        }
        image.note_damage(&done);
        done.map_err(|source| BlockError::Io {
            op: "grow the disk by",
            offset: old,
            len: new_size - old,
            source,
        })
    }

    fn grow_from(&self, old: u64, new: u64) -> io::Result<()> {
        let image = &*self.image;
        image.lengthen_l1(new)?;
        if image.layout.external {
            image.data.grow(new)?;
        }
        image.size.store(new, Ordering::Release);
        if image.raw_external {
            self.preallocate(old, new)?;
        }
        if new > old {
            self.zero_range(old, new - old, true)?;
        }
        image.flush()?;
        let mut meta = image.lock();
        meta.size_in_header = new;
        meta.tables.grow(None);
        drop(meta);
        image.flush()
    }
}

impl Image {
    fn lengthen_l1(&self, size: u64) -> io::Result<()> {
        let mut meta = self.lock();
        Self::check_sound(&meta)?;
        let needed = self.layout.l1_entries(size);
        let entries = usize::try_from(needed).unwrap_or(usize::MAX);
        if entries <= meta.tables.l1_len() {
            return Ok(());
        }
        let space = meta.space()?;
        let place = space
            .allocate_run(self.layout.clusters(needed * 8))?
            .clusters;
        space.places.add_run(place.clone(), Use::L1);
        if let Some(old) = meta.tables.grow(Some((entries, place))) {
            if let Some(space) = &mut meta.space {
                space.places.remove_run(&old);
            }
            // An image without a disk has no L1 table, nor a place of it.
            if !old.is_empty() {
                meta.freed.push(Run::table(old));
            }
        }
        Ok(())
    }
}
