//! virtio-console (virtio 1.2, 5.3): one port, the host end of which is a
//! [`ConsoleSink`](crate::console::ConsoleSink) and a
//! [`ConsoleInput`](crate::console::ConsoleInput).
//!
//! Offers the size of the terminal. Leaves out several ports (MULTIPORT), which are a device of
//! their own ([`ports`]), so that the console is the first port of its device for every driver; and
//! the emergency write register: the serial port is there for early output.

mod device;
mod handler;
pub mod ports;

#[cfg(test)]
pub(crate) mod tests;

pub use device::{Console, ConsoleConfig, ConsoleState, Resizer, TerminalSize};
