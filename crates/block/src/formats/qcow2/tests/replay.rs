//! What a power failure may leave of files.
//!
//! What was synced is there. Of everything done since, each sector may be there or not, whatever
//! the order in which it was done.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::setup::Random;
use crate::host::record::Event;

const SECTOR: u64 = 512;

/// A file as it was when the power failed.
#[derive(Clone, Debug)]
pub struct Disk {
    pub bytes: Vec<u8>,
}

impl Disk {
    /// What `file` has now.
    pub fn of(file: &File) -> Self {
        let len = file.metadata().unwrap().len();
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Self { bytes }
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset as usize..end].copy_from_slice(data);
    }

    /// Does what was done, or, if `parts`, some sectors of it.
    fn apply(&mut self, event: &Event, parts: Option<&mut Random>) {
        match (event, parts) {
            (Event::Write { offset, data }, None) => self.put(*offset, data),
            (Event::Write { offset, data }, Some(random)) => {
                let some = Share::new(random);
                for (start, end) in sectors(*offset, data.len() as u64) {
                    if some.picks(random) {
                        let part = (start - offset) as usize..(end - offset) as usize;
                        self.put(start, &data[part]);
                    }
                }
            }
            // Zeroing never makes a file longer.
            (Event::Zero { offset, len }, parts) => {
                let len = (self.bytes.len() as u64).saturating_sub(*offset).min(*len);
                let mut parts = parts;
                let some = parts.as_mut().map(|random| Share::new(random));
                for (start, end) in sectors(*offset, len) {
                    let picked = match (&some, &mut parts) {
                        (Some(some), Some(random)) => some.picks(random),
                        _ => true,
                    };
                    if picked {
                        self.bytes[start as usize..end as usize].fill(0);
                    }
                }
            }
            (Event::SetLen(len), None) => self.bytes.resize(*len as usize, 0),
            (Event::SetLen(len), Some(random)) => {
                if random.below(2) == 0 {
                    self.bytes.resize(*len as usize, 0);
                }
            }
            (Event::SyncBegins | Event::SyncEnds(_) | Event::Mark, _) => {}
        }
    }
}

/// How much of something is there: nothing, all, or some.
struct Share(u64);

impl Share {
    fn new(random: &mut Random) -> Self {
        Self(random.below(4))
    }

    fn picks(&self, random: &mut Random) -> bool {
        match self.0 {
            0 => false,
            1 => true,
            _ => random.below(2) == 0,
        }
    }
}

/// The pieces of a range that are in a sector each.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR))
        .map(move |sector| (offset.max(sector * SECTOR), end.min((sector + 1) * SECTOR)))
}

/// What may be left of `files` if the power fails after `events`.
pub fn crash(files: &[Disk], events: &[(usize, Event)], random: &mut Random) -> Vec<Disk> {
    let mut left = files.to_vec();
    for (number, disk) in left.iter_mut().enumerate() {
        let durable = events.iter().rev().find_map(|(file, event)| match event {
            Event::SyncEnds(begin) if *file == number => Some(*begin),
            _ => None,
        });
        for (at, (file, event)) in events.iter().enumerate() {
            if *file != number {
                continue;
            }
            if durable.is_some_and(|durable| at < durable) {
                disk.apply(event, None);
            } else {
                disk.apply(event, Some(random));
            }
        }
    }
    left
}

#[test]
fn what_is_synced_is_there_and_the_rest_may_be() {
    let write = |offset, byte| {
        let data = vec![byte; 1024];
        (0, Event::Write { offset, data })
    };
    let events = [
        write(0, 1),
        (0, Event::SyncBegins),
        write(1024, 2),
        (0, Event::SyncEnds(1)),
        write(0, 3),
    ];
    let mut random = Random::new();
    let mut seen = std::collections::HashSet::new();
    let empty = [Disk { bytes: vec![] }];
    for _ in 0..500 {
        let disk = crash(&empty, &events, &mut random).remove(0);
        seen.insert([0, 512, 1024, 1536].map(|at| disk.bytes.get(at).copied().unwrap_or(0)));
    }
    assert!(
        seen.iter()
            .all(|bytes| bytes[..2].iter().all(|byte| [1, 3].contains(byte)))
    );
    assert!(seen.contains(&[1, 3, 0, 2]) && seen.contains(&[3, 1, 2, 0]));
    assert_eq!(seen.len(), 16);
}
