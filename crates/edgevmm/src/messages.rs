//! The way to standard error.
//!
//! Whoever reads there may stop reading: a pipe is full then, or a terminal halted by Ctrl-S.
//! vCPUs and devices have messages too, and must not wait for that. So while a machine runs in this
//! process messages go through a queue of bounded length to a thread that does wait. Messages that
//! don't fit are counted and lost.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::term::{self, Stream};

/// Bytes of messages that may wait.
const CAPACITY: usize = 64 << 10;
/// The thread only copies.
const STACK: usize = 64 << 10;
/// How long the last messages may take to go out.
const FAREWELL: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Has no message wait for its reader from now on.
///
/// # Errors
///
/// When there is no standard error or no thread can be started.
pub fn go_to_background() -> io::Result<()> {
    let stderr = Stream::stderr()?;
    let queue = QUEUE.get_or_init(Queue::default);
    std::thread::Builder::new()
        .name("messages".into())
        .stack_size(STACK)
        .spawn(move || {
            edgevmm_sandbox::enter(edgevmm_sandbox::Kind::Copy);
            queue.copy_to(stderr);
        })?;
    // A panic ends the process, and what led to it would be lost.
    let earlier = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        flush();
        earlier(panic);
    }));
    Ok(())
}

/// Writes a message, or some lines of them.
///
/// # Errors
///
/// When standard error refuses, unless it is written to in the background.
pub fn write(message: &[u8]) -> io::Result<()> {
    match QUEUE.get() {
        Some(queue) => {
            queue.push(message);
            Ok(())
        }
        None => io::stderr().write_all(message),
    }
}

/// Lets the last messages go out, unless nobody takes them.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FAREWELL);
    }
}

/// Messages on their way to the thread that writes them.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    text: Vec<u8>,
    /// Messages that did not fit after `text`.
    lost: u64,
    /// Whether all that was taken is written.
    idle: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.text.is_empty() && self.lost == 0
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, message: &[u8]) {
        let mut state = self.state();
        // Once one is lost the following ones are too, so that the gap is in one place.
        if state.lost > 0 || message.len() > CAPACITY.saturating_sub(state.text.len()) {
            state.lost = state.lost.saturating_add(1);
        } else {
            state.text.extend_from_slice(message);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for messages and moves them to `text`, which is empty. Returns how many were lost
    /// after them.
    fn take(&self, text: &mut Vec<u8>) -> u64 {
        let mut state = self.state();
        state.idle = true;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |state| state.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.idle = false;
        std::mem::swap(text, &mut state.text);
        std::mem::take(&mut state.lost)
    }

    fn copy_to(&self, mut target: impl Write) {
        let mut text = Vec::new();
        loop {
            let lost = self.take(&mut text);
            if lost > 0 {
                let note = format!("[{lost} messages were lost here, as nobody read them]\n");
                text.extend_from_slice(&term::end_lines(note.as_bytes()));
            }
            // Whoever read them may be gone, and the machine goes on without.
            let _ = target.write_all(&text);
            text.clear();
        }
    }

    fn flush(&self, limit: Duration) {
        let pending = |state: &mut State| !(state.idle && state.is_empty());
        let _ = self
            .changed
            .wait_timeout_while(self.state(), limit, pending);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{BufRead, BufReader};
    use std::time::Instant;

    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_that_sleeps() {
        let (reader, writer) = io::pipe().unwrap();
        let queue: &Queue = Box::leak(Box::default());
        std::thread::spawn(move || queue.copy_to(writer));
        // More than the pipe and the queue hold, and the buffer between them.
        for number in 0..1000 {
            queue.push(format!("{number:01023}\n").as_bytes());
        }
        let start = Instant::now();
        queue.flush(Duration::from_millis(50));
        assert!(start.elapsed() < Duration::from_secs(10));

        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let (mut next, mut lost) = (0, 0);
        while next < 1000 {
            let line = lines.next().unwrap();
            if let Some(note) = line.strip_prefix('[') {
                let count: usize = note.split(' ').next().unwrap().parse().unwrap();
                (next, lost) = (next + count, lost + count);
            } else {
                assert_eq!(line.parse::<usize>().unwrap(), next);
                next += 1;
            }
        }
        assert_eq!(next, 1000);
        assert!(lost > 0);
        queue.push(b"later\n");
        assert_eq!(lines.next().unwrap(), "later");
    }

    #[test]
    fn a_flush_waits_for_what_is_being_written() {
        struct Slow(std::sync::mpsc::Sender<Vec<u8>>);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_millis(50));
                self.0.send(bytes.to_vec()).unwrap();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, written) = std::sync::mpsc::channel();
        let queue: &Queue = Box::leak(Box::default());
        std::thread::spawn(move || queue.copy_to(Slow(sender)));
        queue.push(b"last");
        queue.flush(Duration::from_secs(10));
        assert_eq!(written.try_recv().unwrap(), b"last");
    }
}
