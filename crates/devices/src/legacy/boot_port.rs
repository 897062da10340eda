//! The control port of the project's own boot firmware (firmware/fast): what it decided.
//!
//! A text is written byte by byte to the first port, then what it is about to the second: a reason
//! why the firmware leaves the disk to another one, or that a kernel is about to start. Either
//! closes the port until the machine is started anew by that firmware; closed, it is not there. The
//! text may come from a disk: it is cut, and only printable ASCII of it is kept.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::platform::{MachineControl, MachineRequest};
use crate::state::{StateError, ensure};

/// Length of the port range.
pub const PORT_RANGE: u64 = 2;

const TEXT: u64 = 0;
const VERB: u64 = 1;

/// Up to this verb it is a reason to decline.
const REASONS_END: u8 = 0x10;
const BOOTING: u8 = 0x10;
/// The most of a text that is kept.
const TEXT_MAX: usize = 160;

/// What the firmware is at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootPhase {
    /// Another firmware runs, or a system: the port is closed.
    #[default]
    Closed,
    /// It looks for something to boot.
    Looking,
    /// It declined.
    Declined,
    /// It has started a kernel.
    Booted,
}

/// State of a [`BootPort`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPortState {
    phase: BootPhase,
    text: String,
}

/// The port.
#[derive(Debug)]
pub struct BootPort {
    control: Arc<dyn MachineControl>,
    state: BootPortState,
}

impl BootPort {
    /// A port that is closed.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self {
            control,
            state: BootPortState::default(),
        }
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses a text that no port keeps.
    pub fn restore(&mut self, state: &BootPortState) -> Result<(), StateError> {
        let text = &state.text;
        let possible = text.len() <= TEXT_MAX && text.bytes().all(is_kept);
        ensure(possible, "boot firmware's text", text.len())?;
        self.state = state.clone();
        Ok(())
    }

    /// The state to go on from.
    pub fn state(&self) -> BootPortState {
        self.state.clone()
    }

    /// Returns to the state after power-on: open when the firmware is to start, else closed.
    pub fn reset(&mut self, open: bool) {
        self.state = BootPortState::default();
        if open {
            self.state.phase = BootPhase::Looking;
        }
    }

    /// What the firmware is at.
    pub fn phase(&self) -> BootPhase {
        self.state.phase
    }

    /// What it wrote: why it declined, or what it boots.
    pub fn text(&self) -> &str {
        &self.state.text
    }

    fn verb(&mut self, verb: u8) {
        self.state.phase = match verb {
            BOOTING => BootPhase::Booted,
            1..REASONS_END => BootPhase::Declined,
            _ => return,
        };
        self.control.request(MachineRequest::BootDecided);
    }
}

fn is_kept(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

impl BusDevice for BootPort {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.state.phase != BootPhase::Looking {
            return;
        }
        match (offset, data) {
            (TEXT, &[byte]) if self.state.text.len() < TEXT_MAX => {
                let kept = if is_kept(byte) { byte } else { b'?' };
                self.state.text.push(char::from(kept));
            }
            (VERB, &[verb]) => self.verb(verb),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MockControl;

    fn port() -> (BootPort, Arc<MockControl>) {
        let control = Arc::<MockControl>::default();
        let mut port = BootPort::new(control.clone());
        port.reset(true);
        (port, control)
    }

    fn say(port: &mut BootPort, text: &[u8], verb: u8) {
        for byte in text {
            port.write(TEXT, &[*byte]);
        }
        port.write(VERB, &[verb]);
    }

    #[test]
    fn one_decision_is_taken_until_the_next_start() {
        let (mut port, control) = port();
        say(&mut port, b"no kernel", 3);
        assert_eq!(
            (port.phase(), port.text()),
            (BootPhase::Declined, "no kernel")
        );
        say(&mut port, b" more", BOOTING);
        assert_eq!(
            (port.phase(), port.text()),
            (BootPhase::Declined, "no kernel")
        );
        assert_eq!(control.requests(), [MachineRequest::BootDecided]);

        port.reset(true);
        say(&mut port, b"/vmlinuz", BOOTING);
        assert_eq!((port.phase(), port.text()), (BootPhase::Booted, "/vmlinuz"));
    }

    #[test]
    fn a_closed_port_takes_nothing() {
        let (mut port, control) = port();
        port.reset(false);
        say(&mut port, b"text", 1);
        assert_eq!((port.phase(), port.text()), (BootPhase::Closed, ""));
        assert_eq!(control.requests(), []);
    }

    #[test]
    fn texts_are_short_and_printable() {
        let (mut port, control) = port();
        port.write(TEXT, b"ab");
        port.write(2, b"x");
        say(&mut port, b"\x1b[2J\n\xff", 0);
        assert_eq!(port.phase(), BootPhase::Looking);
        say(&mut port, &[b'x'; 1000], 0xff);
        assert_eq!(port.text().len(), TEXT_MAX);
        assert!(port.text().starts_with("?[2J??xxx"), "{}", port.text());
        assert_eq!(control.requests(), []);
    }

    #[test]
    fn state_survives() {
        let (mut port, _) = port();
        say(&mut port, b"/vmlinuz", BOOTING);
        let (mut other, _) = self::port();
        assert!(other.restore(&port.state()).is_ok());
        assert_eq!(other.state(), port.state());
        let text = "\x1b".to_owned();
        let hostile = BootPortState {
            phase: BootPhase::Looking,
            text,
        };
        assert!(other.restore(&hostile).is_err());
    }
}
