//! Waiting for events without io_uring.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Some eventfds, nobody of whom needs to read them: each signal wakes once.
#[derive(Debug)]
pub struct Events(Epoll);

impl Events {
    /// # Errors
    /// There are no more files to be had.
    pub fn new(events: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        // Edges come with every write to an eventfd, read or not.
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        for event in events {
            epoll.add(event, EpollEvent::new(edge, 0))?;
        }
        Ok(Self(epoll))
    }

    /// Waits for a signal, at most `timeout`, rounded up to milliseconds.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            let millis = timeout.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
        });
        match self.0.wait(&mut [EpollEvent::empty(); 4], timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
