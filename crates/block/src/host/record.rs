//! What is done to files, in order, so that tests can replay what a power failure leaves of it.

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

/// What was done to some files, in order; which of them is up to who records.
#[derive(Debug, Default)]
pub struct Recorder {
    events: Mutex<Vec<(usize, Event)>>,
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

    /// All events.
    pub fn take(&self) -> Vec<(usize, Event)> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut events)
    }
}

impl Recording {
    /// [`Recorder::note`] for this file.
    pub fn note(&self, event: Event) -> usize {
        self.recorder.note(self.file, event)
    }
}
