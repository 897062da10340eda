//! How many references an image has to each cluster of its file, counted one by one.

use std::collections::HashMap;
use std::io;

/// Clusters that are counted together.
const CHUNK: u64 = 2048;
/// Most chunks, of 4 KiB each: enough for 32 TiB of data in clusters of 64 KiB, if there are few
/// gaps.
const MAX_CHUNKS: usize = 1 << 18;

/// References to clusters. Takes memory only where there are some.
#[derive(Debug, Default)]
pub struct Counts {
    chunks: HashMap<u64, Box<[u16]>>,
    /// What is beyond the highest number of a chunk.
    more: HashMap<u64, u64>,
    end: u64,
}

impl Counts {
    /// Counts a reference to a cluster.
    ///
    /// # Errors
    /// It would take too much memory.
    pub fn add(&mut self, cluster: u64) -> io::Result<()> {
        let key = cluster / CHUNK;
        if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&key) {
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                "the image is too large, or its data too scattered, to be checked",
            ));
        }
        let chunk = self.chunks.entry(key);
        let chunk = chunk.or_insert_with(|| vec![0; index(CHUNK)].into());
        if let Some(count) = chunk.get_mut(index(cluster % CHUNK)) {
            if *count == u16::MAX {
                *self.more.entry(cluster).or_default() += 1;
            } else {
                *count += 1;
            }
        }
        self.end = self.end.max(cluster + 1);
        Ok(())
    }

    /// Takes back one reference to a cluster.
    pub fn remove(&mut self, cluster: u64) {
        if let Some(more) = self.more.get_mut(&cluster) {
            *more -= 1;
            if *more == 0 {
                self.more.remove(&cluster);
            }
        } else if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK))
            && let Some(count) = chunk.get_mut(index(cluster % CHUNK))
        {
            *count = count.saturating_sub(1);
        }
    }

    /// References to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        let count = chunk.and_then(|chunk| chunk.get(index(cluster % CHUNK)));
        match count {
            Some(&u16::MAX) => 0xffff + self.more.get(&cluster).unwrap_or(&0),
            Some(&count) => count.into(),
            None => 0,
        }
    }

    /// The first cluster behind all that have references.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Whether any of these clusters has a reference.
    pub fn any(&self, clusters: std::ops::Range<u64>) -> bool {
        let mut cluster = clusters.start;
        let end = clusters.end.min(self.end);
        while cluster < end {
            if !self.chunks.contains_key(&(cluster / CHUNK)) {
                cluster = (cluster / CHUNK + 1) * CHUNK;
            } else if self.get(cluster) > 0 {
                return true;
            } else {
                cluster += 1;
            }
        }
        false
    }

    /// The clusters that have references, in no order.
    pub fn clusters(&self) -> impl Iterator<Item = u64> {
        self.chunks.iter().flat_map(|(key, chunk)| {
            let counted = (key * CHUNK..).zip(chunk);
            counted.filter(|(_, count)| **count > 0).map(|(at, _)| at)
        })
    }
}

fn index(value: u64) -> usize {
    // All values here are up to CHUNK.
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn counts_up_and_down() {
        let mut counts = Counts::default();
        for _ in 0..70_000 {
            counts.add(5).unwrap();
        }
        counts.add(1 << 24).unwrap();
        assert_eq!(
            (counts.get(5), counts.get(6), counts.get(1 << 24)),
            (70_000, 0, 1)
        );
        assert_eq!(counts.end(), (1 << 24) + 1);
        assert!(counts.any(0..6) && counts.any(6..1 << 25) && !counts.any(6..1 << 24));
        let mut all: Vec<_> = counts.clusters().collect();
        all.sort_unstable();
        assert_eq!(all, [5, 1 << 24]);
        for left in (0..70_000).rev() {
            counts.remove(5);
            assert_eq!(counts.get(5), left);
        }
    }

    #[test]
    fn scattered_references_do_not_take_all_memory() {
        let mut counts = Counts::default();
        let failed = (0..u64::from(u32::MAX)).find(|at| counts.add(at << 20).is_err());
        assert_eq!(failed, Some(MAX_CHUNKS as u64));
        counts.add(0).unwrap();
    }
}
