//! The host end of a named port: a two-way stream of bytes between somebody in the guest and
//! somebody on the host.
//!
//! A [`Channel`] holds at most [`Channel::CAPACITY`] bytes each way. The guest's bytes wait in the
//! guest when the host does not read them; while the host's end is closed they are lost, so nobody
//! in the guest waits for somebody who is not there. The host's bytes are taken only while the
//! guest has its end open.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::sync::{Mutex, MutexGuard};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::lock;

/// Hears of what the guest does with a channel.
pub trait ChannelWatcher: Send + Sync + Debug {
    /// There is something to read, room again for what did not fit, or the guest opened or closed
    /// its end. Called on the device thread; must not block.
    fn changed(&self);
}

#[derive(Debug, Default)]
struct State {
    host_open: bool,
    guest_open: bool,
    /// Times that the guest has opened its end.
    openings: u64,
    to_host: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    /// The device has more output than fitted.
    output_waits: bool,
    /// The host has more input than fitted.
    input_waits: bool,
}

/// A named channel. [`Channel::output`], [`Channel::input`], [`Channel::set_guest_open`],
/// [`Channel::is_open`] and [`Channel::event`] are for its device, the others for the host; all may
/// be called from any thread.
#[derive(Debug)]
pub struct Channel {
    name: String,
    state: Mutex<State>,
    event: EventFd,
    watcher: Box<dyn ChannelWatcher>,
}

impl Channel {
    /// Bytes that wait at most in each direction.
    pub const CAPACITY: usize = 64 << 10;

    /// A channel whose both ends are closed.
    ///
    /// # Errors
    /// Fails when the process may open no more files.
    pub fn new(name: impl Into<String>, watcher: Box<dyn ChannelWatcher>) -> io::Result<Self> {
        Ok(Self {
            name: name.into(),
            state: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
            watcher,
        })
    }

    /// The name that the guest finds it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens or closes the host's end, of which the guest is told. What was not read is lost.
    pub fn set_open(&self, open: bool) {
        let mut state = self.lock();
        state.host_open = open;
        state.output_waits = false;
        state.to_host = VecDeque::new();
        drop(state);
        self.tell_device();
    }

    /// The number of the guest's opening while its end is open; none while it is closed.
    pub fn guest(&self) -> Option<u64> {
        let state = self.lock();
        state.guest_open.then_some(state.openings)
    }

