//! Making tables and clusters the image's own, so that they can be changed.

use std::io;

use super::damage::damage;
use super::entry::Place;
use super::freed::{Kind, Run};
use super::image::{Guard, Image, Meta};
use super::places::Use;

impl Image {
    /// [`Image::slice`] of a table that nothing else refers to: that which is there, or a copy of
    /// it, or a new one.
    pub(super) fn own_slice<'a>(
        &'a self,
        mut meta: Guard<'a>,
        key: u64,
    ) -> io::Result<(Guard<'a>, usize)> {
        loop {
            self.own_table(&mut meta, key)?;
            let slot;
            (meta, slot) = self.slice(meta, key)?;
            if let Some(slot) = slot {
                return Ok((meta, slot));
            }
        }
    }

    fn own_table(&self, meta: &mut Meta, key: u64) -> io::Result<()> {
        let index = meta.tables.l1_index(key);
        let old = match meta.tables.table(index) {
            Some((_, true)) => return Ok(()),
            Some((offset, false)) => {
                self.check_table(offset)?;
                Some(self.layout.cluster_of(offset))
            }
            None if index < meta.tables.l1_len() => None,
            None => return Err(damage("its L1 table is too short for the disk")),
        };
        let space = meta.space()?;
        let cluster = space.allocate(1)?.clusters.start;
        space.places.add(cluster, Use::L2);
        meta.tables
            .replace(index, cluster << self.layout.cluster_bits);
        if let Some(old) = old {
            meta.freed.push(Run::table(old..old + 1));
        }
        Ok(())
    }

    /// Takes note that a cluster of the disk is at `place` no more.
    ///
    /// # Errors
    /// The image's metadata is there.
    pub(super) fn leave(&self, meta: &mut Meta, place: Place, punch: bool) -> io::Result<()> {
        let (clusters, kind) = match place {
            Place::None => return Ok(()),
            Place::At { offset, .. } => {
                let cluster = self.layout.cluster_of(offset);
                let external = self.layout.external;
                let kind = if external { Kind::External } else { Kind::Data };
                (cluster..cluster + 1, kind)
            }
            Place::Packed(packed) => (packed.clusters(self.layout), Kind::Data),
        };
        if kind == Kind::Data {
            let bits = self.layout.cluster_bits;
            let len = (clusters.end - clusters.start) << bits;
            self.check_no_metadata(meta, clusters.start << bits, len)?;
        }
        meta.freed.push(Run {
            clusters,
            kind,
            punch,
        });
        Ok(())
    }

    /// Checks that no metadata is where data is about to be written: `len` bytes at `offset`.
    pub(super) fn check_no_metadata(
        &self,
        meta: &mut Meta,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        if self.layout.external {
            return Ok(());
        }
        let layout = self.layout;
        let clusters = layout.cluster_of(offset)..layout.clusters(offset.saturating_add(len));
        match meta.space()?.places.find(&clusters) {
            None => Ok(()),
            Some((what, cluster)) => Err(damage(format!(
                "data is said to be where its {what} is, at offset {}",
                cluster << layout.cluster_bits
            ))),
        }
    }
}
