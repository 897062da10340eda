//! The device: what it offers, and the size of its terminal.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::handler::{Handler, Port};
use crate::bus::lock;
use crate::console::{ConsoleInput, ConsoleSink};
use crate::platform::DeviceLoop;
use crate::state::StateError;
use crate::virtio::on_loop::OnLoop;
use crate::virtio::ring::{Halt, RING_FEATURES, Ring};
use crate::virtio::{Activation, ActiveQueue, DeviceState, Notifier, VirtioDevice, config_space};

/// VIRTIO_CONSOLE_F_SIZE: the config space has the terminal's size.
const FEATURE_SIZE: u64 = 1 << 0;

/// Receive and transmit queue of the port.
const QUEUE_SIZES: [u16; 2] = [64, 64];

const RX_QUEUE: u16 = 0;

/// Columns and rows of a terminal; zeroes where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// What is fixed when a console is built.
#[derive(Debug, Clone)]
pub struct ConsoleConfig {
    /// Where output goes.
    pub sink: Arc<dyn ConsoleSink>,
    /// Where input comes from. No other device may read it.
    pub input: Arc<ConsoleInput>,
    /// The terminal's size to begin with.
    pub size: TerminalSize,
}

/// What changes while a console runs. Input that the guest has not read is no part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The terminal's size.
    pub size: TerminalSize,
}

#[derive(Debug)]
struct Terminal {
    size: TerminalSize,
    /// The driver that cares for the size, if there is one.
    notifier: Option<Arc<dyn Notifier>>,
}

/// Tells the guest of a new terminal size, from any thread.
#[derive(Debug, Clone)]
pub struct Resizer(Arc<Mutex<Terminal>>);

impl Resizer {
    /// The terminal is now of `size`.
    pub fn resize(&self, size: TerminalSize) {
        let mut terminal = lock(&self.0);
        if terminal.size != size {
            terminal.size = size;
            if let Some(notifier) = &terminal.notifier {
                notifier.config();
            }
        }
    }
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    columns: U16,
    rows: U16,
    max_ports: U32,
    emergency_write: U32,
}

impl ConfigSpace {
    pub(super) fn new(size: TerminalSize, max_ports: u32) -> Self {
        Self {
            columns: size.columns.into(),
            rows: size.rows.into(),
            max_ports: max_ports.into(),
            emergency_write: 0.into(),
        }
    }
}

/// A virtio console.
#[derive(Debug)]
pub struct Console {
    config: ConsoleConfig,
    terminal: Arc<Mutex<Terminal>>,
    device_loop: Arc<dyn DeviceLoop>,
    handler: Option<OnLoop<Handler>>,
    halt: Halt,
}

impl Console {
    /// A console that is served on `device_loop`.
    pub fn new(config: ConsoleConfig, device_loop: Arc<dyn DeviceLoop>) -> Self {
        let terminal = Terminal {
            size: config.size,
            notifier: None,
        };
        Self {
            config,
            terminal: Arc::new(Mutex::new(terminal)),
            device_loop,
            handler: None,
            halt: Halt::default(),
        }
    }

    /// The way to resize the terminal.
    pub fn resizer(&self) -> Resizer {
        Resizer(self.terminal.clone())
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_CONSOLE).unwrap_or(0)
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = lock(&self.terminal).size;
        let space = ConfigSpace::new(size, 1);
        config_space::read(space.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.halt = Halt::default();
        let mut handler = Handler {
            rx: None,
            tx: None,
            sink: self.config.sink.clone(),
            input: self.config.input.clone(),
        };
        for queue in activation.queues {
            let index = queue.index;
            let ring = Ring::new(
                queue,
                activation.memory.clone(),
                activation.notifier.clone(),
                self.halt.clone(),
            );
            let slot = if index == RX_QUEUE {
                &mut handler.rx
            } else {
                &mut handler.tx
            };
            *slot = Some(Port::new(ring));
        }
        let started = OnLoop::start(self.device_loop.clone(), handler);
        self.handler = Some(started.map_err(|(error, _)| error)?);
        if activation.features & FEATURE_SIZE != 0 {
            let mut terminal = lock(&self.terminal);
            // Linux looks at the size only when it is told of a change.
            if terminal.size != TerminalSize::default() {
                activation.notifier.config();
            }
            terminal.notifier = Some(activation.notifier);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        lock(&self.terminal).notifier = None;
        self.halt.set();
        let Some(handler) = self.handler.take().and_then(OnLoop::stop) else {
            return Vec::new();
        };
        let ports = [handler.rx, handler.tx];
        ports
            .into_iter()
            .flatten()
            .map(|port| port.ring.into_queue())
            .collect()
    }

    fn state(&self) -> DeviceState {
        let size = lock(&self.terminal).size;
        DeviceState::Console(ConsoleState { size })
    }

    /// The terminal is of the size that the guest knows until [`Resizer::resize`] tells another.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(state) = state else {
            return Err(state.refused_by(self.device_type()));
        };
        lock(&self.terminal).size = state.size;
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.deactivate();
    }
}
