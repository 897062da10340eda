//! Messages of the control queues (5.3.6.2), and what a port owes its driver.

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::channel::Channel;
use crate::virtio::DriverError;
use crate::virtio::ring::Chain;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

#[derive(Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Message {
    port: U32,
    event: U16,
    value: U16,
}

/// What changes of a port while it runs. Bytes in the channel are no part of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The driver is to be told of the port.
    add_due: bool,
    /// The driver is to be told the port's name.
    name_due: bool,
    /// The driver can use the port.
    ready: bool,
    /// The driver takes the host's end for open.
    told_open: bool,
    /// The guest has its end open.
    pub(super) guest_open: bool,
    /// Bytes of the first chain to transmit that the host has taken already.
    pub(super) sent: usize,
}

/// A message of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The device can be used, if this is true.
    Device(bool),
    /// So can the port of this number.
    Port(u32, bool),
    /// The guest opened or closed its end.
    Open(u32, bool),
    /// One that needs no answer.
    Other,
}

impl Request {
    pub(super) fn read(chain: &mut Chain) -> Result<Self, DriverError> {
        let mut message = Message::default();
        if chain.writable.bytes() > 0
            || chain.readable.copy_out(message.as_mut_bytes()) < size_of::<Message>()
        {
            return Err(DriverError::Chain("a control message is cut short"));
        }
        let (port, on) = (message.port.get(), message.value.get() != 0);
        Ok(match message.event.get() {
            DEVICE_READY => Self::Device(on),
            PORT_READY => Self::Port(port, on),
            PORT_OPEN => Self::Open(port, on),
            _ => Self::Other,
        })
    }
}

impl PortState {
    /// The driver is ready for ports, or for this one.
    pub(super) fn announce(&mut self) {
        self.add_due = true;
    }

    pub(super) fn set_ready(&mut self, ready: bool) {
        self.ready = ready;
        self.name_due = ready;
        self.told_open = false;
    }

    /// Whether there is a message for the driver.
    pub(super) fn owes(&self, channel: &Channel) -> bool {
        self.add_due || self.name_due || (self.ready && self.told_open != channel.is_open())
    }

    /// Writes the next message that is due for port `number`, and gives its length.
    pub(super) fn tell(
        &mut self,
        number: u32,
        channel: &Channel,
        chain: &mut Chain,
    ) -> Result<u32, DriverError> {
        let (event, value, name) = if self.add_due {
            self.add_due = false;
            (PORT_ADD, 1, "")
        } else if self.name_due {
            self.name_due = false;
            (PORT_NAME, 1, channel.name())
        } else {
            self.told_open = channel.is_open();
            (PORT_OPEN, u16::from(self.told_open), "")
        };
        let message = Message {
            port: number.into(),
            event: event.into(),
            value: value.into(),
        };
        let len = size_of::<Message>() + name.len();
        if chain.readable.bytes() > 0
            || chain.writable.copy_in(message.as_bytes()) + chain.writable.copy_in(name.as_bytes())
                < len
        {
            return Err(DriverError::Chain("a control message does not fit"));
        }
        Ok(u32::try_from(len).unwrap_or(u32::MAX))
    }
}
