//! The adapter as a PCI function, and its registers that are of no port (AHCI 1.3.1, 2 and 3.1).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PORTS;
use super::command::SLOTS;
use super::drive::Drive;
use super::interrupts::Interrupts;
use super::port::Port;
use super::registers::{PortState, offset};
use crate::GuestMemory;
use crate::pci::config_space::{ConfigSpace, ConfigSpaceBuilder, ConfigSpaceState, Identity};
use crate::pci::dword::dword_parts;
use crate::pci::msi::Msi;
use crate::pci::{DecodedBars, PciError, PciFunction, PciSlot};
use crate::platform::{IrqLine, MsiVectors};
use crate::state::{StateError, ensure, same};

/// An ICH9's in AHCI mode: old drivers know it by name, new ones by its class.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x2922,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x01_0601,
    revision: 2,
};

const BAR: u8 = 5;

/// Registers by offset.
const CAP: u64 = 0x00;
const GHC: u64 = 0x04;
const IS: u64 = 0x08;
const PI: u64 = 0x0c;
const VS: u64 = 0x10;
const FIRST_PORT: u64 = 0x100;
const PORT_LEN: u64 = 0x80;

/// CAP: 64-bit addresses, queued commands, command list override, AHCI only, 3 Gb/s.
const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 18 | 2 << 20;
const GHC_RESET: u32 = 1 << 0;
const GHC_INTERRUPTS: u32 = 1 << 1;
const GHC_AHCI: u32 = 1 << 31;
const VERSION: u32 = 0x0001_0301;

/// Where an adapter sits in the machine.
#[derive(Debug)]
pub struct AhciConfig {
    /// The slot that was reserved for it.
    pub slot: PciSlot,
    /// One vector.
    pub msi: Arc<dyn MsiVectors>,
    /// The line of interrupt pin A.
    pub intx: Arc<dyn IrqLine>,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Address of the BAR after power-on, for machines without firmware. A multiple of
    /// [`Ahci::BAR_LEN`].
    pub bar_address: Option<u32>,
}

/// A SATA adapter as a PCI function.
#[derive(Debug)]
pub struct Ahci {
    config: ConfigSpace,
    msi: Msi,
    interrupts: Arc<Interrupts>,
    ports: Vec<Port>,
}

impl Ahci {
    /// Length of the memory BAR in bytes.
    pub const BAR_LEN: u32 = 0x1000;

    /// An adapter with `drives` on its first ports; those beyond [`PORTS`] are left out.
    ///
    /// # Errors
    /// Fails when the function can't be described on PCI.
    pub fn new(drives: Vec<Drive>, config: AhciConfig) -> Result<Self, PciError> {
        let mut builder = ConfigSpaceBuilder::new(&IDENTITY);
        builder.interrupt_pin_a();
        builder.memory_bar(BAR, Self::BAR_LEN, config.bar_address.unwrap_or(0))?;
        let capability = Msi::add_capability(&mut builder)?;
        let space = builder.build(config.slot);
        let page = space.page().clone();
        let msi = Msi::new(page.clone(), capability, config.msi.clone());
        let control = msi.control().clone();
        let interrupts = Arc::new(Interrupts::new(config.msi, control, config.intx, page));
        let mut drives = drives.into_iter();
        let port = |index| {
            let (interrupts, memory) = (Arc::clone(&interrupts), Arc::clone(&config.memory));
            Port::new(index, drives.next(), interrupts, memory)
        };
        Ok(Self {
            ports: (0..PORTS).map(port).collect(),
            config: space,
            msi,
            interrupts,
        })
    }

    /// Stops the ports with nothing in flight and gives the function's state. Guest memory is left
    /// alone until [`Ahci::resume`].
    ///
    /// Call this with the vCPUs paused.
    pub fn suspend(&mut self) -> AhciState {
        let ports = self.ports.iter_mut().map(Port::suspend).collect();
        AhciState {
            config: self.config.state(),
            ports,
            pending: self.interrupts.ports(),
            enabled: self.interrupts.enabled(),
        }
    }

