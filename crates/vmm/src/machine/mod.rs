//! A machine: its parts, and what can be done to them as a whole.
//!
//! One thread at a time works on it, as the life cycle has it. Who owns what: the machine owns its vCPUs, the
//! PCI bus (which owns the functions, which own the devices), the legacy devices, the device
//! thread, the console's host ends and the helper processes of its networks.

mod boot_choice;
mod builder;
mod channels;
pub mod disks;
mod firmware_data;
mod functions;
pub mod identity;
mod lease;
mod legacy;
mod network;
mod state;
mod storage;

use std::path::PathBuf;
use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use edgevmm_devices::ahci::MediaHandle;
use edgevmm_devices::bus::Shared;
use edgevmm_devices::disk::BlockHandle;
use edgevmm_devices::legacy::boot_port::BootPhase;
use edgevmm_devices::pci::{LpcBridge, PciHost};
use edgevmm_devices::virtio::balloon::BalloonHandle;
use edgevmm_devices::virtio::console::Resizer;

pub use builder::BuildError;
pub use network::NetworkError;
pub use state::MachineState;
pub use storage::{Overlay, StorageError, disk_paths, overlay_of, use_disc};

use crate::agent::Agent;
use crate::boot::{BootError, BootPlan};
use crate::channel::ChannelSocket;
use crate::console::ConsoleHub;
use crate::console::ends::Pty;
use crate::device_loop::DeviceThread;
use crate::kvm::interrupts::Interrupts;
use crate::kvm::vcpu::Vcpus;
use crate::kvm::{ChipState, KvmError, Vm};
use disks::Disk;
use functions::Function;
use legacy::LegacyDevices;
use network::NetHelper;

/// Why a machine could not be reset.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What starts the guest can't be loaded again.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Firmware gave up and was the last.
    #[error("The firmware `{0}` can't boot this disk, and no other is installed")]
    NoOther(&'static str),
}

/// A virtual machine, built and ready to run.
///
/// The fields are in the order in which they must go: first what runs, last what it runs on.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vcpus,
    pci: Arc<PciHost>,
    /// The functions on the bus by rising slot.
    functions: Vec<Function>,
    legacy: LegacyDevices,
    lpc: Option<Shared<LpcBridge>>,
    disks: Vec<Disk>,
    _device_thread: DeviceThread,
    net_helpers: Vec<NetHelper>,
    agent: Option<Arc<Agent>>,
    channels: Vec<ChannelSocket>,
    pty: Option<Pty>,
    resizer: Option<Resizer>,
    balloon: Option<BalloonHandle>,
    console: Arc<ConsoleHub>,
    boot: BootPlan,
    boot_note: Option<String>,
    chips: ChipState,
    _interrupts: Interrupts,
    vm: Vm,
    memory: Arc<GuestMemory>,
}

impl Machine {
    /// The machine's console.
    pub fn console(&self) -> &Arc<ConsoleHub> {
        &self.console
    }

    /// Which firmware was chosen and why, where that was left to the disk.
    pub fn boot_note(&self) -> Option<String> {
        self.boot_note.clone()
    }

    /// The pseudo-terminal of the console, if it has one.
    pub fn console_pty(&self) -> Option<PathBuf> {
        self.pty.as_ref().map(|pty| pty.path().to_path_buf())
    }

    /// Tells the guest the size of the console's terminal, if its device can.
    pub fn console_resizer(&self) -> Option<Resizer> {
        self.resizer.clone()
    }

    /// The ways to the machine's disks, by name.
    pub fn disks(&self) -> Vec<(String, BlockHandle)> {
        let way = |disk: &Disk| (disk.name.clone(), disk.handle.clone());
        self.disks.iter().map(way).collect()
    }

    /// The way to the machine's balloon, if it has one.
    pub fn balloon(&self) -> Option<BalloonHandle> {
        self.balloon.clone()
    }

