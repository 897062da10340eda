//! The thread of a port that its driver has started.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use edgevmm_sandbox::{Kind, enter, threads};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::drive::Drive;
use super::registers::Registers;
use super::server::Server;
use crate::GuestMemory;
use crate::disk::STACK_SIZE;

/// A thread that serves a port until it is stopped or dropped.
#[derive(Debug)]
pub struct Worker {
    thread: Option<JoinHandle<()>>,
    wake: Arc<EventFd>,
    halt: Arc<AtomicBool>,
}

impl Worker {
    /// Starts a thread for a port with `drive`.
    ///
    /// # Errors
    /// There are no more threads or files to be had.
    pub fn start(
        drive: &Arc<Drive>,
        registers: &Arc<Registers>,
        memory: &Arc<GuestMemory>,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let halt = Arc::new(AtomicBool::new(false));
        let (report, started) = sync_channel(1);
        let (woken, halted) = (Arc::clone(&wake), Arc::clone(&halt));
        let (drive, registers, memory) = (drive.clone(), registers.clone(), memory.clone());
        let name = drive.name().to_owned();
        let thread = threads::spawn(name, STACK_SIZE, move || {
            // An io_uring belongs to the thread that makes it.
            match Server::new(drive, registers, memory, &woken, halted) {
                Ok(server) => {
                    enter(Kind::Disk);
                    let _ = report.send(Ok(()));
                    server.run();
                }
                Err(error) => {
                    let _ = report.send(Err(error));
                }
            }
        })?;
        started.recv().map_err(io::Error::other)??;
        Ok(Self {
            thread: Some(thread),
            wake,
            halt,
        })
    }

    /// Has the thread look at what has changed.
    pub fn wake(&self) {
        // A counter this small can't be full.
        let _ = self.wake.write(1);
    }

    /// What wakes the thread.
    pub fn waker(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }
}

impl Drop for Worker {
    /// Waits until nothing is in flight.
    fn drop(&mut self) {
        self.halt.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
