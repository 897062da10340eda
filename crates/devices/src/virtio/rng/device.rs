//! The device and its handler on the device thread.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::VolatileSlice;

use crate::platform::DeviceLoop;
use crate::state::StateError;
use crate::virtio::on_loop::OnLoop;
use crate::virtio::ring::{Chain, Halt, Outcome, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, DriverError, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];

/// Bytes that one request gets at most.
const MAX_REQUEST: usize = 64 * 1024;

/// Requests served before others on the device thread get their turn.
const BUDGET: usize = 4;

/// A virtio entropy source.
#[derive(Debug)]
pub struct Rng {
    device_loop: Arc<dyn DeviceLoop>,
    handler: Option<OnLoop<Handler>>,
    halt: Halt,
}

impl Rng {
    /// An entropy source that is served on `device_loop`.
    pub fn new(device_loop: Arc<dyn DeviceLoop>) -> Self {
        Self {
            device_loop,
            handler: None,
            halt: Halt::default(),
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_RNG).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let Activation {
            memory,
            notifier,
            queues,
            ..
        } = activation;
        if let Some(queue) = queues.into_iter().next() {
            let ring = Ring::new(queue, memory, notifier, self.halt.clone());
            let chain = ring.new_chain();
            let started = OnLoop::start(self.device_loop.clone(), Handler { ring, chain });
            self.handler = Some(started.map_err(|(error, _)| error)?);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.halt.set();
        let handler = self.handler.take().and_then(OnLoop::stop);
        handler
            .map(|handler| handler.ring.into_queue())
            .into_iter()
            .collect()
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            other => Err(other.refused_by(self.device_type())),
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[derive(Debug)]
struct Handler {
    ring: Ring,
    chain: Chain,
}

impl Handler {
    fn serve(&mut self) {
        self.ring.serve(&mut self.chain, BUDGET, fill);
    }
}

impl MutEventSubscriber for Handler {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Edges come with every write to an eventfd, read or not, so kicks are never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(&**self.ring.kick(), edge)) {
            tracing::error!(%error, "Cannot poll the entropy queue");
        }
        self.serve();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.serve();
    }
}

fn fill(chain: &mut Chain) -> Result<Outcome, DriverError> {
    if chain.readable.bytes() > 0 || chain.writable.bytes() == 0 {
        return Err(DriverError::Chain("an entropy buffer is not writable"));
    }
    let mut filled = 0;
    for slice in chain.writable.slices() {
        let wanted = slice.len().min(MAX_REQUEST - filled);
        let got = match slice.subslice(0, wanted) {
            Ok(part) => random_bytes(&part),
            Err(_) => 0,
        };
        filled += got;
        if got < wanted || filled == MAX_REQUEST {
            break;
        }
    }
    Ok(Outcome::Used(u32::try_from(filled).unwrap_or(0)))
}

/// Fills `target` from the kernel's generator; returns how many bytes that did.
fn random_bytes(target: &VolatileSlice<'_>) -> usize {
    let guard = target.ptr_guard_mut();
    let mut done = 0;
    while done < target.len() {
        // SAFETY: the kernel writes at most `len - done` bytes from `done` on, all within the
        // guest memory that `target` stands for. Guest memory may change at any time.
        let got =
            unsafe { libc::getrandom(guard.as_ptr().add(done).cast(), target.len() - done, 0) };
        match usize::try_from(got) {
            Ok(got) if got > 0 => done += got,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    done
}
