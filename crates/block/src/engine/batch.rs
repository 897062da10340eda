//! Requests that a helper does together.
//!
//! Writes that lie side by side on the disk are done as one. Those that come here go to new places
//! of a file, and a file system has writes that make its file longer wait for each other: one for
//! all takes hardly longer than one for each.

use std::collections::VecDeque;

use super::Operation;
use super::helper::{Job, Memory, perform};
use crate::{BlockBackend, BlockError};

/// Most bytes of writes that are done as one, unless it is a single one.
const LONGEST: u64 = 1 << 20;
/// Most writes that are done as one.
const MOST: usize = 64;

/// One request, or several writes side by side. Kept from one to the next.
#[derive(Debug)]
pub struct Batch {
    jobs: Vec<Job>,
    memory: Memory,
}

impl Batch {
    /// None, with room for as many as there can be.
    pub fn new() -> Self {
        Self {
            jobs: Vec::with_capacity(MOST),
            memory: Memory::with_capacity(2 * MOST),
        }
    }

    /// Takes the first of `queue`, with those that can be done together with it. It has none left
    /// from before.
    pub fn take(&mut self, queue: &mut VecDeque<Job>) {
        self.jobs.extend(queue.pop_front());
        let Some(first) = self.jobs.first().map(|job| job.request) else {
            return;
        };
        if first.operation != Operation::Write {
            return;
        }
        let (mut end, mut len) = (first.offset.saturating_add(first.len), first.len);
        while let Some(next) = queue.front().map(|job| job.request) {
            len = len.saturating_add(next.len);
            let follows = next.operation == Operation::Write && next.offset == end;
            if !follows || len > LONGEST || self.jobs.len() >= MOST {
                break;
            }
            end = end.saturating_add(next.len);
            self.jobs.extend(queue.pop_front());
        }
    }

    /// Does what was taken, and tells how each request has ended.
    pub fn perform(&mut self, backend: &dyn BlockBackend) {
        let together = self.jobs.len() > 1 && self.write(backend).is_ok();
        for job in self.jobs.drain(..) {
            // Some of a write that failed may have been done, and each is told of its own.
            let result = if together {
                Ok(())
            } else {
                perform(backend, &job)
            };
            job.tell(result);
        }
    }

    /// Does all writes as one.
    fn write(&mut self, backend: &dyn BlockBackend) -> Result<(), BlockError> {
        let mut offset = None;
        self.memory.clear();
        for job in &self.jobs {
            if job.is_cancelled() {
                return Err(BlockError::Cancelled);
            }
            offset = offset.or(Some(job.request.offset));
            self.memory.append(&job.memory);
        }
        let done = backend.write_vectored(self.memory.slices(), offset.unwrap_or(0));
        self.memory.clear();
        done
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Mutex};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::Request;
    use super::super::helper::Mailbox;
    use super::*;
    use crate::{Limits, VolatileSlice, check_range, total_len};

    const LEN: usize = 4096;
    /// A write across this offset fails.
    const BAD: u64 = 20 * LEN as u64;

    /// A disk that notes where it is written, and how much.
    #[derive(Debug, Default)]
    struct Notes(Mutex<Vec<(u64, u64, Vec<u8>)>>);

    impl BlockBackend for Notes {
        fn size(&self) -> u64 {
            1 << 30
        }
        fn read_only(&self) -> bool {
            false
        }
        fn limits(&self) -> Limits {
            Limits {
                logical_block: 512,
                physical_block: 4096,
                discard_granularity: 0,
            }
        }
        fn read_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
            Ok(())
        }
        fn write_vectored(&self, bufs: &[VolatileSlice<'_>], at: u64) -> Result<(), BlockError> {
            let len = total_len(bufs);
            check_range(at, len, if at < BAD { BAD } else { self.size() })?;
            let mut first = [0_u8; 1];
            let firsts = bufs.iter().map(|buf| {
                buf.copy_to(&mut first);
                first[0]
            });
            let firsts = firsts.collect();
            self.0.lock().unwrap().push((at, len, firsts));
            Ok(())
        }
        fn flush(&self) -> Result<(), BlockError> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
            Ok(())
        }
    }

    /// Writes of a block each at `blocks`, done batch by batch; how each ended, in their order.
    fn done(disk: &Notes, blocks: &[u64], cancelled: Option<usize>) -> Vec<bool> {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut data: Vec<_> = (0..blocks.len()).map(|at| vec![at as u8; LEN]).collect();
        let mut queue: VecDeque<_> = std::iter::zip(blocks, &mut data)
            .enumerate()
            .map(|(token, (block, data))| {
                let mut memory = Memory::default();
                // SAFETY: the data outlives the batches.
                unsafe { memory.set(&[VolatileSlice::from(&mut data[..])]) };
                Job {
                    token,
                    request: Request {
                        operation: Operation::Write,
                        offset: block * LEN as u64,
                        len: LEN as u64,
                    },
                    memory,
                    cancelled: Arc::new(AtomicBool::new(cancelled == Some(token))),
                    mailbox: Arc::clone(&mailbox),
                }
            })
            .collect();
        let mut batch = Batch::new();
        while !queue.is_empty() {
            batch.take(&mut queue);
            batch.perform(disk);
        }
        let event = mailbox.event();
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(1));
        let mut ended = vec![None; blocks.len()];
        while let Some((token, result, _)) = mailbox.take() {
            assert!(ended[token].replace(result.is_ok()).is_none());
        }
        ended.into_iter().map(Option::unwrap).collect()
    }

    #[test]
    fn writes_side_by_side_are_one() {
        let disk = Notes::default();
        assert_eq!(done(&disk, &[3, 4, 5, 9, 8, 10], None), [true; 6]);
        let block = LEN as u64;
        let expected = [
            (3 * block, 3 * block, vec![0, 1, 2]),
            (9 * block, block, vec![3]),
            (8 * block, block, vec![4]),
            (10 * block, block, vec![5]),
        ];
        assert_eq!(*disk.0.lock().unwrap(), expected);
    }

    #[test]
    fn one_write_is_only_so_long() {
        let disk = Notes::default();
        let blocks: Vec<u64> = (100..500).collect();
        assert!(done(&disk, &blocks, None).iter().all(|done| *done));
        let writes = disk.0.lock().unwrap();
        let longest = writes.iter().map(|(_, len, _)| *len).max();
        assert_eq!(longest, Some(MOST as u64 * LEN as u64));
        assert!(writes.iter().map(|(_, len, _)| len).sum::<u64>() == 400 * LEN as u64);
    }

    #[test]
    fn each_is_told_of_its_own_end() {
        let disk = Notes::default();
        // Together they fail, and each is good by itself.
        let ended = done(&disk, &[17, 18, 19, 20, 21], None);
        assert_eq!(ended, [true; 5]);
        assert_eq!(disk.0.lock().unwrap().len(), 5, "one by one");
        let ended = done(&disk, &[1, 2, 3], Some(1));
        assert_eq!(ended, [true, false, true]);
    }
}
