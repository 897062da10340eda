//! virtio 1.2 over PCI: the transport and the devices.
//!
//! A device offers features, a config space and queues; the transport ([`transport`]) does
//! everything that is the same for all of them. When the driver sets DRIVER_OK the transport
//! hands the queues to the device, which serves them on a thread of its own or on the shared
//! device thread until it is deactivated.

pub mod balloon;
pub mod block;
pub(crate) mod buffers;
mod config_space;
pub mod console;
mod descriptors;
pub mod net;
mod on_loop;
pub mod ring;
pub mod rng;
pub mod transport;

#[cfg(test)]
#[path = "../../tests/driver/mod.rs"]
pub(crate) mod driver;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG,
};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::state::StateError;

/// virtio device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The guest found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device met an error it can't recover from.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// The driver broke the rules of a queue; the device stops and asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The available ring is beyond what the queue can hold, or its address is not memory.
    #[error("The driver's ring is invalid")]
    Ring(#[source] virtio_queue::Error),
    /// A descriptor chain is malformed.
    #[error("The driver's descriptor chain is malformed: {0}")]
    Chain(&'static str),
}

/// How a device tells its driver of used buffers, config changes and its own failure.
///
/// The transport implements it; cheap to call from any thread, whatever that thread holds: it
/// takes no lock but the interrupt line's own, under which nothing else is taken or waited for.
pub trait Notifier: Send + Sync + Debug {
    /// Interrupts the driver for queue `index`.
    fn queue(&self, index: u16);

    /// Interrupts the driver for a change of the config space (the generation goes up).
    fn config(&self);

    /// Sets DEVICE_NEEDS_RESET and interrupts the driver. The device must stop serving.
    fn needs_reset(&self, cause: &DriverError);
}

/// A queue that the driver made ready, with its doorbell.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index among the device's queues.
    pub index: u16,
    /// The ring state. EVENT_IDX is already set as negotiated.
    pub queue: Queue,
    /// Signalled when the driver notifies the device.
    pub kick: Arc<EventFd>,
}

/// All a device needs to serve its queues.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues that the driver enabled, by rising index.
    pub queues: Vec<ActiveQueue>,
    /// The way to the driver.
    pub notifier: Arc<dyn Notifier>,
}

/// A virtio device behind a transport.
pub trait VirtioDevice: Send + Debug {
    /// The device type of virtio 1.2, section 5.
    fn device_type(&self) -> u16;

    /// All the feature bits that the device offers, the ring features among them. The transport
    /// adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// Largest size of each queue. A power of two each.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device config space. `data` comes filled with zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device config space. `features` are those that the driver has negotiated, none
    /// before FEATURES_OK.
    fn write_config(&mut self, _features: u64, _offset: u64, _data: &[u8]) {}

    /// Starts to serve the queues.
    ///
    /// # Errors
    /// Fails when a thread or an event can't be had; the transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Stops serving and gives the queues back with their ring positions. Returns when no
    /// request is in flight. Does nothing on a device that is not active.
    fn deactivate(&mut self) -> Vec<ActiveQueue>;

    /// Returns what a driver can change beside the queues to its state after power-on. The
    /// transport calls it at every reset, of the driver as of the machine, on a device that is
    /// not active.
    fn reset(&mut self) {}

    /// What changes while the device runs, beside the queues. The transport asks a device that
    /// is not active.
    fn state(&self) -> DeviceState;

    /// Takes up a saved state. The transport calls it on a device that is not active, and
    /// activates it afterwards if it was.
    ///
    /// # Errors
    /// Refuses the state of another kind of device and one that this device can't be in.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError>;
}

/// State of a device apart from its queues, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Of a balloon.
    Balloon(balloon::BalloonState),
    /// Of a disk.
    Block(block::BlockState),
    /// Of a console.
    Console(console::ConsoleState),
    /// Of a network interface.
    Net(net::NetState),
    /// Of a console's named ports.
    Ports(console::ports::PortsState),
    /// Of an entropy source, which has none.
    Rng,
}

impl DeviceState {
    /// The refusal of this state by a device of type `expected`.
    fn refused_by(&self, expected: u16) -> StateError {
        let saved = match self {
            Self::Balloon(_) => VIRTIO_ID_BALLOON,
            Self::Block(_) => VIRTIO_ID_BLOCK,
            Self::Console(_) | Self::Ports(_) => VIRTIO_ID_CONSOLE,
            Self::Net(_) => VIRTIO_ID_NET,
            Self::Rng => VIRTIO_ID_RNG,
        };
        StateError::OtherConfig {
            what: "virtio device type",
            saved: saved.into(),
            expected: expected.into(),
        }
    }
}

/// Device status and config generation, shared by a transport and its notifier.
#[derive(Debug, Default)]
pub struct SharedStatus {
    status: AtomicU8,
    generation: AtomicU32,
}

impl SharedStatus {
    /// The status bits, see [`status`].
    pub fn get(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Replaces the status bits.
    pub fn set(&self, bits: u8) {
        self.status.store(bits, Ordering::Release);
    }

    /// Adds status bits.
    pub fn add(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// The config generation.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Takes up a saved config generation.
    pub fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Starts a new config generation.
    pub fn bump_generation(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}
