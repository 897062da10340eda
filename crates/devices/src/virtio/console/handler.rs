//! Both queues of the port, on the device thread.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::console::{ConsoleInput, ConsoleSink};
use crate::virtio::DriverError;
use crate::virtio::ring::{Chain, Outcome, Ring};

/// Chains served before others on the device thread get their turn.
const BUDGET: usize = 16;

/// Bytes of output that one chain may carry; what is beyond is lost. Drivers send a page or so.
const MAX_OUTPUT: usize = 1 << 20;

/// Bytes moved at a time.
const PIECE: usize = 1024;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const INPUT: u32 = 2;

/// A queue in service with the chain at hand.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) ring: Ring,
    pub(super) chain: Chain,
}

impl Port {
    pub(super) fn new(ring: Ring) -> Self {
        Self {
            chain: ring.new_chain(),
            ring,
        }
    }
}

/// Serves the port. Either queue may be one that the driver did not enable.
#[derive(Debug)]
pub(super) struct Handler {
    pub(super) rx: Option<Port>,
    pub(super) tx: Option<Port>,
    pub(super) sink: Arc<dyn ConsoleSink>,
    pub(super) input: Arc<ConsoleInput>,
}

impl Handler {
    fn feed(&mut self) {
        if let Some(Port { ring, chain }) = &mut self.rx {
            ring.serve(chain, BUDGET, |chain| feed(chain, &self.input));
        }
    }

    fn print(&mut self) {
        if let Some(Port { ring, chain }) = &mut self.tx {
            ring.serve(chain, BUDGET, |chain| print(chain, &*self.sink));
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        // Edges come with every write to an eventfd, read or not, so kicks are never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Some(rx) = &self.rx {
            ops.add(Events::with_data(&**rx.ring.kick(), RX_KICK, edge))?;
        }
        if let Some(tx) = &self.tx {
            ops.add(Events::with_data(&**tx.ring.kick(), TX_KICK, edge))?;
        }
        ops.add(Events::with_data(self.input.event(), INPUT, edge))
    }
}

impl MutEventSubscriber for Handler {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch(ops) {
            tracing::error!(%error, "Cannot poll the console");
        }
        self.print();
        self.feed();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == TX_KICK {
            self.print();
        } else {
            self.feed();
        }
    }
}

fn feed(chain: &mut Chain, input: &ConsoleInput) -> Result<Outcome, DriverError> {
    if chain.readable.bytes() > 0 || chain.writable.bytes() == 0 {
        return Err(DriverError::Chain("an input buffer is not writable"));
    }
    let mut piece = [0; PIECE];
    let mut written = 0;
    loop {
        let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
        let piece = piece.get_mut(..room.min(PIECE)).unwrap_or_default();
        let count = input.pop(piece);
        if count == 0 {
            break;
        }
        written += chain
            .writable
            .copy_in(piece.get(..count).unwrap_or_default());
    }
    if written == 0 {
        return Ok(Outcome::Later);
    }
    Ok(Outcome::Used(u32::try_from(written).unwrap_or(u32::MAX)))
}

fn print(chain: &mut Chain, sink: &dyn ConsoleSink) -> Result<Outcome, DriverError> {
    if chain.writable.bytes() > 0 {
        return Err(DriverError::Chain("an output buffer is not readable"));
    }
    let mut piece = [0; PIECE];
    let mut printed = 0;
    while printed < MAX_OUTPUT {
        let count = chain.readable.copy_out(&mut piece);
        if count == 0 {
            break;
        }
        sink.write(piece.get(..count).unwrap_or_default());
        printed += count;
    }
    Ok(Outcome::Used(0))
}
