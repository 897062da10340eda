//! All queues of the ports, on the device thread.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::control::{PortState, Request};
use crate::channel::Channel;
use crate::virtio::console::handler::Port as Queue;
use crate::virtio::ring::{Chain, Outcome};
use crate::virtio::{ActiveQueue, DriverError};

/// Chains served before others on the device thread get their turn.
const BUDGET: usize = 16;

/// Bytes moved before others on the device thread get their turn.
const BYTE_BUDGET: usize = 256 << 10;

/// Bytes moved at a time.
const PIECE: usize = 4096;

/// Data of a channel's event is this plus its position; that of a kick is the queue's index.
const CHANNEL_EVENT: u32 = 1 << 16;

/// A port: its channel, and its queues as far as the driver enabled them.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) channel: Arc<Channel>,
    pub(super) state: PortState,
    rx: Option<Queue>,
    tx: Option<Queue>,
}

impl Lane {
    pub(super) fn new(channel: Arc<Channel>, state: PortState) -> Self {
        Self {
            channel,
            state,
            rx: None,
            tx: None,
        }
    }

    fn feed(&mut self) {
        if let Some(Queue { ring, chain }) = &mut self.rx {
            let mut left = BYTE_BUDGET;
            ring.serve(chain, BUDGET, |chain| feed(chain, &self.channel, &mut left));
            go_on(left, ring.kick());
        }
    }

    fn drain(&mut self) {
        if let Some(Queue { ring, chain }) = &mut self.tx {
            let mut left = BYTE_BUDGET;
            ring.serve(chain, BUDGET, |chain| {
                drain(chain, &self.channel, &mut self.state.sent, &mut left)
            });
            go_on(left, ring.kick());
        }
    }
}

/// Serves a queue again later that has used up its bytes.
fn go_on(left: usize, kick: &EventFd) {
    if left == 0 {
        // Only a counter about to overflow refuses, and that one is signalled.
        let _ = kick.write(1);
    }
}

/// Serves all queues.
#[derive(Debug, Default)]
pub(super) struct Handler {
    /// By rising number, from 1.
    pub(super) lanes: Vec<Lane>,
    /// What a driver without MULTIPORT prints.
    console: Option<Queue>,
    control_rx: Option<Queue>,
    control_tx: Option<Queue>,
    /// Receives for the console that is none.
    unused: Option<Queue>,
}

impl Handler {
    /// The place of the queue of this index (5.3.2).
    pub(super) fn place(&mut self, index: u16) -> Option<&mut Option<Queue>> {
        Some(match index {
            0 => &mut self.unused,
            1 => &mut self.console,
            2 => &mut self.control_rx,
            3 => &mut self.control_tx,
            _ => {
                let lane = self.lanes.get_mut(usize::from(index) / 2 - 2)?;
                if index.is_multiple_of(2) {
                    &mut lane.rx
                } else {
                    &mut lane.tx
                }
            }
        })
    }

    /// Takes the queues out of service, by rising index.
    pub(super) fn take_queues(&mut self) -> Vec<ActiveQueue> {
        let lanes = self.lanes.iter_mut();
        let lanes = lanes.flat_map(|lane| [lane.rx.take(), lane.tx.take()]);
        let control = [self.control_rx.take(), self.control_tx.take()];
        let console = [self.unused.take(), self.console.take()];
        let all = console.into_iter().chain(control).chain(lanes);
        all.flatten().map(|queue| queue.ring.into_queue()).collect()
    }

    fn watch(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        // Edges come with every write to an eventfd, read or not, so events are never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let fixed = [&self.console, &self.control_rx, &self.control_tx];
        let fixed = fixed.into_iter().zip(1..);
        let lanes = self.lanes.iter().flat_map(|lane| [&lane.rx, &lane.tx]);
        for (queue, index) in fixed.chain(lanes.zip(4..)) {
            if let Some(queue) = queue {
                ops.add(Events::with_data(&**queue.ring.kick(), index, edge))?;
            }
        }
        for (lane, data) in self.lanes.iter().zip(CHANNEL_EVENT..) {
            ops.add(Events::with_data(lane.channel.event(), data, edge))?;
        }
        Ok(())
    }

    /// Takes the driver's messages.
    fn listen(&mut self) {
        let lanes = &mut self.lanes;
        if let Some(Queue { ring, chain }) = &mut self.control_tx {
            ring.serve(chain, BUDGET, |chain| {
                obey(Request::read(chain)?, lanes);
                Ok(Outcome::Used(0))
            });
        }
        self.tell();
    }

