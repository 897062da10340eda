//! The control queue (virtio 1.2, 5.1.6.5): only the number of queue pairs in use.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vmm_sys_util::eventfd::EventFd;

use super::device::Shared;
use crate::virtio::DriverError;
use crate::virtio::ring::{Chain, Outcome, Ring};

/// Commands carried out before others on the device thread get their turn.
const BUDGET: usize = 16;

/// Serves the control queue.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) ring: Ring,
    chain: Chain,
    shared: Arc<Shared>,
    /// Wakes the pairs after a change.
    pairs: Vec<Arc<EventFd>>,
}

impl Control {
    pub(super) fn new(ring: Ring, shared: Arc<Shared>, pairs: Vec<Arc<EventFd>>) -> Self {
        Self {
            chain: ring.new_chain(),
            ring,
            shared,
            pairs,
        }
    }

    fn serve(&mut self) {
        let (shared, pairs) = (&self.shared, &self.pairs);
        self.ring.serve(&mut self.chain, BUDGET, |chain| {
            let status = command(chain, shared, pairs)?;
            chain.write_status(u8::try_from(status).unwrap_or(u8::MAX));
            Ok(Outcome::Used(1))
        });
    }
}

fn command(chain: &mut Chain, shared: &Shared, pairs: &[Arc<EventFd>]) -> Result<u32, DriverError> {
    let mut header = [0; 2];
    if chain.readable.copy_out(&mut header) < header.len() {
        return Err(DriverError::Chain("the command is too short"));
    }
    chain.detach_status()?;
    let [class, command] = header.map(u32::from);
    if (class, command) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
        return Ok(VIRTIO_NET_ERR);
    }
    let mut count = [0; 2];
    if chain.readable.copy_out(&mut count) < count.len()
        || !shared.enable_pairs(u16::from_le_bytes(count))
    {
        return Ok(VIRTIO_NET_ERR);
    }
    for kick in pairs {
        // Only a counter about to overflow refuses, and that one is signalled.
        let _ = kick.write(1);
    }
    Ok(VIRTIO_NET_OK)
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(&**self.ring.kick(), edge)) {
            tracing::error!(%error, "Cannot poll the control queue");
        }
        self.serve();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.serve();
    }
}
