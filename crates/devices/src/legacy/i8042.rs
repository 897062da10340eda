//! Intel 8042 keyboard controller with nothing plugged in, and the system control port A (0x92).
//!
//! Enough of the controller for firmware and operating systems to find out quickly that there is
//! no keyboard and no mouse, to switch the A20 gate and to reset the machine. A byte sent to a
//! device is answered at once as the controller does when nobody takes it: 0xfe with the time-out
//! bit. Left out: interrupts 1 and 12 (nothing ever types), the controller's own RAM beyond the
//! command byte, and the A20 gate's effect (memory never wraps at 1 MiB; the bit only reads back).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::platform::{MachineControl, MachineRequest};
use crate::state::{StateError, ensure};

/// Length of the controller's port range; data is at 0 and command/status at 4.
///
/// Port 0x61 falls in the range but is the kernel's PIT's, which answers before us.
pub const PORT_RANGE: u64 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;

const COMMAND_BYTE_SYSTEM: u8 = 1 << 2;
const COMMAND_BYTE_KEYBOARD_OFF: u8 = 1 << 4;
const COMMAND_BYTE_AUX_OFF: u8 = 1 << 5;

const OUTPUT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

const SELF_TEST_PASSED: u8 = 0x55;
const CLOCK_LINE_STUCK: u8 = 0x01;
const RESEND: u8 = 0xfe;

/// A byte that waits to be read from the data port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    byte: u8,
    /// Status bits that come with it.
    status: u8,
}

/// State of an [`I8042`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    command_byte: u8,
    output_port: u8,
    output: Option<Output>,
    /// Command whose parameter is the next byte to the data port.
    pending: Option<u8>,
    last_was_command: bool,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            command_byte: COMMAND_BYTE_SYSTEM | COMMAND_BYTE_KEYBOARD_OFF | COMMAND_BYTE_AUX_OFF,
            output_port: OUTPUT_NOT_RESET | OUTPUT_A20,
            output: None,
            pending: None,
            last_was_command: false,
        }
    }
}

/// The keyboard controller.
#[derive(Debug)]
pub struct I8042 {
    control: Arc<dyn MachineControl>,
    state: I8042State,
}

impl I8042 {
    /// A controller after power-on.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self {
            control,
            state: I8042State::default(),
        }
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses a state that no controller gets into.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), StateError> {
        if let Some(command) = state.pending {
            let what = "command that the keyboard controller waits to complete";
            ensure(takes_parameter(command), what, command)?;
        }
        if let Some(output) = state.output {
            let possible = output.status & !(STATUS_AUX | STATUS_TIMEOUT) == 0;
            let what = "status of the keyboard controller's output";
            ensure(possible, what, output.status)?;
        }
        let port = state.output_port;
        let possible = port & OUTPUT_NOT_RESET != 0;
        ensure(possible, "keyboard controller's output port", port)?;
        self.state = state.clone();
        Ok(())
    }

    /// The state to go on from.
    pub fn state(&self) -> I8042State {
        self.state.clone()
    }

    /// Returns to the state after power-on.
    pub fn reset(&mut self) {
        self.state = I8042State::default();
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | (self.state.command_byte & STATUS_SYSTEM);
        if self.state.last_was_command {
            status |= STATUS_COMMAND;
        }
        if let Some(output) = self.state.output {
            status |= STATUS_OUTPUT_FULL | output.status;
        }
        status
    }

    fn answer(&mut self, byte: u8, status: u8) {
        self.state.output = Some(Output { byte, status });
    }

    fn command(&mut self, command: u8) {
        self.state.last_was_command = true;
        self.state.pending = None;
        match command {
            0x20 => self.answer(self.state.command_byte, 0),
            _ if takes_parameter(command) => self.state.pending = Some(command),
            0xa7 => self.state.command_byte |= COMMAND_BYTE_AUX_OFF,
            0xa8 => self.state.command_byte &= !COMMAND_BYTE_AUX_OFF,
            0xa9 | 0xab => self.answer(CLOCK_LINE_STUCK, 0),
            0xaa => {
                self.state.command_byte |= COMMAND_BYTE_SYSTEM;
                self.answer(SELF_TEST_PASSED, 0);
            }
            0xad => self.state.command_byte |= COMMAND_BYTE_KEYBOARD_OFF,
            0xae => self.state.command_byte &= !COMMAND_BYTE_KEYBOARD_OFF,
            0xd0 => self.answer(self.state.output_port, 0),
            0xdd => self.state.output_port &= !OUTPUT_A20,
            0xdf => self.state.output_port |= OUTPUT_A20,
            // Pulses the output port's low bits whose command bit is clear; bit 0 is reset.
            0xf0..=0xff if command & OUTPUT_NOT_RESET == 0 => {
                self.control.request(MachineRequest::Reset);
            }
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.state.last_was_command = false;
        match self.state.pending.take() {
            Some(0x60) => self.state.command_byte = byte,
            Some(0xd1) => {
                self.state.output_port = byte | OUTPUT_NOT_RESET;
                if byte & OUTPUT_NOT_RESET == 0 {
                    self.control.request(MachineRequest::Reset);
                }
            }
            Some(0xd2) => self.answer(byte, 0),
            Some(0xd3) => self.answer(byte, STATUS_AUX),
            Some(0xd4) => self.answer(RESEND, STATUS_AUX | STATUS_TIMEOUT),
            _ => self.answer(RESEND, STATUS_TIMEOUT),
        }
    }
}

