//! The PCI transport of virtio 1.2, section 4.1: modern only, everything in one memory BAR.
//!
//! Left out: the legacy and transitional interfaces, notification data, per-queue reset, shared
//! memory regions and the administration queue. Bus mastering in COMMAND is not heeded: an active
//! device accesses its queues and sends MSIs with the bit clear as well.
//!
//! Access by configuration space (VIRTIO_PCI_CAP_PCI_CFG) has a limit of its own, because reads
//! of configuration space are answered from memory: the BAR is read when the driver sets up the
//! window (bar, offset, length), not when it reads the data. Drivers that set up the window for
//! each access, as firmware does, can't tell the difference. Writes of the data are carried out.

mod common_cfg;
mod doorbells;
mod interrupts;
mod layout;
#[cfg(test)]
mod tests;
mod window;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use common_cfg::{CommonState, QueueSetup};
pub use interrupts::InterruptState;

use common_cfg::CommonCfg;
use doorbells::QueueDoorbells;
use interrupts::Interrupts;
use layout::{BAR, COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_STRIDE};
use window::{ConfigWindow, WindowEvent};

use super::{Activation, ActiveQueue, DeviceState, DriverError, Notifier, VirtioDevice, status};
use crate::GuestMemory;
use crate::pci::config_space::{ConfigSpace, ConfigSpaceState};
use crate::pci::msix::{Msix, MsixState};
use crate::pci::{DecodedBars, PciError, PciFunction, PciSlot};
use crate::platform::{IrqLine, MsiVectors, Platform};
use crate::state::{StateError, ensure};

/// Status bits that the driver may set.
const DRIVER_STATUS: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;

/// Why a device can't be put on the PCI bus.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The device has too many queues for the transport.
    #[error(
        "A virtio device can't have {queues} queues on PCI, at most {}",
        layout::MAX_QUEUES
    )]
    TooManyQueues {
        /// How many it has.
        queues: usize,
    },
    /// A queue's largest size is no power of two up to 32768.
    #[error("A virtio queue can't have {size} entries")]
    InvalidQueueSize {
        /// The size.
        size: u16,
    },
    /// The function can't be described on PCI.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The host has no more events.
    #[error("Failed to create an event for a virtio queue")]
    Kick(#[source] io::Error),
}

/// Where a virtio function sits in the machine.
#[derive(Debug)]
pub struct VirtioPciConfig {
    /// The slot that was reserved for it.
    pub slot: PciSlot,
    /// The machine.
    pub platform: Platform,
    /// As many vectors as [`VirtioPci::vectors_needed`] says.
    pub msi: Arc<dyn MsiVectors>,
    /// The line of interrupt pin A.
    pub intx: Arc<dyn IrqLine>,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Address of the BAR after power-on, for machines without firmware. A multiple of
    /// [`VirtioPci::BAR_LEN`].
    pub bar_address: Option<u32>,
}

/// What the device does with its driver's queues.
#[derive(Debug)]
enum Service {
    /// There is no driver, or one whose queues can't be served.
    Idle,
    /// Serves them.
    Running,
    /// Has given them back until it goes on.
    Suspended(Vec<ActiveQueue>),
}

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemory>,
    config: ConfigSpace,
    window: ConfigWindow,
    msix: Msix,
    common: CommonCfg,
    interrupts: Arc<Interrupts>,
    doorbells: QueueDoorbells,
    service: Service,
}

impl VirtioPci {
    /// Length of the memory BAR in bytes.
    pub const BAR_LEN: u32 = layout::BAR_LEN;

    /// Number of MSI-X vectors that the function of `device` has: one for config changes and one
    /// for each queue.
    ///
    /// # Errors
    /// Refuses a device with more queues than there is room for.
    pub fn vectors_needed(device: &dyn VirtioDevice) -> Result<u16, VirtioPciError> {
        let queues = device.queue_sizes().len();
        match u16::try_from(queues + 1) {
            Ok(vectors) if queues <= layout::MAX_QUEUES => Ok(vectors),
            _ => Err(VirtioPciError::TooManyQueues { queues }),
        }
    }

