//! The thread of one queue.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::Executor;
use crate::virtio::ActiveQueue;
use crate::virtio::ring::{Halt, Outcome, Ring};

/// Enough for a nested image format; only touched pages cost memory.
const STACK_SIZE: usize = 512 * 1024;

const STOP: u64 = 0;
const KICK: u64 = 1;

/// A thread that serves a queue until told to stop.
#[derive(Debug)]
pub(super) struct Worker {
    thread: JoinHandle<ActiveQueue>,
    stop: Arc<EventFd>,
}

impl Worker {
    /// Starts a thread called `name` for `ring`.
    ///
    /// # Errors
    /// There are no more threads or files to be had.
    pub(super) fn start(name: String, ring: Ring, executor: Executor) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        // Edges come with every write to an eventfd, read or not. Never reading the kick saves
        // a system call per wake-up.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let watch = |event, set, data| {
            epoll.ctl(
                ControlOperation::Add,
                raw(event),
                EpollEvent::new(set, data),
            )
        };
        watch(&stop, EventSet::IN, STOP)?;
        watch(ring.kick(), edge, KICK)?;
        let thread = Builder::new()
            .name(name)
            .stack_size(STACK_SIZE)
            .spawn(move || run(ring, &executor, &epoll))?;
        Ok(Self { thread, stop })
    }

    /// Waits for the request in flight, ends the thread and returns the queue. The queues'
    /// [`Halt`] must be set.
    pub(super) fn stop(self, halt: &Halt) -> Option<ActiveQueue> {
        debug_assert!(halt.is_set());
        // A counter this small can't be full.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn raw(event: &EventFd) -> RawFd {
    event.as_raw_fd()
}

fn run(mut ring: Ring, executor: &Executor, epoll: &Epoll) -> ActiveQueue {
    let mut chain = ring.new_chain();
    let mut events = [EpollEvent::default(); 2];
    loop {
        // Also before the first wait: a queue that was active before may have chains waiting.
        ring.serve_blocking(&mut chain, usize::MAX, |chain| {
            executor.execute(chain).map(Outcome::Used)
        });
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!(%error, "Cannot wait for block requests; the queue stops");
                break;
            }
        };
        if events.iter().take(count).any(|event| event.data() == STOP) {
            break;
        }
    }
    ring.into_queue()
}
