//! A request broken down to files of the host, to be done there by whoever asked.

use std::sync::Arc;

use crate::host::{HostFile, Unflushed};
use crate::in_flight::Pin;

/// Most pieces of a plan; a request of more is done without one.
pub const MAX_PIECES: usize = 8;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Fills memory from the disk.
    Read,
    /// Puts memory on the disk.
    Write,
}

/// A part of a request, in the request's order.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The file to read or write; none if the part reads as zeroes.
    pub file: Option<Arc<HostFile>>,
    /// Where in the file the part begins, in bytes.
    pub offset: u64,
    /// Bytes in the part.
    pub len: u64,
}

/// How to do a request. Reused from request to request, so that none allocates.
#[derive(Debug, Default)]
pub struct Plan {
    pieces: [Option<Piece>; MAX_PIECES],
    count: usize,
    pin: Pin,
    changes: Option<Arc<Unflushed>>,
}

impl Plan {
    /// The parts, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().take(self.count).flatten()
    }

    /// Adds a part. Returns whether there was room.
    pub fn push(&mut self, piece: Piece) -> bool {
        let Some(free) = self.pieces.get_mut(self.count) else {
            return false;
        };
        *free = Some(piece);
        self.count += 1;
        true
    }

    /// Whether a part of it bypasses the host's page cache, so that doing it takes as long as the
    /// disk does.
    pub fn waits_for_disk(&self) -> bool {
        let direct = |piece: &Piece| piece.file.as_ref().is_some_and(|file| file.is_direct());
        self.pieces().any(direct)
    }

    /// Keeps `pin` until the request has ended.
    pub fn hold(&mut self, pin: Pin) {
        self.pin = pin;
    }

    /// Has `changes` noted once the request has ended, however it ended.
    pub fn note_changes(&mut self, changes: Arc<Unflushed>) {
        self.changes = Some(changes);
    }

    /// Forgets the request, which has ended or was never begun.
    pub fn end(&mut self) {
        if let Some(changes) = self.changes.take() {
            changes.note();
        }
        self.pieces.fill_with(Default::default);
        self.count = 0;
        self.pin = Pin::default();
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        self.end();
    }
}