    /// Takes up a state that [`Ahci::suspend`] gave; goes on with [`Ahci::resume`].
    ///
    /// Call this with the vCPUs paused, and [`PciHost::restore`](crate::pci::PciHost::restore)
    /// afterwards.
    ///
    /// # Errors
    /// Refuses a state that this function can't be in; it is as after power-on then.
    pub fn restore(&mut self, state: &AhciState) -> Result<(), StateError> {
        self.reset();
        let restored = self.take_up(state);
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    fn take_up(&mut self, state: &AhciState) -> Result<(), StateError> {
        same("number of SATA ports", state.ports.len(), self.ports.len())?;
        ensure(
            state.pending < 1 << PORTS,
            "SATA ports with interrupts",
            state.pending,
        )?;
        self.config.restore(&state.config)?;
        self.msi.update();
        for (port, state) in self.ports.iter_mut().zip(&state.ports) {
            port.restore(state)?;
        }
        self.interrupts.set(state.pending, state.enabled);
        Ok(())
    }

    /// Lets a suspended adapter serve its ports again.
    pub fn resume(&mut self) {
        self.ports.iter_mut().for_each(Port::resume);
    }

    fn read(&self, register: u64) -> u32 {
        match register {
            CAP => CAPABILITIES | count(SLOTS) << 8 | count(PORTS),
            GHC if self.interrupts.enabled() => GHC_AHCI | GHC_INTERRUPTS,
            GHC => GHC_AHCI,
            IS => self.interrupts.ports(),
            PI => (1 << PORTS) - 1,
            VS => VERSION,
            _ => match split(register) {
                Some((port, register)) => {
                    self.ports.get(port).map_or(0, |port| port.read(register))
                }
                None => 0,
            },
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        match register {
            GHC if value & GHC_RESET != 0 => self.reset_ports(true),
            GHC => self.interrupts.enable(value & GHC_INTERRUPTS != 0),
            IS => {
                self.interrupts.clear(value);
                // Those that still have a cause are set again.
                self.ports.iter().for_each(Port::raise);
            }
            _ => {
                if let Some((port, register)) = split(register)
                    && let Some(port) = self.ports.get_mut(port)
                {
                    port.write(register, value);
                }
            }
        }
    }

    fn reset_ports(&mut self, by_driver: bool) {
        for port in &mut self.ports {
            port.reset(by_driver);
        }
        self.interrupts.set(0, false);
    }
}

/// A number as CAP has it: less one.
fn count(number: usize) -> u32 {
    u32::try_from(number - 1).unwrap_or(0)
}

/// Port and register of an offset.
fn split(offset: u64) -> Option<(usize, u64)> {
    let from = offset.checked_sub(FIRST_PORT)?;
    let port = usize::try_from(from / PORT_LEN).ok()?;
    Some((port, from % PORT_LEN))
}

/// Whether bits of a register act where they are written as ones.
fn acts(register: u64) -> bool {
    let in_port = split(register).map(|(_, register)| register);
    register == IS
        || matches!(
            in_port,
            Some(offset::IS | offset::SERR | offset::SACT | offset::CI)
        )
}

impl PciFunction for Ahci {
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.msi.update();
        self.interrupts.sync_line();
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        for part in dword_parts(offset, data.len()) {
            part.extract(self.read(part.dword), data);
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        for part in dword_parts(offset, data.len()) {
            let (value, mask) = part.insert(data);
            let kept = if mask == u32::MAX || acts(part.dword) {
                0
            } else {
                self.read(part.dword) & !mask
            };
            self.write(part.dword, value & mask | kept);
        }
    }

    fn reset(&mut self) {
        self.reset_ports(false);
        self.config.reset();
        self.msi.update();
        self.msi.clear_pending();
        self.interrupts.sync_line();
    }
}

/// State of an [`Ahci`] with its drives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AhciState {
    /// Configuration space.
    pub config: ConfigSpaceState,
    /// Each port with its drive.
    pub ports: Vec<PortState>,
    /// IS.
    pub pending: u32,
    /// GHC.IE.
    pub enabled: bool,
}