    /// The ways to what is in the machine's CD-ROM drives, by name.
    pub fn drives(&self) -> Vec<(String, MediaHandle)> {
        let way = |disk: &Disk| Some((disk.name.clone(), disk.media.clone()?));
        self.disks.iter().filter_map(way).collect()
    }

    /// The client of its guest agent, if there is a channel to one.
    pub fn agent(&self) -> Option<&Arc<Agent>> {
        self.agent.as_ref()
    }

    /// Lets clients connect to its channels from now on; in tokio's context.
    ///
    /// # Errors
    /// Fails when the process may not wait for more.
    pub fn serve_channels(&mut self) -> std::io::Result<()> {
        self.channels.iter_mut().try_for_each(ChannelSocket::serve)
    }

    /// Lets the vCPUs run, and the devices if they were suspended. Disks try again what the host
    /// has failed.
    pub fn resume(&self) {
        for function in &self.functions {
            function.resume();
        }
        for disk in &self.disks {
            disk.handle.retry();
        }
        if let Err(error) = self.legacy.flush() {
            tracing::warn!(%error, "The UEFI variables still can't be stored");
        }
        self.vcpus.resume();
    }

    /// Halts the vCPUs; devices finish what they have begun.
    pub fn pause(&self) {
        self.vcpus.pause();
        self.functions.iter().for_each(Function::pause);
    }

    /// Looks after the processes that the machine has started, when one of them has ended.
    pub fn check_helpers(&mut self) {
        self.net_helpers.iter_mut().for_each(NetHelper::check);
    }

    /// The processes that the machine has started, as this process knows them.
    pub fn helpers(&self) -> Vec<u32> {
        self.net_helpers.iter().map(NetHelper::pid).collect()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.legacy.press_power_button();
    }

    /// Returns everything but RAM and disks to the state after power-on. The vCPUs must be
    /// paused, and stay so.
    ///
    /// # Errors
    /// Fails when KVM refuses or the kernel file can't be read again.
    pub fn reset(&mut self) -> Result<(), ResetError> {
        self.boot.start_over();
        self.start()
    }

    /// Gives up what was to start the guest for what comes next, as after a reset. The vCPUs must
    /// be paused, and stay so. Gives the name of what starts the guest now.
    ///
    /// # Errors
    /// Fails when nothing comes next, and as [`Machine::reset`] does.
    pub fn fall_back(&mut self) -> Result<&'static str, ResetError> {
        if !self.boot.fall_back() {
            return Err(ResetError::NoOther(self.boot.current().name()));
        }
        self.start()?;
        Ok(self.boot.current().name())
    }

    fn start(&mut self) -> Result<(), ResetError> {
        let boot = self.boot.current();
        self.pci.set_face(boot.bridge(), boot.config_ports());
        self.pci.reset_all();
        self.legacy.reset(boot.reports());
        self.vm.restore_chips(&self.chips)?;
        let entry = self.boot.load(&self.memory)?;
        self.vcpus.reset(entry)?;
        Ok(())
    }

    /// What the project's own boot firmware is at, and what it wrote.
    pub fn boot_report(&self) -> (BootPhase, String) {
        self.legacy.boot_report()
    }

    /// Stops everything and makes what the guest wrote durable. Takes as long as storage does.
    ///
    /// # Errors
    /// Names the disks that could not be flushed.
    pub fn shut_down(&self) -> Result<(), String> {
        self.vcpus.pause();
        // A reset takes the queues away from the devices, so no request is in flight after it.
        self.pci.reset_all();
        let mut failed = Vec::new();
        for disk in &self.disks {
            let Some(backend) = disk.backend.as_ref().filter(|disk| !disk.read_only()) else {
                continue;
            };
            if let Err(error) = backend.flush() {
                failed.push(format!("{}: {}", disk.name, with_sources(&error)));
            }
        }
        if let Err(error) = self.legacy.flush() {
            failed.push(format!("the UEFI variables: {error}"));
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(format!(
                "The last writes may be lost on {}",
                failed.join(", ")
            ))
        }
    }
}

/// An error with what caused it, in one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
