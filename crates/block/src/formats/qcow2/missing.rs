//! Images whose file has lost its end.
//!
//! A copy that ran out of space leaves one. It could be written as long as nobody reads what is
//! missing; but then it grows over where that was, and what was missing reads as anything. (QEMU
//! opens it, and reads zeroes.)
//!
//! The refcounts tell whether that may be so at the cost of a few reads. They look the same after a
//! power cut, when clusters were taken that nothing has come to refer to, so the tables decide.

use std::io;

use super::entry::{Entry, Place, words};
use super::layout::Layout;
use super::refcounts::Refcounts;
use crate::host::HostFile;

/// Most refcounts past the end of the file that are looked through, in slices. Where they are
/// wanted, the first one of them tells.
const MAX_SLICES: u64 = 4096;
/// Most bytes of L2 tables that are looked through: those of 2 TiB in clusters of 64 KiB. What is
/// missing behind that fails when it is read.
const MAX_TABLE_BYTES: u64 = 256 << 20;

/// What is missing of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// How many clusters of the disk have their data past the end of the file.
    pub clusters: u64,
    /// How long the file would have to be at least, in bytes.
    pub len: u64,
}

impl Missing {
    /// Counts data that would be at `offset`.
    pub fn note(&mut self, offset: u64, len: u64) {
        self.clusters += 1;
        self.len = self.len.max(offset.saturating_add(len));
    }

    /// Why the image can't be written, and what can be done.
    pub fn reason(&self, layout: Layout, file_len: u64) -> String {
        let lost = self.clusters.saturating_mul(layout.cluster_size());
        format!(
            "it is truncated: {lost} bytes of its data are past the end of the file at {file_len}, \
             which once had {} bytes at least; copy the image again, or open it read-only to save \
             what is left (`edgevmm image check` tells more)",
            self.len
        )
    }
}

/// What is missing in an image whose L2 tables are at these offsets, inside its file.
///
/// # Errors
/// The host can't read it.
pub fn find(
    file: &HostFile,
    layout: Layout,
    tables: impl Iterator<Item = u64>,
    refcounts: &mut Refcounts,
) -> io::Result<Missing> {
    let file_len = file.len()?;
    let mut missing = Missing::default();
    if layout.external || !refcounts.any_from(layout.clusters(file_len), MAX_SLICES)? {
        return Ok(missing);
    }
    let mut tables: Vec<u64> = tables.collect();
    // As the host reads ahead.
    tables.sort_unstable();
    tables.truncate(usize::try_from(MAX_TABLE_BYTES >> layout.cluster_bits).unwrap_or(usize::MAX));
    let mut table = vec![0; layout.cluster_len()];
    for offset in tables {
        file.read_buf(&mut table, offset)?;
        for at in 0..usize::try_from(layout.table_entries()).unwrap_or(0) {
            let place = Entry::decode(layout, words(layout, &table, at)).map(|entry| entry.place);
            let (offset, len) = match place {
                Ok(Place::At { offset, .. }) => (offset, layout.cluster_size()),
                Ok(Place::Packed(packed)) => (packed.offset, packed.len),
                Ok(Place::None) | Err(_) => continue,
            };
            // Nobody has to write the end of a cluster.
            if offset >= file_len {
                missing.note(offset, len);
            }
        }
    }
    Ok(missing)
}