/// Whether a parameter follows `command`: command byte, output port, output buffers or a byte for
/// the auxiliary device.
fn takes_parameter(command: u8) -> bool {
    matches!(command, 0x60 | 0xd1..=0xd4)
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            match offset {
                DATA => *byte = self.state.output.take().map_or(0, |output| output.byte),
                COMMAND => *byte = self.status(),
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (DATA, [byte]) => self.data(*byte),
            (COMMAND, [byte]) => self.command(*byte),
            _ => {}
        }
    }
}

/// System control port A: fast A20 gate (bit 1) and fast reset (bit 0).
#[derive(Debug)]
pub struct ControlPortA {
    control: Arc<dyn MachineControl>,
    state: ControlPortAState,
}

/// State of a [`ControlPortA`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPortAState {
    value: u8,
}

impl Default for ControlPortAState {
    fn default() -> Self {
        Self { value: OUTPUT_A20 }
    }
}

impl ControlPortA {
    /// The port after power-on: A20 open.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self {
            control,
            state: ControlPortAState::default(),
        }
    }

    /// Takes up a saved state. The port may have any value.
    pub fn restore(&mut self, state: &ControlPortAState) {
        self.state = state.clone();
    }

    /// The state to go on from.
    pub fn state(&self) -> ControlPortAState {
        self.state.clone()
    }

    /// Returns to the state after power-on.
    pub fn reset(&mut self) {
        self.state = ControlPortAState::default();
    }
}

