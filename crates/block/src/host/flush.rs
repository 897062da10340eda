//! Which changes still have to be made durable.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::BlockError;

/// Whether a disk has changes that are not yet durable.
#[derive(Debug, Default)]
pub struct Unflushed {
    changed: AtomicBool,
    /// Held from taking `changed` until the changes are durable: another flush that finds nothing
    /// left to do must not end before them.
    flushing: Mutex<()>,
}

impl Unflushed {
    /// Notes a change. To be called once it is done, not before: a flush that runs meanwhile may
    /// come too early for the change, and must not take the note away.
    pub fn note(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Has `sync` make all changes durable that were noted before, if there are any.
    pub fn flush(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<(), BlockError> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.changed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        sync().map_err(|source| {
            self.note();
            BlockError::Flush(source)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flush_waits_for_the_one_under_way() {
        let unflushed = Unflushed::default();
        unflushed.note();
        let (started, wait_start) = mpsc::channel();
        let (release, blocked) = mpsc::channel::<()>();
        let (done, wait_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let unflushed = &unflushed;
            // Dropped here if the test fails, which frees the thread that waits for it.
            let release = release;
            scope.spawn(move || {
                let sync = || {
                    started.send(()).unwrap();
                    blocked.recv().unwrap();
                    Ok(())
                };
                unflushed.flush(sync).unwrap();
            });
            wait_start.recv().unwrap();
            scope.spawn(move || {
                unflushed.flush(|| unreachable!()).unwrap();
                done.send(()).unwrap();
            });
            wait_done
                .recv_timeout(Duration::from_millis(100))
                .unwrap_err();
            release.send(()).unwrap();
            wait_done.recv().unwrap();
        });
    }

    #[test]
    fn a_failed_flush_leaves_its_changes_to_the_next() {
        let unflushed = Unflushed::default();
        unflushed.note();
        unflushed
            .flush(|| Err(io::ErrorKind::Other.into()))
            .unwrap_err();
        let mut synced = false;
        let sync = || {
            synced = true;
            Ok(())
        };
        unflushed.flush(sync).unwrap();
        assert!(synced);
    }
}
