//! Whether what the tables call the image's own has just one reference.

use std::io;

use super::Checker;
use crate::formats::qcow2::entry::{COMPRESSED, COPIED, Entry, OFFSET_MASK, Place, words};
use crate::formats::qcow2::open::read_table;

impl Checker<'_> {
    /// Compares the flags of the disk's tables with the refcounts, and makes them right if `fix`.
    ///
    /// # Errors
    /// Tables can't be read or written.
    pub fn compare_flags(&mut self, fix: bool) -> io::Result<()> {
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries.into());
        if self.layout.within_cluster(offset) != 0 || offset >= self.file_len {
            return Ok(());
        }
        let mut l1 = read_table(self.file, offset, entries)?;
        let mut changed = false;
        let mut table = vec![0; self.layout.cluster_len()];
        for (index, entry) in l1.iter_mut().enumerate() {
            let offset = *entry & OFFSET_MASK;
            if offset == 0 && *entry & COPIED != 0 {
                // Told of when the references were counted.
                *entry = 0;
                changed = true;
            }
            let inside = offset < self.file_len && self.layout.within_cluster(offset) == 0;
            if offset == 0 || !inside {
                continue;
            }
            let own = self.final_refcount(self.layout.cluster_of(offset))? == 1;
            if own != (*entry & COPIED != 0) {
                self.wrong_flag(&format!("Entry {index} of the L1 table"), own);
                *entry ^= COPIED;
                changed = true;
            }
            self.file.read_buf(&mut table, offset)?;
            if self.compare_table(&mut table, offset)? && fix {
                self.file.write_buf(&table, offset)?;
            }
        }
        if changed && fix {
            let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.file.write_buf(&bytes, offset)?;
        }
        Ok(())
    }

    /// Compares the flags of one L2 table. Returns whether it has changed.
    fn compare_table(&mut self, table: &mut [u8], offset: u64) -> io::Result<bool> {
        let layout = self.layout;
        let mut changed = false;
        for at in 0..usize::try_from(layout.table_entries()).unwrap_or(0) {
            let words = words(layout, table, at);
            let [word, subclusters] = words;
            let own = if word & COMPRESSED != 0 {
                // Told of when the references were counted.
                if word & COPIED == 0 && subclusters == 0 {
                    continue;
                }
                let start = at * layout.entry_len() + 8;
                if layout.extended
                    && let Some(bitmap) = table.get_mut(start..start + 8)
                {
                    bitmap.fill(0);
                }
                false
            } else {
                let place = Entry::decode(layout, words).map(|entry| entry.place);
                let Ok(Place::At { offset: data, own }) = place else {
                    continue;
                };
                let single = layout.external || self.final_refcount(layout.cluster_of(data))? == 1;
                if own == single {
                    continue;
                }
                let which = format!("Entry {at} of the L2 table at offset {offset}");
                self.wrong_flag(&which, single);
                single
            };
            let word = word & !COPIED | if own { COPIED } else { 0 };
            let start = at * layout.entry_len();
            if let Some(to) = table.get_mut(start..start + 8) {
                to.copy_from_slice(&word.to_be_bytes());
            }
            changed = true;
        }
        Ok(changed)
    }

    fn wrong_flag(&mut self, which: &str, own: bool) {
        self.corrupt(format!(
            "{which} points at something {}",
            if own {
                "that nothing else uses, but does not say so"
            } else {
                "that it calls its own, but something else uses as well"
            }
        ));
    }
}