    /// Makes a function of `device`.
    ///
    /// # Errors
    /// Refuses a device that the transport can't express and fails when the host has no more
    /// events.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        config: VirtioPciConfig,
    ) -> Result<Self, VirtioPciError> {
        let vectors = Self::vectors_needed(&*device)?;
        let sizes = device.queue_sizes();
        if let Some(size) = sizes.iter().copied().find(|size| !size.is_power_of_two()) {
            return Err(VirtioPciError::InvalidQueueSize { size });
        }
        let address = config.bar_address.unwrap_or(0);
        let mut builder = layout::builder(device.device_type(), address)?;
        let msix = Msix::add_capability(&mut builder, layout::MSIX, vectors)?;
        let window = layout::add_capabilities(&mut builder, vectors - 1)?;
        let space = builder.build(config.slot);

        let page = space.page().clone();
        let msix = Msix::new(page.clone(), msix, vectors, config.msi.clone());
        let interrupts = Arc::new(Interrupts::new(
            sizes.len(),
            config.msi,
            msix.control().clone(),
            config.intx,
            page.clone(),
        ));
        let doorbells = QueueDoorbells::new(config.platform.doorbells, sizes.len());
        Ok(Self {
            common: CommonCfg::new(device.features(), sizes, interrupts.clone()),
            doorbells: doorbells.map_err(VirtioPciError::Kick)?,
            window: ConfigWindow::new(page, window),
            memory: config.memory,
            config: space,
            msix,
            interrupts,
            device,
            service: Service::Idle,
        })
    }

    /// Stops the device with nothing in flight and gives the function's state. It leaves guest
    /// memory alone until [`VirtioPci::resume`], so memory that is saved meanwhile fits the state.
    ///
    /// Call this with the vCPUs paused.
    pub fn suspend(&mut self) -> VirtioPciState {
        if let Service::Running = self.service {
            let queues = self.device.deactivate();
            self.common.record_positions(&queues);
            // One that broke down must not be tried again before its driver resets it.
            let broken = self.interrupts.status().get() & status::DEVICE_NEEDS_RESET != 0;
            self.service = if broken {
                Service::Idle
            } else {
                Service::Suspended(queues)
            };
            self.place_doorbells();
        }
        VirtioPciState {
            config: self.config.state(),
            msix: self.msix.state(),
            interrupts: self.interrupts.state(),
            common: self.common.state().clone(),
            active: matches!(self.service, Service::Suspended(_)),
            device: self.device.state(),
        }
    }

    /// Takes up a state that [`VirtioPci::suspend`] gave. An active device is suspended then: let
    /// it go on by [`VirtioPci::resume`] once memory and interrupt controllers have their state.
    ///
    /// Call this with the vCPUs paused, and [`PciHost::restore`](crate::pci::PciHost::restore)
    /// afterwards.
    ///
    /// # Errors
    /// Refuses a state that this function can't be in; it is as after power-on then.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), StateError> {
        self.reset();
        let restored = self.take_up(state);
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    fn take_up(&mut self, state: &VirtioPciState) -> Result<(), StateError> {
        self.config.restore(&state.config)?;
        self.msix.restore(&state.msix)?;
        self.interrupts.restore(&state.interrupts)?;
        self.common.restore(&state.common)?;
        self.device.restore(&state.device)?;
        if state.active {
            let bits = self.interrupts.status().get();
            let works = status::DRIVER_OK | status::DEVICE_NEEDS_RESET;
            let works = bits & works == status::DRIVER_OK;
            ensure(works, "status of an active virtio device", bits)?;
            let queues = self.active_queues().map_err(StateError::Queues)?;
            self.service = Service::Suspended(queues);
            self.place_doorbells();
        }
        Ok(())
    }

    /// Lets a suspended device serve its queues again; does nothing with any other.
    pub fn resume(&mut self) {
        match std::mem::replace(&mut self.service, Service::Idle) {
            Service::Suspended(queues) => {
                let indices: Vec<_> = queues.iter().map(|queue| queue.index.into()).collect();
                self.start(queues);
                for index in indices {
                    self.doorbells.ring(index);
                }
            }
            other => self.service = other,
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset_device();
        }
        let status = self.interrupts.status();
        let new = value & !status.get();
        status.add(new & DRIVER_STATUS);
        if new & status::FEATURES_OK != 0 && self.common.features_acceptable() {
            status.add(status::FEATURES_OK);
        }
        if new & status::DRIVER_OK != 0 && status.get() & status::FEATURES_OK != 0 {
            status.add(status::DRIVER_OK);
            if status.get() & (status::FAILED | status::DEVICE_NEEDS_RESET) == 0 {
                self.activate();
            }
        }
    }

    /// Takes the driver's queues into service; a driver whose queues are invalid is asked for a
    /// reset.
    fn activate(&mut self) {
        match self.active_queues() {
            Ok(queues) => self.start(queues),
            Err(error) => self.interrupts.needs_reset(&error),
        }
    }

    /// The queues that the driver enabled, with their doorbells.
    fn active_queues(&self) -> Result<Vec<ActiveQueue>, DriverError> {
        let queues = self.common.build_queues(&self.memory)?;
        let active = queues.into_iter().filter_map(|(index, queue)| {
            let kick = self.doorbells.kick(index)?.clone();
            Some(ActiveQueue { index, queue, kick })
        });
        Ok(active.collect())
    }

    fn start(&mut self, queues: Vec<ActiveQueue>) {
        let started = self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.common.features(),
            queues,
            notifier: self.interrupts.clone(),
        });
        self.service = match started {
            Ok(()) => Service::Running,
            Err(error) => {
                tracing::error!(%error, "failed to start a virtio device");
                self.interrupts.set_needs_reset();
                Service::Idle
            }
        };
        self.place_doorbells();
    }

    /// The driver's reset. Returns when the device serves no request any more.
    fn reset_device(&mut self) {
        self.doorbells.place(None, |_| false);
        if let Service::Running = std::mem::replace(&mut self.service, Service::Idle) {
            self.device.deactivate();
        }
        self.device.reset();
        self.common.reset();
        self.interrupts.reset();
        // An interrupt that waits to be unmasked would come after the reset (2.4.1).
        self.msix.clear_pending();
    }

    fn place_doorbells(&mut self) {
        let [bar, ..] = self.config.decoded();
        let idle = matches!(self.service, Service::Idle);
        let base = bar.filter(|_| !idle).map(|bar| bar.base);
        let common = &self.common;
        self.doorbells
            .place(base, |index| common.queue_enabled(index));
    }

    fn read_region(&mut self, offset: u64, data: &mut [u8]) {
        let len = data.len();
        if let Some(at) = COMMON.find(offset, len) {
            self.common.read(at, data);
        } else if let Some(at) = ISR.find(offset, len) {
            data.fill(0);
            if let (0, [isr, ..]) = (at, data) {
                *isr = self.interrupts.take_isr();
            }
        } else if let Some(at) = DEVICE.find(offset, len) {
            data.fill(0);
            self.device.read_config(at, data);
        } else if NOTIFY.find(offset, len).is_some() {
            data.fill(0);
        } else if let Some(at) = MSIX_TABLE.find(offset, len) {
            self.msix.read_table(at, data);
        } else if let Some(at) = MSIX_PENDING.find(offset, len) {
            self.msix.read_pending(at, data);
        }
    }

    fn write_region(&mut self, offset: u64, data: &[u8]) {
        let len = data.len();
        if let Some(at) = COMMON.find(offset, len) {
            if let Some(status) = self.common.write(at, data) {
                self.write_status(status);
            }
        } else if let Some(at) = DEVICE.find(offset, len) {
            let negotiated = self.interrupts.status().get() & status::FEATURES_OK != 0;
            let features = if negotiated {
                self.common.features()
            } else {
                0
            };
            self.device.write_config(features, at, data);
        } else if let Some(at) = NOTIFY.find(offset, len) {
            let index = usize::try_from(at / u64::from(NOTIFY_STRIDE)).unwrap_or(usize::MAX);
            let idle = matches!(self.service, Service::Idle);
            if !idle && self.common.queue_enabled(index) {
                self.doorbells.ring(index);
            }
        } else if let Some(at) = MSIX_TABLE.find(offset, len) {
            self.msix.write_table(at, data);
        }
    }

    /// Carries out what a write at `offset` of configuration space asks of the window.
    fn access_window(&mut self, offset: u16, len: usize) {
        let Some(access) = self.window.access(offset, len) else {
            return;
        };
        if access.event == WindowEvent::Written {
            self.write_region(access.offset, access.data());
        }
        let mut data = [0xff; 4];
        if ISR.find(access.offset, access.len) == Some(0) && access.event != WindowEvent::Completed
        {
            data[0] = self.interrupts.isr();
        } else if let Some(data) = data.get_mut(..access.len) {
            self.read_region(access.offset, data);
        }
        self.window.set_data(data);
    }
}

impl PciFunction for VirtioPci {
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let gates = self.interrupts.gates();
        self.config.write(offset, data);
        if self.interrupts.gates() != gates {
            self.interrupts.sync_line();
        }
        self.msix.update();
        self.place_doorbells();
        self.access_window(offset, data.len());
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == BAR {
            self.read_region(offset, data);
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar == BAR {
            self.write_region(offset, data);
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.msix.reset();
        self.interrupts.sync_line();
    }
}

/// State of a [`VirtioPci`] with its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// Configuration space.
    pub config: ConfigSpaceState,
    /// MSI-X table.
    pub msix: MsixState,
    /// Status, ISR and the vectors in use.
    pub interrupts: InterruptState,
    /// Common configuration structure with the queues.
    pub common: CommonState,
    /// Whether the device serves its queues.
    pub active: bool,
    /// What the device keeps beside its queues.
    pub device: DeviceState,
}
