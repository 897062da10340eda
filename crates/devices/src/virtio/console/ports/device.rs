//! The device: what it offers, and its state while no driver runs it.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use zerocopy::IntoBytes;

use super::control::PortState;
use super::handler::{Handler, Lane};
use crate::channel::Channel;
use crate::platform::DeviceLoop;
use crate::state::{StateError, same};
use crate::virtio::console::device::{ConfigSpace, TerminalSize};
use crate::virtio::console::handler::Port as Queue;
use crate::virtio::on_loop::OnLoop;
use crate::virtio::ring::{Halt, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, VirtioDevice, config_space};

/// VIRTIO_CONSOLE_F_MULTIPORT: there are control queues, and more ports than a console's.
const FEATURE_MULTIPORT: u64 = 1 << 1;

/// Most ports of a device: Linux has room for 31 and its port 0.
pub const MAX_PORTS: usize = 30;
/// Longest name of a port in bytes.
pub const MAX_NAME: usize = 64;

/// Both queues of port 0, which nothing is put into.
const UNUSED_SIZE: u16 = 2;
/// Linux fills a queue that it receives from with a page each.
const CONTROL_SIZE: u16 = 16;
const PORT_SIZE: u16 = 16;

/// What changes while ports run. Bytes in the channels are no part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsState {
    /// By rising number.
    pub ports: Vec<PortState>,
}

/// A virtio console of named ports.
#[derive(Debug)]
pub struct Ports {
    /// With their states as long as no handler has them.
    ports: Vec<(Arc<Channel>, PortState)>,
    queue_sizes: Vec<u16>,
    device_loop: Arc<dyn DeviceLoop>,
    handler: Option<OnLoop<Handler>>,
    halt: Halt,
}

impl Ports {
    /// A port for each of `channels`, of which [`MAX_PORTS`] at most are used, served on
    /// `device_loop`.
    pub fn new(mut channels: Vec<Arc<Channel>>, device_loop: Arc<dyn DeviceLoop>) -> Self {
        channels.truncate(MAX_PORTS);
        let mut queue_sizes = vec![UNUSED_SIZE, UNUSED_SIZE, CONTROL_SIZE, CONTROL_SIZE];
        queue_sizes.resize(queue_sizes.len() + 2 * channels.len(), PORT_SIZE);
        let port = |channel| (channel, PortState::default());
        Self {
            ports: channels.into_iter().map(port).collect(),
            queue_sizes,
            device_loop,
            handler: None,
            halt: Halt::default(),
        }
    }
}

impl VirtioDevice for Ports {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_CONSOLE).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let ports = u32::try_from(self.ports.len() + 1).unwrap_or(1);
        let space = ConfigSpace::new(TerminalSize::default(), ports);
        config_space::read(space.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let mut handler = Handler::default();
        let ports = self.ports.iter();
        let lanes = ports.map(|(channel, state)| Lane::new(Arc::clone(channel), state.clone()));
        handler.lanes = lanes.collect();
        for queue in activation.queues {
            let index = queue.index;
            let ring = Ring::new(
                queue,
                activation.memory.clone(),
                activation.notifier.clone(),
                self.halt.clone(),
            );
            if let Some(place) = handler.place(index) {
                *place = Some(Queue::new(ring));
            }
        }
        let started = OnLoop::start(self.device_loop.clone(), handler);
        self.handler = Some(started.map_err(|(error, _)| error)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.halt.set();
        let Some(mut handler) = self.handler.take().and_then(OnLoop::stop) else {
            return Vec::new();
        };
        for ((_, state), lane) in self.ports.iter_mut().zip(&mut handler.lanes) {
            *state = std::mem::take(&mut lane.state);
        }
        handler.take_queues()
    }

    fn reset(&mut self) {
        for (channel, state) in &mut self.ports {
            *state = PortState::default();
            channel.set_guest_open(false);
        }
    }

    fn state(&self) -> DeviceState {
        let states = self.ports.iter().map(|(_, state)| state.clone());
        DeviceState::Ports(PortsState {
            ports: states.collect(),
        })
    }

    /// What the guest has open is open here, too.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Ports(saved) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        same("number of ports", saved.ports.len(), self.ports.len())?;
        for ((channel, state), saved) in self.ports.iter_mut().zip(&saved.ports) {
            *state = saved.clone();
            channel.set_guest_open(saved.guest_open);
        }
        Ok(())
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        self.deactivate();
    }
}