    /// Appends as much of `bytes` as the guest's end takes now and returns how many those were.
    ///
    /// The watcher hears when it is worth pushing the rest.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let room = Self::CAPACITY.saturating_sub(state.to_guest.len());
        let accepted = if state.guest_open {
            bytes.len().min(room)
        } else {
            0
        };
        state
            .to_guest
            .extend(bytes.get(..accepted).unwrap_or_default());
        state.input_waits = accepted < bytes.len();
        drop(state);
        if accepted > 0 {
            self.tell_device();
        }
        accepted
    }

    /// Takes up to `buffer.len()` bytes of the guest's, the oldest first, and returns how many.
    pub fn pop(&self, buffer: &mut [u8]) -> usize {
        let mut state = self.lock();
        let count = take(&mut state.to_host, buffer);
        let tell = count > 0 && std::mem::take(&mut state.output_waits);
        drop(state);
        if tell {
            self.tell_device();
        }
        count
    }

    /// Whether the host's end is open.
    pub fn is_open(&self) -> bool {
        self.lock().host_open
    }

    /// Takes what the guest wrote, as far as there is room, and returns how much that was. All of
    /// it while the host's end is closed: then it is lost.
    pub fn output(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        if !state.host_open {
            return bytes.len();
        }
        let room = Self::CAPACITY.saturating_sub(state.to_host.len());
        let accepted = bytes.len().min(room);
        let first = state.to_host.is_empty() && accepted > 0;
        state
            .to_host
            .extend(bytes.get(..accepted).unwrap_or_default());
        state.output_waits = accepted < bytes.len();
        drop(state);
        if first {
            self.watcher.changed();
        }
        accepted
    }

    /// Takes up to `buffer.len()` bytes for the guest, the oldest first, and returns how many.
    pub fn input(&self, buffer: &mut [u8]) -> usize {
        let mut state = self.lock();
        let count = take(&mut state.to_guest, buffer);
        let tell = count > 0 && std::mem::take(&mut state.input_waits);
        drop(state);
        if tell {
            self.watcher.changed();
        }
        count
    }

    /// The guest opened or closed its end; what it did not read is lost.
    pub fn set_guest_open(&self, open: bool) {
        let mut state = self.lock();
        if !open && !state.guest_open {
            return;
        }
        state.guest_open = open;
        state.openings = state.openings.wrapping_add(u64::from(open));
        state.to_guest = VecDeque::new();
        state.input_waits = false;
        drop(state);
        self.watcher.changed();
    }

    /// Signalled when the host has input, has made room or has opened or closed its end.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn tell_device(&self) {
        // An eventfd refuses only when its counter is full, which signals as well.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn take(queue: &mut VecDeque<u8>, buffer: &mut [u8]) -> usize {
    let count = buffer.len().min(queue.len());
    let (front, back) = queue.as_slices();
    let first = count.min(front.len());
    let (start, rest) = buffer.split_at_mut(first);
    for (to, from) in [(start, front), (rest, back)] {
        let len = to.len().min(from.len());
        if let (Some(to), Some(from)) = (to.get_mut(..len), from.get(..len)) {
            to.copy_from_slice(from);
        }
    }
    queue.drain(..count);
    count
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Count(Arc<AtomicU32>);

    impl ChannelWatcher for Count {
        fn changed(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn channel() -> (Channel, Arc<AtomicU32>) {
        let count = Count::default();
        let changes = count.0.clone();
        (Channel::new("a", Box::new(count)).unwrap(), changes)
    }

    #[test]
    fn a_closed_host_loses_what_the_guest_says() {
        let (channel, changes) = channel();
        let much = [7; Channel::CAPACITY + 1];
        assert_eq!(channel.output(&much), much.len());
        channel.set_open(true);
        assert_eq!(channel.pop(&mut [0; 8]), 0);
        assert_eq!(channel.output(b"heard"), 5);
        channel.set_open(false);
        channel.set_open(true);
        assert_eq!(
            channel.pop(&mut [0; 8]),
            0,
            "the next listener hears nothing old"
        );
        assert_eq!(changes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_full_channel_holds_the_guest_back() {
        let (channel, changes) = channel();
        channel.set_open(true);
        let _ = channel.event().read();
        let much = [7; Channel::CAPACITY + 1];
        assert_eq!(channel.output(&much), Channel::CAPACITY);
        assert_eq!(channel.output(b"x"), 0);
        assert_eq!(changes.load(Ordering::Relaxed), 1, "told once");
        assert!(channel.event().read().is_err());
        assert_eq!(channel.pop(&mut [0; 3]), 3);
        assert_eq!(channel.event().read().unwrap(), 1, "there is room");
        assert_eq!(channel.pop(&mut [0; 3]), 3);
        assert!(channel.event().read().is_err(), "nobody waits any more");
    }

    #[test]
    fn input_waits_for_the_guest_to_listen() {
        let (channel, changes) = channel();
        assert_eq!((channel.push(b"early"), channel.guest()), (0, None));
        channel.set_guest_open(false);
        assert_eq!(changes.load(Ordering::Relaxed), 0);
        channel.set_guest_open(true);
        assert_eq!((channel.push(b"now"), channel.guest()), (3, Some(1)));
        let much = [7; Channel::CAPACITY];
        assert_eq!(channel.push(&much), Channel::CAPACITY - 3);
        let mut buffer = [0; 4];
        assert_eq!(channel.input(&mut buffer), 4);
        assert_eq!(&buffer, b"now\x07");
        assert_eq!(changes.load(Ordering::Relaxed), 2, "opened, and room");
        channel.set_guest_open(false);
        channel.set_guest_open(true);
        assert_eq!((channel.input(&mut buffer), channel.guest()), (0, Some(2)));
    }
}
