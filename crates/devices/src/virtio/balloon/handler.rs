//! The queues, on the device thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use zerocopy::FromBytes;

use super::device::Shared;
use super::discard::{Discard, PAGE};
use super::stats::{GuestMemoryStats, Stat};
use crate::GuestMemory;
use crate::bus::lock;
use crate::virtio::ring::{Chain, Outcome, Ring};
use crate::virtio::{ActiveQueue, DriverError};

/// Chains served before others on the device thread get their turn.
const BUDGET: usize = 4;

/// Most pages that one chain may name. Linux names 256.
const MAX_PAGES: u64 = 4096;

/// Most bytes of statistics in a chain: a few times what the standard knows.
const MAX_STATS: u64 = 1024;

/// Tells the events of a handler apart; queues have their own number.
const STATS_WANTED: u32 = u32::MAX;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Report,
}

#[derive(Debug)]
struct Served {
    role: Role,
    ring: Ring,
    chain: Chain,
}

/// Serves all queues that the driver enabled.
#[derive(Debug)]
pub(super) struct Handler {
    queues: Vec<Served>,
    pages: Pages,
    shared: Arc<Shared>,
}

impl Handler {
    pub(super) fn new(memory: Arc<GuestMemory>, shared: Arc<Shared>) -> Self {
        Self {
            queues: Vec::new(),
            pages: Pages {
                discard: Discard::of(&memory),
                memory,
            },
            shared,
        }
    }

    pub(super) fn add(&mut self, role: Role, ring: Ring) {
        let chain = ring.new_chain();
        self.queues.push(Served { role, ring, chain });
    }

    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        let rings = self.queues.into_iter();
        rings.map(|served| served.ring.into_queue()).collect()
    }

    fn serve(&mut self, index: usize) {
        let Self {
            queues,
            pages,
            shared,
        } = self;
        let Some(Served { role, ring, chain }) = queues.get_mut(index) else {
            return;
        };
        ring.serve(chain, BUDGET, |chain| match role {
            Role::Inflate => {
                let bytes = pages.inflate(chain)?;
                shared.inflated.fetch_add(bytes, Ordering::Relaxed);
                Ok(Outcome::Used(0))
            }
            // A page comes back when it is touched.
            Role::Deflate => Ok(Outcome::Used(0)),
            Role::Stats => take_stats(chain, shared),
            Role::Report => {
                let bytes = pages.report(chain, shared)?;
                shared.reported.fetch_add(bytes, Ordering::Relaxed);
                Ok(Outcome::Used(0))
            }
        });
    }

    fn watch(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        // Edges come with every write to an eventfd, read or not, so kicks are never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (index, served) in (0..).zip(&self.queues) {
            ops.add(Events::with_data(&**served.ring.kick(), index, edge))?;
        }
        ops.add(Events::with_data(
            &self.shared.stats_wanted,
            STATS_WANTED,
            edge,
        ))
    }
}

impl MutEventSubscriber for Handler {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch(ops) {
            tracing::error!(%error, "Cannot poll the balloon's queues");
        }
        (0..self.queues.len()).for_each(|index| self.serve(index));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == STATS_WANTED {
            let stats = |served: &Served| served.role == Role::Stats;
            if let Some(index) = self.queues.iter().position(stats) {
                self.serve(index);
            }
        } else {
            self.serve(usize::try_from(events.data()).unwrap_or(usize::MAX));
        }
    }
}

/// Statistics wait in their buffer until somebody wants newer ones; the driver then fills it again.
fn take_stats(chain: &mut Chain, shared: &Shared) -> Result<Outcome, DriverError> {
    if shared.renew.swap(false, Ordering::AcqRel) {
        return Ok(Outcome::Used(0));
    }
    if chain.readable.bytes() > MAX_STATS {
        return Err(DriverError::Chain("there are too many statistics"));
    }
    let mut stats = GuestMemoryStats::default();
    let mut bytes = [0; size_of::<Stat>()];
    while chain.readable.copy_out(&mut bytes) == bytes.len() {
        if let Ok(stat) = Stat::read_from_bytes(&bytes) {
            stats.take(stat);
        }
    }
    let mut told = lock(&shared.stats);
    told.stats = stats;
    told.generation += 1;
    Ok(Outcome::Later)
}

/// Gives pages back.
#[derive(Debug)]
struct Pages {
    memory: Arc<GuestMemory>,
    discard: Discard,
}

impl Pages {
    /// Gives back the pages whose numbers are in `chain`. Returns their bytes.
    fn inflate(&self, chain: &mut Chain) -> Result<u64, DriverError> {
        if chain.readable.bytes() > MAX_PAGES * 4 {
            return Err(DriverError::Chain("there are too many pages in one buffer"));
        }
        let mut total = 0;
        let mut run = Run::default();
        let mut number = [0; 4];
        while chain.readable.copy_out(&mut number) == number.len() {
            let page = u64::from(u32::from_le_bytes(number));
            if !run.take(page) {
                total += self.give_back(&run);
                run = Run::of(page);
            }
        }
        Ok(total + self.give_back(&run))
    }

    fn give_back(&self, run: &Run) -> u64 {
        let address = run.first.saturating_mul(PAGE as u64);
        let len = usize::try_from(run.count).unwrap_or(0) * PAGE;
        // A driver may name pages that are no memory. That is its own affair.
        match self.memory.get_slice(GuestAddress(address), len) {
            Ok(slice) if len > 0 => self.discard.pages(&slice),
            _ => 0,
        }
    }

    /// Gives back the pages that are the buffers of `chain`. Returns their bytes.
    fn report(&self, chain: &Chain, shared: &Shared) -> Result<u64, DriverError> {
        if chain.readable.bytes() > 0 {
            return Err(DriverError::Chain("a free page is not writable"));
        }
        // The guest relies on what it has filled them with.
        if shared.poison.load(Ordering::Acquire) != 0 {
            return Ok(0);
        }
        let slices = chain.writable.slices().iter();
        Ok(slices.map(|slice| self.discard.pages(slice)).sum())
    }
}

/// Pages side by side, however they were named: up or down.
#[derive(Debug, Default)]
struct Run {
    first: u64,
    count: u64,
}

impl Run {
    fn of(page: u64) -> Self {
        Self {
            first: page,
            count: 1,
        }
    }

    /// Adds a page if it is beside the others.
    fn take(&mut self, page: u64) -> bool {
        if self.count == 0 {
            *self = Self::of(page);
            return true;
        }
        let after = page == self.first + self.count;
        let before = page.checked_add(1) == Some(self.first);
        if before {
            self.first = page;
        }
        self.count += u64::from(after || before);
        after || before
    }
}
