//! What is done to files, in order, so that tests can replay what a power failure leaves of it.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Something done to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// Which.
        data: Vec<u8>,
    },
    /// A range was zeroed or its space given back.
    Zero {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The file was cut or made longer.
    SetLen(u64),
    /// What was done before is being made durable.
    SyncBegins,
    /// What was done before the event with this number is durable.
    SyncEnds(usize),
    /// Nothing; for tests to know when something else happened.
    Mark,
}

/// What was done to some files, in order; which of them is up to who records. It can have them fail,
/// too.
#[derive(Debug)]
pub struct Recorder {
    events: Mutex<Vec<(usize, Event)>>,
    /// How many reads, writes and changes succeed before the first one fails.
    left: AtomicI64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            events: Mutex::default(),
            left: i64::MAX.into(),
        }
    }
}

/// Which recorder a file has, and its number there.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Where to.
    pub recorder: Arc<Recorder>,
    /// Which file it is.
    pub file: usize,
}

impl Recorder {
    /// Notes what is done: once it is, but for the beginning of a sync. Returns its number.
    pub fn note(&self, file: usize, event: Event) -> usize {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push((file, event));
        events.len() - 1
    }

    /// Has all requests but syncs fail after the next `count`, until told otherwise.
    pub fn fail_after(&self, count: i64) {
        self.left.store(count, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
            Ok(())
        } else {
            Err(io::ErrorKind::StorageFull.into())
        }
    }

    /// All events.
    pub fn take(&self) -> Vec<(usize, Event)> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut events)
    }
}

impl Recording {
    /// Fails if the next request is to fail.
    pub fn check(&self) -> io::Result<()> {
        self.recorder.check()
    }

    /// [`Recorder::note`] for this file.
    pub fn note(&self, event: Event) -> usize {
        self.recorder.note(self.file, event)
    }
}
