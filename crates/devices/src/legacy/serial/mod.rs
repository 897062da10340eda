//! National Semiconductor 16550A UART: the first serial port, on the model of `vm-superio`.
//!
//! Output goes to a [`ConsoleSink`] byte by byte as the guest writes it; the transmitter is always
//! empty. Input waits in a [`ConsoleInput`] and moves to the 64-byte receive FIFO as the guest
//! makes room, so none is lost: when bytes arrive the device thread tops the FIFO up, and after
//! that each emptying of the FIFO by the guest does. The interrupt is an edge, as on the ISA bus.
//!
//! Left out: line speed (bytes take no time), modem lines beyond loopback, break and line errors,
//! and the FIFO control register: clearing the FIFO would throw away what a user typed ahead.

use std::convert::Infallible;
use std::fmt::{self, Debug};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::bus::{BusDevice, Shared, lock};
use crate::console::{ConsoleInput, ConsoleSink};
use crate::platform::IrqLine;
use crate::state::{StateError, ensure};

/// Length of the port range.
pub const PORT_RANGE: u64 = 8;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_ID: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const ENABLE_RECEIVED: u8 = 1 << 0;
const NO_INTERRUPT: u8 = 1 << 0;
const RECEIVED: u8 = 1 << 2;
const DIVISOR_LATCH: u8 = 1 << 7;
const LOOPBACK: u8 = 1 << 4;
const DATA_READY: u8 = 1 << 0;

const FIFO: usize = 64;

/// What a [`Serial`] is connected to.
#[derive(Debug, Clone)]
pub struct SerialConfig {
    /// Interrupt line 4.
    pub irq: Arc<dyn IrqLine>,
    /// Where the guest's output goes.
    pub sink: Arc<dyn ConsoleSink>,
    /// Where the guest's input comes from.
    pub input: Arc<ConsoleInput>,
}

/// State of a [`Serial`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_id: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

/// The interrupt line as `vm-superio` wants it.
struct Edge(Arc<dyn IrqLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// The sink as `vm-superio` wants it.
struct Transmitter(Arc<dyn ConsoleSink>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = vm_superio::Serial<Edge, NoEvents, Transmitter>;

/// The serial port.
pub struct Serial {
    config: SerialConfig,
    uart: Uart,
}

impl Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("config", &self.config)
            .field("state", &self.state())
            .finish()
    }
}

impl Serial {
    /// A serial port after power-on.
    pub fn new(config: SerialConfig) -> Self {
        let uart = Uart::new(Edge(config.irq.clone()), Transmitter(config.sink.clone()));
        Self { config, uart }
    }

    /// Takes up a saved state. An interrupt that it has is raised once more: the controllers have
    /// seen it, but an edge too many is one that the driver finds no cause for.
    ///
    /// # Errors
    /// Refuses a state that no port gets into.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), StateError> {
        let received = state.received.len();
        ensure(received <= FIFO, "number of received bytes", received)?;
        let ready = state.line_status & DATA_READY != 0;
        let what = "line status of the serial port";
        ensure(ready == (received > 0), what, state.line_status)?;
        let saved = vm_superio::SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_id,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let edge = Edge(self.config.irq.clone());
        let transmitter = Transmitter(self.config.sink.clone());
        self.uart = Uart::from_state(&saved, edge, NoEvents, transmitter)
            .map_err(|error| StateError::Host(io::Error::other(error)))?;
        self.receive();
        Ok(())
    }

    /// The state to go on from. Input that still waits outside the FIFO is not part of it.
    pub fn state(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_id: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.in_buffer,
        }
    }

    /// Returns to the state after power-on. Only what was in the FIFO is lost.
    pub fn reset(&mut self) {
        *self = Self::new(self.config.clone());
        self.receive();
    }

    /// The handler to put on the device thread, which brings typed bytes to the guest.
    pub fn handler(serial: &Shared<Self>) -> SerialInput {
        SerialInput {
            input: lock(serial).config.input.clone(),
            serial: Arc::clone(serial),
        }
    }

    /// Moves waiting input to the FIFO as far as it fits.
    fn receive(&mut self) {
        let room = self.uart.fifo_capacity().min(FIFO);
        // In loopback the receiver is cut off from the line.
        if room == 0 || self.uart.read(MODEM_CONTROL) & LOOPBACK != 0 {
            return;
        }
        let mut buffer = [0; FIFO];
        let count = self.config.input.pop(&mut buffer[..room]);
        // There is room and no loopback, so all of it is taken.
        let taken = self.uart.enqueue_raw_bytes(&buffer[..count]);
        debug_assert_eq!(taken.ok(), Some(count));
    }

    fn data_ready(&mut self) -> bool {
        self.uart.read(LINE_STATUS) & DATA_READY != 0
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        match register {
            DATA if !self.data_ready() => {
                self.receive();
                value
            }
            // The model forgets "received" once it was read, though bytes are left. A driver that
            // empties the FIFO in parts relies on being told again, as by the real chip.
            INTERRUPT_ID if value & NO_INTERRUPT != 0 && self.received_is_due() => {
                (value & !NO_INTERRUPT) | RECEIVED
            }
            _ => value,
        }
    }

    fn received_is_due(&mut self) -> bool {
        let latched = self.uart.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        !latched && self.uart.read(INTERRUPT_ENABLE) & ENABLE_RECEIVED != 0 && self.data_ready()
    }

    fn write_register(&mut self, register: u8, value: u8) {
        // Neither the interrupt line nor the sink can fail.
        if self.uart.write(register, value).is_err() {
            tracing::debug!("The serial port lost a byte");
        }
        if register == MODEM_CONTROL {
            self.receive();
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            self.write_register(register, *byte);
        }
    }
}

/// Brings typed bytes to a [`Serial`] from the device thread.
///
/// It locks the serial port, which a vCPU holds for the length of a register access only and
/// never while it waits for the device thread.
#[derive(Debug)]
pub struct SerialInput {
    serial: Shared<Serial>,
    input: Arc<ConsoleInput>,
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Before the bytes are taken, so that later ones signal again. An error says that
        // another wake-up has reset the event already.
        let _ = self.input.event().read();
        lock(&self.serial).receive();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let events = Events::new_raw(self.input.event().as_raw_fd(), EventSet::IN);
        if let Err(error) = ops.add(events) {
            tracing::error!(%error, "The serial port's input can't be served");
        }
        lock(&self.serial).receive();
    }
}

#[cfg(test)]
mod tests;