    /// Sends the driver what it is owed.
    fn tell(&mut self) {
        let lanes = &mut self.lanes;
        let owes = |lane: &Lane| lane.state.owes(&lane.channel);
        if !lanes.iter().any(owes) {
            return;
        }
        if let Some(Queue { ring, chain }) = &mut self.control_rx {
            ring.serve(chain, BUDGET, |chain| {
                for (lane, number) in lanes.iter_mut().zip(1..) {
                    if lane.state.owes(&lane.channel) {
                        let len = lane.state.tell(number, &lane.channel, chain)?;
                        return Ok(Outcome::Used(len));
                    }
                }
                Ok(Outcome::Later)
            });
        }
    }

    fn drop_output(&mut self) {
        if let Some(Queue { ring, chain }) = &mut self.console {
            ring.serve(chain, BUDGET, |_| Ok(Outcome::Used(0)));
        }
    }

    fn serve(&mut self, data: u32) {
        if let Some(position) = data.checked_sub(CHANNEL_EVENT) {
            self.tell();
            if let Some(lane) = lane(&mut self.lanes, position) {
                lane.drain();
                lane.feed();
            }
            return;
        }
        match data {
            0 => {}
            1 => self.drop_output(),
            2 => self.tell(),
            3 => self.listen(),
            queue => {
                let lane = lane(&mut self.lanes, queue / 2 - 2);
                match lane {
                    Some(lane) if queue.is_multiple_of(2) => lane.feed(),
                    Some(lane) => lane.drain(),
                    None => {}
                }
            }
        }
    }
}

fn lane(lanes: &mut [Lane], position: u32) -> Option<&mut Lane> {
    lanes.get_mut(usize::try_from(position).ok()?)
}

fn port(lanes: &mut [Lane], number: u32) -> Option<&mut Lane> {
    lane(lanes, number.checked_sub(1)?)
}

/// Does what a message says. One about a port that is not there is for nobody.
fn obey(request: Request, lanes: &mut [Lane]) {
    match request {
        Request::Device(true) => lanes.iter_mut().for_each(|lane| lane.state.announce()),
        Request::Port(number, ready) => {
            if let Some(lane) = port(lanes, number) {
                lane.state.set_ready(ready);
            }
        }
        Request::Open(number, open) => {
            if let Some(lane) = port(lanes, number) {
                lane.state.guest_open = open;
                lane.channel.set_guest_open(open);
            }
        }
        Request::Device(false) | Request::Other => {}
    }
}

impl MutEventSubscriber for Handler {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch(ops) {
            tracing::error!(%error, "Cannot poll the ports");
        }
        self.drop_output();
        self.listen();
        for lane in &mut self.lanes {
            lane.drain();
            lane.feed();
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        self.serve(events.data());
    }
}

fn feed(chain: &mut Chain, channel: &Channel, left: &mut usize) -> Result<Outcome, DriverError> {
    if chain.readable.bytes() > 0 || chain.writable.bytes() == 0 {
        return Err(DriverError::Chain("an input buffer is not writable"));
    }
    let mut piece = [0; PIECE];
    let mut written = 0;
    loop {
        let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
        let piece = piece
            .get_mut(..room.min(*left).min(PIECE))
            .unwrap_or_default();
        let count = channel.input(piece);
        if count == 0 {
            break;
        }
        *left -= count;
        written += chain
            .writable
            .copy_in(piece.get(..count).unwrap_or_default());
    }
    if written == 0 {
        return Ok(Outcome::Later);
    }
    Ok(Outcome::Used(u32::try_from(written).unwrap_or(u32::MAX)))
}

/// Gives `channel` what it takes of a chain, of which it has taken `sent` bytes before.
fn drain(
    chain: &mut Chain,
    channel: &Channel,
    sent: &mut usize,
    left: &mut usize,
) -> Result<Outcome, DriverError> {
    if chain.writable.bytes() > 0 {
        return Err(DriverError::Chain("an output buffer is not readable"));
    }
    chain.readable.skip(*sent);
    let mut piece = [0; PIECE];
    // Nothing is read for nobody: a chain may be as long as memory, many times over.
    while channel.is_open() {
        let piece = piece.get_mut(..PIECE.min(*left)).unwrap_or_default();
        let count = chain.readable.copy_out(piece);
        let taken = channel.output(piece.get(..count).unwrap_or_default());
        *sent += taken;
        *left -= taken;
        if taken < count || *left == 0 {
            return Ok(Outcome::Later);
        }
        if count == 0 {
            break;
        }
    }
    *sent = 0;
    Ok(Outcome::Used(0))
}
