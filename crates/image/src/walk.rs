//! Working through disks piece by piece, by several threads.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::ImageError;
use crate::job::Job;

/// Bytes of a piece, at most, and what its beginning is a multiple of: the largest cluster that
/// qcow2 has, so that no two threads write to one cluster.
pub const PIECE: u64 = 2 << 20;
/// More threads than this wait for each other and for the host's disk.
const MAX_THREADS: usize = 8;
/// How far one look ahead reaches, so that a job can be cancelled in between.
const LOOK: u64 = 256 << 20;

/// A part of a disk for one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Bytes in it, at most [`PIECE`].
    pub len: u64,
}

/// Has several threads work on the pieces of a disk of `size` bytes.
///
/// `look` tells of up to so many bytes at an offset whether they matter, and for how many of them
/// that is true; what does not matter is left out. Pieces are given out in order. The first
/// failure ends it all; `left` says what remains when the job is cancelled. `work` gets a buffer of
/// the piece's length, with anything in it, which may be made longer.
pub fn in_pieces<L, W>(
    size: u64,
    job: &Job<'_>,
    left: &'static str,
    look: L,
    work: W,
) -> Result<(), ImageError>
where
    L: FnMut(u64, u64) -> Result<(bool, u64), ImageError> + Send,
    W: Fn(Piece, &mut Vec<u8>) -> Result<(), ImageError> + Sync,
{
    let cursor = Mutex::new(Cursor {
        at: 0,
        size,
        look,
        failure: None,
    });
    let lock = || cursor.lock().unwrap_or_else(PoisonError::into_inner);
    let run = || {
        let mut buffer = Vec::new();
        loop {
            let next = lock().next(job, left);
            let Some(piece) = next else { return };
            // At most PIECE bytes, which fits.
            buffer.resize(usize::try_from(piece.len).unwrap_or(usize::MAX), 0);
            if let Err(error) = work(piece, &mut buffer) {
                lock().failure.get_or_insert(error);
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let pieces = usize::try_from(size.div_ceil(PIECE)).unwrap_or(usize::MAX);
    thread::scope(|scope| {
        for _ in 1..threads.min(MAX_THREADS).min(pieces) {
            scope.spawn(run);
        }
        run();
    });
    if let Some(failure) = lock().failure.take() {
        return Err(failure);
    }
    job.report(size, size);
    Ok(())
}

/// What is still to be given out.
struct Cursor<L> {
    at: u64,
    size: u64,
    look: L,
    failure: Option<ImageError>,
}

impl<L> Cursor<L>
where
    L: FnMut(u64, u64) -> Result<(bool, u64), ImageError>,
{
    fn next(&mut self, job: &Job<'_>, left: &'static str) -> Option<Piece> {
        if self.failure.is_some() {
            return None;
        }
        self.find(job, left).unwrap_or_else(|failure| {
            self.failure = Some(failure);
            None
        })
    }

    fn find(&mut self, job: &Job<'_>, left: &'static str) -> Result<Option<Piece>, ImageError> {
        while self.at < self.size {
            job.check(left)?;
            // Off by what the threads still work on, which is little.
            job.report(self.at, self.size);
            let rest = self.size - self.at;
            let (matters, len) = (self.look)(self.at, rest.min(LOOK))?;
            if matters {
                let offset = self.at / PIECE * PIECE;
                self.at = offset.saturating_add(PIECE).min(self.size);
                let len = self.at - offset;
                return Ok(Some(Piece { offset, len }));
            }
            self.at += len.clamp(1, rest);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Looks at a disk that matters where `data` is.
    fn look(data: &[(u64, u64)]) -> impl FnMut(u64, u64) -> Result<(bool, u64), ImageError> {
        move |at, len| {
            let within = data.iter().find(|(from, to)| (*from..*to).contains(&at));
            let next = data.iter().map(|(from, _)| *from).filter(|from| *from > at);
            let end = within.map_or_else(|| next.min().unwrap_or(u64::MAX), |(_, to)| *to);
            Ok((within.is_some(), len.min(end - at)))
        }
    }

    fn pieces(size: u64, data: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let seen = Mutex::new(Vec::new());
        in_pieces(size, &Job::unattended(), "", look(data), |piece, buffer| {
            assert_eq!(buffer.len() as u64, piece.len);
            seen.lock().unwrap().push((piece.offset, piece.len));
            Ok(())
        })
        .unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        seen
    }

    #[test]
    fn pieces_are_aligned_and_leave_out_what_does_not_matter() {
        assert_eq!(pieces(0, &[]), []);
        assert_eq!(pieces(100 * PIECE, &[]), []);
        let end = 9 * PIECE + 512;
        let data = [
            (5, 6),
            (PIECE - 1, PIECE + 1),
            (7 * PIECE, 8 * PIECE),
            (end - 1, end),
        ];
        let expected = [
            (0, PIECE),
            (PIECE, PIECE),
            (7 * PIECE, PIECE),
            (9 * PIECE, 512),
        ];
        assert_eq!(pieces(end, &data), expected);
    }

    #[test]
    fn the_first_failure_and_a_cancellation_end_it() {
        let size = 1000 * PIECE;
        let all = [(0, size)];
        let done = Mutex::new(0);
        let failed = in_pieces(size, &Job::unattended(), "", look(&all), |piece, _| {
            *done.lock().unwrap() += 1;
            if piece.offset == 10 * PIECE {
                return Err(ImageError::Cancelled { left: "this" });
            }
            Ok(())
        });
        assert!(matches!(
            failed,
            Err(ImageError::Cancelled { left: "this" })
        ));
        assert!(*done.lock().unwrap() < 1000);

        let cancelled = AtomicBool::new(false);
        let progress = |done: u64, total: u64| {
            assert!(done < total);
            cancelled.store(done > size / 2, Ordering::Relaxed);
        };
        let job = Job::new(&progress, &cancelled);
        let ended = in_pieces(size, &job, "that", look(&all), |_, _| Ok(()));
        assert!(matches!(ended, Err(ImageError::Cancelled { left: "that" })));
    }
}
