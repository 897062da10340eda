//! Requests under way, so that space they use is not given to others meanwhile.
//!
//! A request looks up where a range is and then reads or writes there, with no lock held, perhaps
//! in the kernel. A discard meanwhile may free that very space. So freed space rests until every
//! request has ended that began before it was freed. Requests count themselves into one of two
//! generations; [`InFlight::turn`] lets new ones into the other, and once the first is empty, all
//! that was freed before the turn is free indeed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the requests of one image in two generations.
#[derive(Debug, Default)]
pub struct InFlight {
    /// The generation that requests join: its lowest bit counts.
    current: AtomicUsize,
    generations: [AtomicUsize; 2],
}

/// A request in its generation, until dropped. One by default is in none.
#[derive(Debug, Default)]
pub struct Pin {
    joined: Option<(Arc<InFlight>, usize)>,
}

impl InFlight {
    /// Counts a request that begins.
    pub fn join(self: &Arc<Self>) -> Pin {
        loop {
            let current = self.current.load(Ordering::SeqCst);
            self.generations[current & 1].fetch_add(1, Ordering::SeqCst);
            // A turn in between may have found the generation empty already.
            if self.current.load(Ordering::SeqCst) == current {
                return Pin {
                    joined: Some((Arc::clone(self), current & 1)),
                };
            }
            self.generations[current & 1].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Lets new requests into the other generation, if that one is empty. Returns whether it did;
    /// then all requests that had begun before the previous successful turn have ended.
    ///
    /// Calls must not overlap: callers hold the image's lock.
    pub fn turn(&self) -> bool {
        let current = self.current.load(Ordering::SeqCst);
        if self.generations[(current + 1) & 1].load(Ordering::SeqCst) != 0 {
            return false;
        }
        self.current
            .store(current.wrapping_add(1), Ordering::SeqCst);
        true
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some((counts, generation)) = &self.joined {
            counts.generations[*generation].fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_waits_for_the_generation_before() {
        let counts = Arc::new(InFlight::default());
        let old = counts.join();
        assert!(counts.turn(), "nobody is in the other generation");
        let new = counts.join();
        assert!(!counts.turn(), "the old request has not ended");
        drop(old);
        assert!(counts.turn());
        assert!(!counts.turn(), "the new request has not ended");
        drop(new);
        assert!(counts.turn());
    }
}
