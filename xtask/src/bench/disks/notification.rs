//! What it costs to tell another thread of something, as a disk tells of ended requests.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use serde::{Deserialize, Serialize};

/// Signals of a measurement.
const COUNT: u32 = 20_000;

/// Costs of a signal through an eventfd, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Notification {
    /// Of sending one that nobody sleeps for.
    pub send: f64,
    /// From sending one until a thread that slept has it.
    pub wake: f64,
}

impl Notification {
    /// Measures them here.
    ///
    /// # Errors
    /// There are no more files or threads to be had.
    pub fn measure() -> Result<Self> {
        let lonely = EventFd::new()?;
        let started = Instant::now();
        for _ in 0..COUNT {
            lonely.write(1)?;
        }
        let send = micros(started);

        let (ping, pong) = (Arc::new(EventFd::new()?), Arc::new(EventFd::new()?));
        let (heard, answer) = (Arc::clone(&ping), Arc::clone(&pong));
        let started = Instant::now();
        let other = thread::spawn(move || -> nix::Result<()> {
            for _ in 0..COUNT {
                wait(&heard)?;
                answer.write(1)?;
            }
            Ok(())
        });
        for _ in 0..COUNT {
            ping.write(1)?;
            wait(&pong)?;
        }
        // There and back.
        let wake = micros(started) / 2.0;
        let answered = other.join().map_err(|_| anyhow!("A thread panicked"))?;
        answered?;
        Ok(Self { send, wake })
    }
}

/// Sleeps until the event is signalled.
fn wait(event: &EventFd) -> nix::Result<()> {
    poll(
        &mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    )?;
    event.read().map(drop)
}

fn micros(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e6 / f64::from(COUNT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn waking_costs_more_than_sending() {
        let cost = Notification::measure().unwrap();
        assert!(cost.send > 0.0 && cost.wake > cost.send, "{cost:?}");
    }
}
