//! The thread of one queue.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use edgevmm_sandbox::{Kind, enter, threads};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::server::{Server, Setup};
use crate::disk::STACK_SIZE;
use crate::virtio::ActiveQueue;
use crate::virtio::ring::{Halt, Ring};

/// A thread that serves a queue until told to stop.
#[derive(Debug)]
pub(super) struct Worker {
    thread: JoinHandle<Stopped>,
    wake: Arc<EventFd>,
}

/// A queue out of service.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) queue: ActiveQueue,
    /// Heads of the chains that were taken and not done.
    pub(super) kept: Vec<u16>,
}

impl Worker {
    /// Starts a thread called `name` for `ring`. It begins with the chains of `kept`.
    ///
    /// # Errors
    /// There are no more threads or files to be had.
    pub(super) fn start(
        name: String,
        ring: Ring,
        setup: Setup,
        kept: Vec<u16>,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let woken = Arc::clone(&wake);
        let (report, started) = sync_channel(1);
        let thread = threads::spawn(name, STACK_SIZE, move || {
            // An io_uring belongs to the thread that makes it.
            match Server::new(ring, setup, &woken) {
                Ok(server) => {
                    enter(Kind::Disk);
                    let _ = report.send(Ok(()));
                    server.run(&kept)
                }
                Err((error, ring)) => {
                    let _ = report.send(Err(error));
                    let queue = ring.into_queue();
                    Stopped { queue, kept }
                }
            }
        })?;
        match started.recv() {
            Ok(Ok(())) => Ok(Self { thread, wake }),
            Ok(Err(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Has the thread look at what has changed.
    pub(super) fn waker(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }

    /// Waits for the requests in flight, ends the thread and returns the queue. The queues'
    /// [`Halt`] must be set.
    pub(super) fn stop(self, halt: &Halt) -> Option<Stopped> {
        debug_assert!(halt.is_set());
        // A counter this small can't be full.
        let _ = self.wake.write(1);
        self.thread.join().ok()
    }
}
