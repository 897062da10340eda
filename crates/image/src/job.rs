//! Long work: what it tells of itself, and how it is told to stop.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ImageError;

/// Whoever has long work done: hears how far it is, and may want it no more.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    progress: &'a (dyn Fn(u64, u64) + Sync),
    cancelled: &'a AtomicBool,
}

impl fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("cancelled", self.cancelled)
            .finish_non_exhaustive()
    }
}

impl<'a> Job<'a> {
    /// `progress` is called from several threads, with how many bytes of how many are done. Once
    /// `cancelled` is true the work ends with [`ImageError::Cancelled`].
    pub fn new(progress: &'a (dyn Fn(u64, u64) + Sync), cancelled: &'a AtomicBool) -> Self {
        Self {
            progress,
            cancelled,
        }
    }

    /// A job that nobody watches.
    #[must_use]
    pub const fn unattended() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self {
            progress: &|_, _| {},
            cancelled: &NEVER,
        }
    }

    /// Fails once the job is cancelled; `left` says what that leaves behind.
    pub(crate) fn check(&self, left: &'static str) -> Result<(), ImageError> {
        if self.cancelled.load(Ordering::Relaxed) {
            Err(ImageError::Cancelled { left })
        } else {
            Ok(())
        }
    }

    /// Tells how far it is.
    pub(crate) fn report(&self, done: u64, total: u64) {
        (self.progress)(done, total);
    }
}
