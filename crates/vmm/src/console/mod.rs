//! The console between the guest's device and any number of host ends.
//!
//! The guest's output goes into one ring that keeps the newest bytes; each reader follows it at
//! its own pace from its own position. A reader that falls behind by more than the ring loses
//! the oldest bytes and is told how many: the guest is never slowed and memory is bounded.

pub mod ends;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use edgevmm_devices::console::{ConsoleInput, ConsoleSink};
use tokio::sync::Notify;

/// Bytes of output kept for readers that attach later or fall behind.
pub const HISTORY: usize = 64 << 10;

/// How long a blocking reader that was woken lets more output gather before it looks again: the
/// first byte goes out at once, and a guest that prints byte by byte costs a wakeup per line or so.
const GATHER: Duration = Duration::from_millis(2);

#[derive(Debug)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever printed: the position just after the newest.
    end: u64,
    closed: bool,
    /// Blocking readers that sleep.
    sleepers: u32,
}

impl Ring {
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Copies what there is from `position` on.
    fn read(&self, position: &mut u64, live_from: u64, buffer: &mut [u8]) -> Chunk {
        let from = (*position).clamp(self.start(), self.end);
        let dropped = from - *position;
        let skip = usize::try_from(from - self.start()).unwrap_or(usize::MAX);
        // What was there before the reader came and what comes live are told apart.
        let history = from < live_from;
        let limit = if history { live_from - from } else { u64::MAX };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut len = 0;
        for (slot, byte) in buffer
            .iter_mut()
            .take(limit)
            .zip(self.bytes.iter().skip(skip))
        {
            *slot = *byte;
            len += 1;
        }
        *position = from + len as u64;
        Chunk {
            len,
            dropped,
            closed: self.closed && len == 0,
            history,
        }
    }
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes read.
    pub len: usize,
    /// Bytes lost before them, because the reader was too slow.
    pub dropped: u64,
    /// Nothing came and nothing will.
    pub closed: bool,
    /// It was printed before the reader was made.
    pub history: bool,
}

/// The console of one machine.
#[derive(Debug)]
pub struct ConsoleHub {
    ring: Mutex<Ring>,
    woken: Condvar,
    changed: Notify,
    input: Arc<ConsoleInput>,
}

impl ConsoleHub {
    /// A console whose input goes to `input`.
    pub fn new(input: Arc<ConsoleInput>) -> Arc<ConsoleHub> {
        let ring = Ring {
            bytes: VecDeque::new(),
            end: 0,
            closed: false,
            sleepers: 0,
        };
        Arc::new(ConsoleHub {
            ring: Mutex::new(ring),
            woken: Condvar::new(),
            changed: Notify::new(),
            input,
        })
    }

    /// The queue of what is typed.
    pub fn input(&self) -> &Arc<ConsoleInput> {
        &self.input
    }

    /// A reader that begins `history` bytes before the newest, or as far back as is kept.
    pub fn reader(self: &Arc<Self>, history: u64) -> Reader {
        let ring = self.lock();
        let position = ring.end.saturating_sub(history).max(ring.start());
        Reader {
            hub: Arc::clone(self),
            position,
            live_from: ring.end,
            woken: false,
        }
    }

    /// Ends all readers once they have read what is left.
    pub fn close(&self) {
        self.lock().closed = true;
        self.woken.notify_all();
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleSink for ConsoleHub {
    fn write(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        let newest = bytes
            .get(bytes.len().saturating_sub(HISTORY)..)
            .unwrap_or_default();
        let excess = (ring.bytes.len() + newest.len()).saturating_sub(HISTORY);
        ring.bytes.drain(..excess);
        ring.bytes.extend(newest);
        ring.end += bytes.len() as u64;
        let sleepers = std::mem::take(&mut ring.sleepers);
        drop(ring);
        if sleepers > 0 {
            self.woken.notify_all();
        }
        self.changed.notify_waiters();
    }
}

/// Follows a console's output.
#[derive(Debug)]
pub struct Reader {
    hub: Arc<ConsoleHub>,
    position: u64,
    live_from: u64,
    /// Whether the last blocking read had to be woken.
    woken: bool,
}

impl Reader {
    /// Waits for output, on a thread of one's own.
    pub fn read_blocking(&mut self, buffer: &mut [u8]) -> Chunk {
        if std::mem::take(&mut self.woken) {
            std::thread::sleep(GATHER);
        }
        let mut ring = self.hub.lock();
        while ring.end == self.position && !ring.closed {
            ring.sleepers += 1;
            self.woken = true;
            ring = self
                .hub
                .woken
                .wait(ring)
                .unwrap_or_else(PoisonError::into_inner);
        }
        ring.read(&mut self.position, self.live_from, buffer)
    }

    /// Waits for output, on the runtime.
    pub async fn read(&mut self, buffer: &mut [u8]) -> Chunk {
        let hub = Arc::clone(&self.hub);
        loop {
            let changed = hub.changed.notified();
            {
                let ring = hub.lock();
                if ring.end > self.position || ring.closed {
                    return ring.read(&mut self.position, self.live_from, buffer);
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hub() -> Arc<ConsoleHub> {
        ConsoleHub::new(Arc::new(ConsoleInput::new().unwrap()))
    }

    #[test]
    fn readers_see_history_then_live_output() {
        let hub = hub();
        hub.write(b"old");
        let mut reader = hub.reader(2);
        hub.write(b" new");
        let mut buffer = [0; 16];
        let chunk = reader.read_blocking(&mut buffer);
        assert_eq!((&buffer[..chunk.len], chunk.history), (&b"ld"[..], true));
        let chunk = reader.read_blocking(&mut buffer);
        assert_eq!((&buffer[..chunk.len], chunk.history), (&b" new"[..], false));
    }

    #[test]
    fn slow_readers_are_told_what_they_lost() {
        let hub = hub();
        let mut reader = hub.reader(0);
        hub.write(&vec![b'a'; HISTORY]);
        hub.write(b"bcd");
        let mut buffer = [0; 4];
        let chunk = reader.read_blocking(&mut buffer);
        assert_eq!(
            chunk,
            Chunk {
                len: 4,
                dropped: 3,
                closed: false,
                history: false
            }
        );
        hub.write(&vec![b'e'; 3 * HISTORY]);
        let chunk = reader.read_blocking(&mut buffer);
        assert_eq!(
            chunk.dropped,
            HISTORY as u64 - 4 + 2 * HISTORY as u64 + 3 - 3
        );
        assert_eq!(&buffer, b"eeee");
    }

    #[test]
    fn closing_lets_readers_finish() {
        let hub = hub();
        let mut reader = hub.reader(0);
        hub.write(b"bye");
        hub.close();
        let mut buffer = [0; 8];
        assert_eq!(reader.read_blocking(&mut buffer).len, 3);
        assert!(reader.read_blocking(&mut buffer).closed);
    }

    #[test]
    fn a_sleeping_reader_wakes() {
        let hub = hub();
        let mut reader = hub.reader(0);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 8];
            let chunk = reader.read_blocking(&mut buffer);
            buffer[..chunk.len].to_vec()
        });
        std::thread::sleep(Duration::from_millis(20));
        hub.write(b"wake");
        assert_eq!(thread.join().unwrap(), b"wake");
    }
}
