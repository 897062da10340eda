//! The transmit queue: guest to host (virtio 1.2, 5.1.6.2).

use std::io;

use super::backend::NetBackend;
use super::device::NetStats;
use super::rx::{HEADER, MAX_FRAME, MIN_FRAME};
use crate::virtio::DriverError;
use crate::virtio::ring::{Chain, Outcome, Progress, Ring};

/// Frames sent before others on the device thread get their turn.
const BUDGET: usize = 64;

/// A transmit queue in service.
#[derive(Debug)]
pub(super) struct TxQueue {
    pub(super) ring: Ring,
    chain: Chain,
}

impl TxQueue {
    pub(super) fn new(ring: Ring) -> Self {
        Self {
            chain: ring.new_chain(),
            ring,
        }
    }

    /// Moves frames from the guest to `backend`; unless it is `alive` they are lost.
    ///
    /// # Errors
    /// The backend is gone.
    pub(super) fn send(
        &mut self,
        backend: &mut dyn NetBackend,
        alive: bool,
        stats: &NetStats,
    ) -> io::Result<Progress> {
        let mut gone = None;
        let progress = self.ring.serve(&mut self.chain, BUDGET, |chain| {
            match send_frame(chain, backend, alive, stats) {
                Ok(outcome) => Ok(outcome),
                Err(Stop::Driver(cause)) => Err(cause),
                Err(Stop::Backend(error)) => {
                    gone = Some(error);
                    Ok(Outcome::Later)
                }
            }
        });
        match gone {
            Some(error) => Err(error),
            None => Ok(progress),
        }
    }
}

/// Who ended a round.
enum Stop {
    Driver(DriverError),
    Backend(io::Error),
}

fn send_frame(
    chain: &mut Chain,
    backend: &mut dyn NetBackend,
    alive: bool,
    stats: &NetStats,
) -> Result<Outcome, Stop> {
    let len = chain.readable.bytes();
    if chain.writable.bytes() > 0 {
        return Err(Stop::Driver(DriverError::Chain(
            "a transmit buffer is not readable",
        )));
    }
    if len < HEADER as u64 {
        return Err(Stop::Driver(DriverError::Chain("a frame has no header")));
    }
    let fits = ((HEADER + MIN_FRAME) as u64..=MAX_FRAME as u64).contains(&len);
    if !alive || !fits {
        stats.tx_dropped();
        return Ok(Outcome::Used(0));
    }
    // The kernel checks the header of a frame that it gets, and only it can: the guest may change
    // what lies in its memory at any time.
    if !backend.vnet_header() {
        chain.readable.skip(HEADER);
    }
    if backend
        .send(chain.readable.slices())
        .map_err(Stop::Backend)?
    {
        stats.sent(usize::try_from(len).unwrap_or(0) - HEADER);
        Ok(Outcome::Used(0))
    } else {
        Ok(Outcome::Later)
    }
}
