//! The only place that talks to kvm.ko.
//!
//! Interrupt controllers are all in the kernel (PIC, I/O APIC, local APICs, PIT) rather than
//! split: legacy guests use PIC and I/O APIC at full speed, a level-triggered EOI needs no exit
//! to us, and the userspace I/O APIC that a split irqchip asks for would be code that every
//! guest's interrupts run through. What split saves, the kernel's attack surface, matters less
//! on a node whose guests are the owner's own.

pub mod cpuid;
pub mod crash;
pub mod doorbells;
mod flash;
pub mod interrupts;
pub mod msrs;
pub mod regs;
pub mod vcpu;
pub mod vcpu_state;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use edgevmm_devices::GuestMemory;
use edgevmm_devices::legacy::pflash::FlashWindow;
use edgevmm_devices::pci::config_memory::ConfigMemory;
use edgevmm_devices::state::{StateError, same};
use kvm_bindings::{
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_enable_cap,
    kvm_irqchip, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use self::flash::KvmFlashWindow;
use crate::layout::{ECAM_LEN, IDENTITY_MAP, KVM_TSS};

/// Where the kernel offers KVM.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// The capabilities we can't do without, with the word a user would search for.
const REQUIRED: [(Cap, &str); 12] = [
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::ReadonlyMem, "read-only memory regions"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::ExtCpuid, "extended CPUID"),
    (Cap::MpState, "multi-processor state"),
    (Cap::Pit2, "in-kernel timer"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SignalMsi, "MSI"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::VcpuEvents, "vCPU events"),
];

/// What went wrong with KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM device.
    #[error(
        "There is no {KVM_DEVICE}: enable virtualisation (VT-x or AMD-V) in the firmware setup \
         and load the module: modprobe kvm_intel || modprobe kvm_amd"
    )]
    Missing,
    /// The KVM device may not be opened.
    #[error(
        "No permission to open {KVM_DEVICE}: add yourself to the group kvm (usermod -aG kvm $USER) and log in again"
    )]
    Permission,
    /// The KVM device can't be opened for another reason.
    #[error("Can't open {KVM_DEVICE}")]
    Open(#[source] io::Error),
    /// The kernel's KVM lacks something.
    #[error("This kernel's KVM lacks {0}: a kernel of Linux 5.10 or newer has it")]
    Lacks(&'static str),
    /// A call failed.
    #[error("KVM refused to {what}")]
    Call {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A saved state can't be taken up.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Names a failed KVM call.
pub(crate) fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { what, source }
}

/// Opens KVM and checks that it has what we need.
///
/// # Errors
/// Tells apart a missing device, a missing permission and a missing capability.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT if !Path::new(KVM_DEVICE).exists() => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        libc::ENODEV | libc::ENXIO => KvmError::Missing,
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// Makes a triple fault that is not reported yet part of a vCPU's events, so that a reset takes it
/// away. KVM before Linux 6.0 can't do that: it reports the fault when the vCPU runs again.
fn show_triple_faults(vm: &VmFd) -> Result<bool, KvmError> {
    if vm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) == 0 {
        return Ok(false);
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap).map_err(call("show triple faults"))?;
    Ok(true)
}

/// The interrupt controllers of a machine.
const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// State of the interrupt controllers and the timer.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl fmt::Debug for ChipState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChipState")
            .field("pit", &self.pit)
            .finish_non_exhaustive()
    }
}

/// A VM with its memory, interrupt controllers and timer, before any vCPU.
///
/// Memory slots come first: set later they wait for every vCPU to pass a quiet point.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    /// Keeps what the kernel maps into the guest mapped.
    _memory: Arc<GuestMemory>,
    slots: u32,
    readonly: Vec<ReadOnlyMemory>,
    shows_triple_faults: bool,
}

/// Host memory that a guest sees and can't change; writes to it reach the MMIO bus.
#[derive(Debug, Clone)]
pub enum ReadOnlyMemory {
    /// A ROM.
    Rom(Arc<MmapRegion>),
    /// PCI configuration space, so that reading it costs the guest no exit.
    PciConfig(Arc<ConfigMemory>),
}

impl ReadOnlyMemory {
    fn host_range(&self) -> (u64, u64) {
        match self {
            ReadOnlyMemory::Rom(rom) => (rom.as_ptr() as u64, rom.size() as u64),
            ReadOnlyMemory::PciConfig(memory) => (memory.host_address().get() as u64, ECAM_LEN),
        }
    }
}

