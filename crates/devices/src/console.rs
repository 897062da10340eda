//! The host end of a console, shared by the 16550 and virtio-console.
//!
//! Output is pushed into a [`ConsoleSink`], which must take or drop bytes at once: a guest that
//! prints must never stall a vCPU or the device thread. Input waits in a [`ConsoleInput`], a small
//! bounded queue that the device empties at the guest's pace; whoever feeds it is told how much
//! was accepted, so a paste larger than the queue is slowed and not lost.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where a console's output goes.
pub trait ConsoleSink: Send + Sync + Debug {
    /// Takes `bytes` that the guest printed. Never blocks; what can't be taken now is lost.
    fn write(&self, bytes: &[u8]);
}

#[derive(Debug)]
struct InputState {
    bytes: VecDeque<u8>,
    /// A push was cut short; whoever pushes waits for room.
    refused: bool,
}

/// Bytes typed on the host that the guest has not read yet.
#[derive(Debug)]
pub struct ConsoleInput {
    state: Mutex<InputState>,
    event: EventFd,
    room: EventFd,
}

impl ConsoleInput {
    /// Bytes that wait at most.
    pub const CAPACITY: usize = 4096;

    /// An empty queue.
    ///
    /// # Errors
    /// Fails when the process may open no more files.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(InputState {
                bytes: VecDeque::with_capacity(Self::CAPACITY),
                refused: false,
            }),
            event: EventFd::new(EFD_NONBLOCK)?,
            room: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Appends as much of `bytes` as fits and returns how many those were.
    ///
    /// Push the rest when [`ConsoleInput::room`] is signalled.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let accepted = bytes.len().min(Self::CAPACITY - state.bytes.len());
        state.bytes.extend(bytes.iter().take(accepted));
        state.refused = accepted < bytes.len();
        drop(state);
        if accepted > 0 {
            // An eventfd refuses only when its counter is full, which signals as well.
            let _ = self.event.write(1);
        }
        accepted
    }

    /// Takes up to `buffer.len()` bytes, the oldest first, and returns how many.
    pub fn pop(&self, buffer: &mut [u8]) -> usize {
        let mut state = self.lock();
        let count = buffer.len().min(state.bytes.len());
        for (slot, byte) in buffer.iter_mut().zip(state.bytes.drain(..count)) {
            *slot = byte;
        }
        let tell = count > 0 && state.refused;
        if tell {
            state.refused = false;
        }
        drop(state);
        if tell {
            let _ = self.room.write(1);
        }
        count
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    /// Signalled by every push that appends something. The reader of the queue resets it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Signalled once there is room again after a push was cut short. The feeder resets it.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    fn lock(&self) -> MutexGuard<'_, InputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn bytes_come_out_in_order() {
        let input = ConsoleInput::new().unwrap();
        assert!(input.event().read().is_err(), "nothing typed yet");
        assert_eq!(input.push(b"login"), 5);
        assert_eq!(input.event().read().unwrap(), 1);
        let mut buffer = [0; 3];
        assert_eq!(input.pop(&mut buffer), 3);
        assert_eq!(&buffer, b"log");
        assert_eq!(input.pop(&mut buffer), 2);
        assert_eq!(&buffer[..2], b"in");
        assert!(input.is_empty());
        assert_eq!(input.pop(&mut buffer), 0);
    }

    #[test]
    fn a_full_queue_refuses_and_tells_of_room() {
        let input = ConsoleInput::new().unwrap();
        let paste = [b'x'; ConsoleInput::CAPACITY + 10];
        assert_eq!(input.push(&paste), ConsoleInput::CAPACITY);
        assert_eq!(input.push(b"more"), 0);
        assert!(input.room().read().is_err());
        assert_eq!(input.pop(&mut [0; 7]), 7);
        assert_eq!(input.room().read().unwrap(), 1);
        assert_eq!(input.pop(&mut [0; 1]), 1);
        assert!(input.room().read().is_err(), "nobody waits any more");
        assert_eq!(input.push(b"more"), 4);
    }
}
