//! Writing compressed clusters, which share clusters of the file.

use std::io;

use super::codec::pack;
use super::disk::Qcow2Disk;
use super::entry::{Entry, Packed, Place};
use super::image::{Image, Meta};
use super::payload::Payload;
use crate::host::Window;

impl Qcow2Disk {
    /// Writes a cluster at `offset`, compressed if that makes it shorter. What `data` lacks at the
    /// end of the disk is zeroes.
    pub(super) fn write_packed(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let image = &*self.image;
        let layout = image.layout;
        let len = data.len() as u64;
        let whole = len == layout.cluster_size()
            || (len < layout.cluster_size() && offset + len == image.disk_size());
        if layout.within_cluster(offset) != 0 || !whole {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only whole clusters can be compressed",
            ));
        }
        let mut cluster = self.spare.take(layout.cluster_len());
        let bytes = cluster.bytes();
        bytes.fill(0);
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let packed = if layout.external {
            None
        } else {
            pack(image.compression, bytes)
        };
        if let Some(packed) = packed
            && self.write_packed_bytes(offset, &packed)?
        {
            return Ok(());
        }
        let slices = [cluster.slice()];
        let mut window = Window::new(&slices);
        self.write(Payload::window(window.split_off(len)), offset)
    }

    /// Writes compressed data to some new place. Returns whether there can be one.
    fn write_packed_bytes(&self, offset: u64, packed: &[u8]) -> io::Result<bool> {
        let image = &*self.image;
        let _pin = image.in_flight.join();
        image.make_room()?;
        let cluster = image.layout.cluster_of(offset);
        let clusters = cluster..cluster + 1;
        let mut meta = image.lock();
        let (key, at) = meta.tables.position(cluster);
        let slot = loop {
            Image::check_sound(&meta)?;
            let slot;
            (meta, slot) = image.own_slice(meta, key)?;
            if !meta.is_busy(&clusters) {
                break slot;
            }
            meta = image.wait(meta);
        };
        let old = image.entry(&meta, slot, at, cluster)?;
        let Some(place) = image.take_bytes(&mut meta, packed.len() as u64)? else {
            return Ok(false);
        };
        meta.busy.push(clusters.clone());
        meta.tables.cache().hold(slot);
        drop(meta);

        let done = image.data.write_buf(packed, place.offset);

        let mut meta = image.lock();
        let new = Place::Packed(place);
        let left = if done.is_ok() {
            let entry = Entry {
                place: new,
                data: 0,
                zero: 0,
            };
            meta.tables.set_entry(slot, at, entry);
            old.place
        } else {
            new
        };
        // What is called a place of metadata keeps its reference.
        let _ = image.leave(&mut meta, left, false);
        meta.tables.cache().release(slot);
        meta.not_busy(&clusters);
        image.tell(meta);
        done.map(|()| true)
    }
}

impl Image {
    /// Takes room for `len` compressed bytes, if an entry can tell of it.
    fn take_bytes(&self, meta: &mut Meta, len: u64) -> io::Result<Option<Packed>> {
        let layout = self.layout;
        let most = layout.max_refcount();
        // First what the last one left over, as long as the cluster can have another reference.
        let mut begun = None;
        if let Some(offset) = meta.packing.take() {
            let cluster = layout.cluster_of(offset);
            let rest = layout.cluster_size() - layout.within_cluster(offset);
            let refcounts = &mut meta.space()?.refcounts;
            let refcount = refcounts.get(cluster)?;
            if refcount < most && Packed::fits(layout, offset, len) {
                if rest >= len {
                    refcounts.set(cluster, refcount + 1)?;
                    meta.packing = (rest > len).then_some(offset + len);
                    return Ok(Some(Packed { offset, len }));
                }
                begun = Some((cluster, offset, refcount));
            }
        }
        let space = meta.space()?;
        let cluster = space.allocate(1)?.clusters.start;
        let offset = match begun {
            Some((first, offset, refcount)) if first + 1 == cluster => {
                if let Err(error) = space.refcounts.set(first, refcount + 1) {
                    space.free(cluster)?;
                    return Err(error);
                }
                offset
            }
            _ => cluster << layout.cluster_bits,
        };
        // What was begun has been found to fit.
        if !Packed::fits(layout, offset, len) {
            space.free(cluster)?;
            return Ok(None);
        }
        let end = offset + len;
        meta.packing = (layout.within_cluster(end) != 0).then_some(end);
        Ok(Some(Packed { offset, len }))
    }
}