impl Vm {
    /// Makes a VM with `memory` as its RAM.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn new(kvm: &Kvm, memory: &Arc<GuestMemory>) -> Result<Vm, KvmError> {
        let fd = kvm.create_vm().map_err(call("make a VM"))?;
        let shows_triple_faults = show_triple_faults(&fd)?;
        let mut vm = Vm {
            shows_triple_faults,
            fd: Arc::new(fd),
            _memory: Arc::clone(memory),
            slots: 0,
            readonly: Vec::new(),
        };
        for region in memory.iter() {
            vm.map(
                region.start_addr().0,
                region.as_ptr() as u64,
                region.len(),
                0,
            )?;
        }
        Ok(vm)
    }

    /// Maps `memory` at `address`.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn map_readonly(&mut self, address: u64, memory: ReadOnlyMemory) -> Result<(), KvmError> {
        let (host, len) = memory.host_range();
        self.map(address, host, len, KVM_MEM_READONLY)?;
        self.readonly.push(memory);
        Ok(())
    }

    /// Maps a flash's `array` at `address`, for reading, as long as its device shows it.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn map_flash(
        &mut self,
        address: u64,
        array: &Arc<MmapRegion>,
    ) -> Result<Arc<dyn FlashWindow>, KvmError> {
        let slot = self.slots;
        self.map_readonly(address, ReadOnlyMemory::Rom(Arc::clone(array)))?;
        let window = KvmFlashWindow::new(Arc::clone(&self.fd), slot, address, Arc::clone(array));
        Ok(Arc::new(window))
    }

    fn map(&mut self, address: u64, host: u64, len: u64, flags: u32) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot: self.slots,
            flags,
            guest_phys_addr: address,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: the host range is a live mapping that `self` keeps for as long as the VM, and
        // nobody else holds Rust references into it: access goes through volatile slices.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(call("map guest memory"))?;
        self.slots += 1;
        Ok(())
    }

    /// Makes the interrupt controllers and the timer. After the memory, before the vCPUs.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        // Only Intel without unrestricted guest uses these two, but they must be set before the
        // first vCPU everywhere.
        self.fd
            .set_identity_map_address(IDENTITY_MAP)
            .map_err(call("place the identity map"))?;
        let tss = usize::try_from(KVM_TSS).unwrap_or(usize::MAX);
        self.fd
            .set_tss_address(tss)
            .map_err(call("place the real-mode TSS"))?;
        self.fd
            .create_irq_chip()
            .map_err(call("make the interrupt controllers"))?;
        // The dummy speaker answers port 0x61 in the kernel.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd.create_pit2(pit).map_err(call("make the timer"))
    }

    /// Reads the state of the interrupt controllers and the timer.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn chips(&self) -> Result<ChipState, KvmError> {
        let mut irqchips = Vec::with_capacity(IRQCHIPS.len());
        for chip_id in IRQCHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(call("read an interrupt controller"))?;
            irqchips.push(chip);
        }
        let pit = self.fd.get_pit2().map_err(call("read the timer"))?;
        Ok(ChipState { irqchips, pit })
    }

    /// Sets the state of the interrupt controllers and the timer.
    ///
    /// # Errors
    /// Refuses a state that has not just these, and fails when the kernel refuses.
    pub fn restore_chips(&self, state: &ChipState) -> Result<(), KvmError> {
        let number = state.irqchips.len();
        same("number of interrupt controllers", number, IRQCHIPS.len())?;
        for (chip, expected) in state.irqchips.iter().zip(IRQCHIPS) {
            same("kind of interrupt controller", chip.chip_id, expected)?;
        }
        for chip in &state.irqchips {
            self.fd
                .set_irqchip(chip)
                .map_err(call("set an interrupt controller"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(call("set the timer"))
    }

    /// The guest's paravirtual clock, in nanoseconds.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock = self.fd.get_clock();
        Ok(clock.map_err(call("read the guest's clock"))?.clock)
    }

    /// Sets the guest's paravirtual clock.
    ///
    /// # Errors
    /// Fails when the kernel refuses.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        self.fd
            .set_clock(&clock)
            .map_err(call("set the guest's clock"))
    }

    /// Whether a triple fault that is not reported yet is part of a vCPU's events.
    pub(crate) fn shows_triple_faults(&self) -> bool {
        self.shows_triple_faults
    }

    /// The VM's descriptor, for the other parts of this module.
    pub(crate) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }
}
