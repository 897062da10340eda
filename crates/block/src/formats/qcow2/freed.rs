//! Clusters that nothing refers to any more, until they can be used again.
//!
//! That is when the file no longer refers to them either, and no request that may have found them
//! before is still under way.

use std::collections::VecDeque;
use std::ops::Range;

use crate::in_flight::InFlight;

/// Runs collected before somebody has to see to them.
const MANY: usize = 4096;

/// What clusters were used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The disk's data.
    Data,
    /// The disk's data, in the external data file, which has no refcounts.
    External,
    /// Tables.
    Table,
}

/// A run of clusters that has lost one reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The clusters.
    pub clusters: Range<u64>,
    /// What they were used for.
    pub kind: Kind,
    /// Their space is to go back to the host.
    pub punch: bool,
}

impl Run {
    /// Clusters that a table was in.
    pub fn table(clusters: Range<u64>) -> Self {
        Self {
            clusters,
            kind: Kind::Table,
            punch: false,
        }
    }
}

/// Clusters on their way from use to being free.
#[derive(Debug, Default)]
pub struct Freed {
    /// The file still refers to these.
    fresh: Vec<Run>,
    /// Requests may still use these; with the turn at which they no longer can.
    resting: VecDeque<(u64, Run)>,
    turns: u64,
}

impl Freed {
    /// Takes a run.
    pub fn push(&mut self, run: Run) {
        match self.fresh.last_mut() {
            Some(last)
                if (last.kind, last.punch) == (run.kind, run.punch)
                    && last.clusters.end == run.clusters.start =>
            {
                last.clusters.end = run.clusters.end;
            }
            _ => self.fresh.push(run),
        }
    }

    /// Whether nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.resting.is_empty()
    }

    /// Whether it is time to write what keeps runs from being used again.
    pub fn is_crowded(&self) -> bool {
        self.fresh.len() >= MANY
    }

    /// Hands out the runs that the file refers to no more once the present state is written.
    pub fn take_fresh(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.fresh)
    }

    /// Takes back what [`Self::take_fresh`] handed out, as the state could not be written.
    pub fn put_back(&mut self, mut runs: Vec<Run>) {
        runs.append(&mut self.fresh);
        self.fresh = runs;
    }

    /// Takes runs that the file refers to no more.
    pub fn rest(&mut self, runs: Vec<Run>) {
        // Requests of now are all gone after two turns.
        let ripe = self.turns + 2;
        self.resting.extend(runs.into_iter().map(|run| (ripe, run)));
    }

    /// Hands out the runs that no request can use any more.
    pub fn ripe(&mut self, in_flight: &InFlight) -> Vec<Run> {
        let mut ripe = Vec::new();
        while let Some((at, _)) = self.resting.front() {
            if *at <= self.turns {
                ripe.extend(self.resting.pop_front().map(|(_, run)| run));
            } else if in_flight.turn() {
                self.turns += 1;
            } else {
                break;
            }
        }
        ripe
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn run(clusters: Range<u64>) -> Run {
        Run::table(clusters)
    }

    #[test]
    fn runs_rest_until_older_requests_have_ended() {
        let in_flight = Arc::new(InFlight::default());
        let mut freed = Freed::default();
        let old = in_flight.join();
        freed.push(run(5..6));
        freed.push(run(6..9));
        freed.push(run(1..2));
        let fresh = freed.take_fresh();
        assert_eq!(fresh, [run(5..9), run(1..2)]);
        freed.push(run(3..4));
        freed.put_back(fresh);
        let fresh = freed.take_fresh();
        assert_eq!(fresh, [run(5..9), run(1..2), run(3..4)]);
        freed.rest(fresh);
        assert_eq!(freed.ripe(&in_flight), []);
        let new = in_flight.join();
        assert_eq!(freed.ripe(&in_flight), []);
        drop(old);
        assert_eq!(
            freed.ripe(&in_flight).len(),
            3,
            "the new one does not matter"
        );
        drop(new);
        assert!(freed.is_empty());
    }
}
