//! virtio-console (virtio 1.2, 5.3) with named ports (MULTIPORT) and without a console: what a
//! guest agent and its like talk over. Each port's host end is a
//! [`Channel`](crate::channel::Channel).
//!
//! Ports are numbered from 1, as port 0 is a console's by custom; a guest that numbers its consoles
//! so finds none here. What a driver without MULTIPORT prints to port 0 is dropped. Leaves out
//! ports that come and go (PORT_REMOVE) and, as there is no console, terminal sizes.
//!
//! A driver without room for messages is owed them: they are states of a port, not a queue, so
//! nothing that it asks for again and again adds up.

mod control;
mod device;
mod handler;

#[cfg(test)]
mod tests;

pub use control::PortState;
pub use device::{MAX_NAME, MAX_PORTS, Ports, PortsState};
