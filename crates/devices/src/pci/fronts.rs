//! The PCI host's three faces on the buses: configuration ports, ECAM and the window of BARs.

use std::sync::Arc;

use super::PciHost;
use crate::bus::{BusDevice, ConcurrentBusDevice};
use crate::platform::{MachineControl, MachineRequest};

/// The data port's offset from the address port.
const DATA: u64 = 4;
/// The reset control register's offset; it overlaps the address port, which takes dwords only.
const RESET_CONTROL: u64 = 1;

/// Ports 0xcf8 to 0xcff: configuration address and data, where [`PciHost::set_face`] allows it,
/// and the reset control register at 0xcf9.
#[derive(Debug)]
pub struct PciConfigPorts {
    host: Arc<PciHost>,
    control: Arc<dyn MachineControl>,
}

impl PciConfigPorts {
    /// Length of the range on the port bus.
    pub const LEN: u64 = 8;

    /// The ports of `host`; resets are filed with `control`.
    pub fn new(host: Arc<PciHost>, control: Arc<dyn MachineControl>) -> Self {
        Self { host, control }
    }

    fn write_reset_control(&self, value: u8) {
        if self.host.set_reset_control(value) {
            self.control.request(MachineRequest::Reset);
        }
    }
}

impl BusDevice for PciConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (RESET_CONTROL, [byte]) => *byte = self.host.reset_control(),
            _ if !self.host.has_config_ports() => {}
            (0, data) if data.len() == 4 => {
                data.copy_from_slice(&self.host.address().to_le_bytes());
            }
            (DATA.., data) => {
                if let Some(base) = self.host.selected() {
                    self.host.config_read(base + (offset - DATA), data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (RESET_CONTROL, &[byte]) => self.write_reset_control(byte),
            _ if !self.host.has_config_ports() => {}
            (0, &[a, b, c, d]) => self.host.set_address(u32::from_le_bytes([a, b, c, d])),
            (DATA.., data) => {
                if let Some(base) = self.host.selected() {
                    self.host.config_write(base + (offset - DATA), data);
                }
            }
            _ => {}
        }
    }
}

/// Memory-mapped configuration space.
#[derive(Debug)]
pub struct PciEcam(Arc<PciHost>);

impl PciEcam {
    /// The ECAM window of `host`.
    pub fn new(host: Arc<PciHost>) -> Self {
        Self(host)
    }
}

impl ConcurrentBusDevice for PciEcam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

/// The window of memory BARs, to be put on the bus at [`PciHost::window`].
///
/// An access takes the lock of the function that decodes it and no other: a vCPU that waits for
/// one device keeps no other vCPU from another.
#[derive(Debug)]
pub struct PciWindow(Arc<PciHost>);

impl PciWindow {
    /// The BAR window of `host`.
    pub fn new(host: Arc<PciHost>) -> Self {
        Self(host)
    }
}

impl ConcurrentBusDevice for PciWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0
            .window_read(self.0.window().start.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0
            .window_write(self.0.window().start.saturating_add(offset), data);
    }
}