impl BusDevice for ControlPortA {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.state.value;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [byte] = data {
            let rises = byte & !self.state.value & 1 != 0;
            self.state.value = *byte;
            if rises {
                self.control.request(MachineRequest::Reset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::MockControl;

    fn controller() -> (I8042, Arc<MockControl>) {
        let control = Arc::<MockControl>::default();
        (I8042::new(control.clone()), control)
    }

    fn inb(device: &mut dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    fn command(device: &mut I8042, command: u8) -> Option<u8> {
        device.write(COMMAND, &[command]);
        (inb(device, COMMAND) & STATUS_OUTPUT_FULL != 0).then(|| inb(device, DATA))
    }

    /// The order of SeaBIOS' keyboard set-up: flush, disable both, flush, self-test, port test.
    #[test]
    fn firmware_learns_at_once_that_no_keyboard_is_there() {
        let (mut device, control) = controller();
        assert_eq!(inb(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(command(&mut device, 0xad), None);
        assert_eq!(command(&mut device, 0xa7), None);
        assert_eq!(inb(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(command(&mut device, 0xaa), Some(0x55));
        let port_test = command(&mut device, 0xab);
        assert!(port_test.is_some_and(|result| result != 0));
        assert_eq!(control.requests(), []);
    }

    #[test]
    fn command_byte_and_output_port_read_back() {
        let (mut device, control) = controller();
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x65]);
        assert_eq!(command(&mut device, 0x20), Some(0x65));
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0xdd]);
        assert_eq!(command(&mut device, 0xd0), Some(0xdd));
        assert_eq!(command(&mut device, 0xdf), None);
        assert_eq!(command(&mut device, 0xd0), Some(0xdf));
        assert_eq!(control.requests(), []);
    }

    #[test]
    fn bytes_to_absent_devices_time_out() {
        let (mut device, _control) = controller();
        device.write(DATA, &[0xff]);
        let status = inb(&mut device, COMMAND);
        assert_ne!(status & STATUS_TIMEOUT, 0);
        assert_eq!(status & STATUS_AUX, 0);
        assert_eq!(inb(&mut device, DATA), RESEND);
        device.write(COMMAND, &[0xd4]);
        device.write(DATA, &[0xff]);
        assert_ne!(inb(&mut device, COMMAND) & STATUS_AUX, 0);
        assert_eq!(inb(&mut device, DATA), RESEND);
        assert_eq!(inb(&mut device, COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn resets_by_each_way() {
        let (mut device, control) = controller();
        device.write(COMMAND, &[0xfe]);
        assert_eq!(control.requests(), [MachineRequest::Reset]);
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0x02]);
        assert_eq!(control.requests().len(), 2);
        let mut port = ControlPortA::new(control.clone());
        assert_eq!(inb(&mut port, 0), OUTPUT_A20);
        port.write(0, &[0x03]);
        port.write(0, &[0x03]);
        assert_eq!(control.requests().len(), 3, "only the rising bit resets");
    }

    #[test]
    fn a_restored_controller_waits_for_the_parameter() {
        let (mut device, control) = controller();
        device.write(COMMAND, &[0xd1]);
        let state = device.state();
        let (mut restored, _) = controller();
        restored
            .restore(&state)
            .expect("a state of the device itself");
        restored.write(DATA, &[0xdd]);
        assert_eq!(command(&mut restored, 0xd0), Some(0xdd));
        assert_eq!(control.requests(), []);

        let mut port = ControlPortA::new(control.clone());
        port.write(0, &[0x03]);
        let mut restored = ControlPortA::new(control.clone());
        restored.restore(&port.state());
        restored.write(0, &[0x03]);
        assert_eq!(control.requests().len(), 1, "the bit has risen already");
    }

    #[test]
    fn states_that_can_not_be_are_refused() {
        let (mut device, _control) = controller();
        let output = |status| Some(Output { byte: 0, status });
        let change: [&dyn Fn(&mut I8042State); 3] = [
            &|state| state.pending = Some(0xaa),
            &|state| state.output = output(STATUS_OUTPUT_FULL),
            &|state| state.output_port = 0,
        ];
        for change in change {
            let mut state = device.state();
            change(&mut state);
            let refused = device.restore(&state);
            assert!(matches!(refused, Err(StateError::Impossible { .. })));
        }
    }

    proptest! {
        #[test]
        fn any_access_is_survived_and_state_restores(
            accesses in proptest::collection::vec((0u64..6, any::<bool>(), any::<u8>(), 1usize..5), 0..200)
        ) {
            let (mut device, control) = controller();
            for (offset, write, byte, len) in accesses {
                if write {
                    device.write(offset, &vec![byte; len]);
                } else {
                    device.read(offset, &mut vec![0xff; len]);
                }
                let json = serde_json::to_string(&device.state()).expect("state serialises");
                let state = serde_json::from_str(&json).expect("state deserialises");
                device = I8042::new(control.clone());
                device.restore(&state).expect("a state of the device itself");
                prop_assert_eq!(serde_json::to_string(&device.state()).ok(), Some(json));
            }
        }
    }
}
