//! pvpanic: a port by which a guest tells that its kernel has panicked (QEMU's
//! docs/specs/pvpanic).
//!
//! Reads tell the events that the device knows, writes tell an event. The device takes the first of
//! a run of the guest and leaves out the rest, so that a guest can't keep the host busy. Left out:
//! the form as a PCI device, and the event by which a guest asks to be powered off.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::platform::{MachineControl, MachineRequest};

/// Length of the port range.
pub const PORT_RANGE: u64 = 1;

/// The kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked, and another one starts that saves a dump.
const CRASH_LOADED: u8 = 1 << 1;

/// State of a [`PvPanic`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvPanicState {
    /// The guest has told a panic.
    pub told: bool,
}

/// The port.
#[derive(Debug)]
pub struct PvPanic {
    control: Arc<dyn MachineControl>,
    told: bool,
}

impl PvPanic {
    /// A port that files panics with `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self {
            control,
            told: false,
        }
    }

    /// The state to go on from.
    pub fn state(&self) -> PvPanicState {
        PvPanicState { told: self.told }
    }

    /// Takes up a saved state.
    pub fn restore(&mut self, state: &PvPanicState) {
        self.told = state.told;
    }

    /// Takes a panic again.
    pub fn reset(&mut self) {
        self.told = false;
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [events, ..] = data else {
            return;
        };
        // A kernel that saves a dump goes on by itself.
        if events & PANICKED != 0 && !self.told {
            self.told = true;
            self.control.request(MachineRequest::Panicked);
        } else if events & CRASH_LOADED != 0 {
            tracing::debug!("The guest's kernel has panicked and saves a dump");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::MockControl;

    #[test]
    fn the_first_panic_is_told() {
        let control = Arc::<MockControl>::default();
        let mut port = PvPanic::new(control.clone());
        let mut known = [0xff];
        port.read(0, &mut known);
        assert_eq!(known, [3]);
        port.write(0, &[0xfc]);
        port.write(0, &[CRASH_LOADED]);
        port.write(0, &[]);
        assert_eq!(control.requests(), []);
        port.write(0, &[PANICKED]);
        port.write(0, &[PANICKED]);
        assert_eq!(control.requests(), [MachineRequest::Panicked]);
        port.reset();
        port.write(0, &[PANICKED | CRASH_LOADED]);
        assert_eq!(control.requests().len(), 2);
    }

    #[test]
    fn state_survives() {
        let control = Arc::<MockControl>::default();
        let mut port = PvPanic::new(control.clone());
        port.write(0, &[PANICKED]);
        let json = serde_json::to_string(&port.state()).unwrap();
        let mut other = PvPanic::new(control.clone());
        other.restore(&serde_json::from_str(&json).unwrap());
        other.write(0, &[PANICKED]);
        assert_eq!(other.state(), port.state());
        assert_eq!(control.requests().len(), 1);
    }
}
