//! Builds a machine from its config: first everything of the host that may be missing, then KVM,
//! then the devices, last the vCPUs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgevmm_config::{ConsoleDevice, ConsoleOutput, Topology, VmConfig};
use edgevmm_devices::GuestMemory;
use edgevmm_devices::ahci::{self, Ahci, AhciConfig, Drive};
use edgevmm_devices::bus::{BusError, Shared, shared};
use edgevmm_devices::console::{ConsoleInput, ConsoleSink};
use edgevmm_devices::legacy::clock::MonotonicClock;
use edgevmm_devices::legacy::debug_port::LineSink;
use edgevmm_devices::legacy::pflash::PflashConfig;
use edgevmm_devices::pci::watchdog::{Watchdog, WatchdogConfig};
use edgevmm_devices::pci::{LpcBridge, PciConfigPorts, PciEcam, PciError, PciHost, PciWindow};
use edgevmm_devices::platform::{IrqLine, MsiVectors, Platform};
use edgevmm_devices::virtio::VirtioDevice;
use edgevmm_devices::virtio::balloon::{Balloon, BalloonHandle};
use edgevmm_devices::virtio::console::{Console, ConsoleConfig, Resizer, TerminalSize};
use edgevmm_devices::virtio::rng::Rng;
use edgevmm_devices::virtio::transport::{VirtioPci, VirtioPciConfig, VirtioPciError};
use kvm_ioctls::Kvm;

use super::channels::Channels;
use super::disks::{self, Disk, DiskDevice, OpenDisk};
use super::firmware_data;
use super::functions::{BootDevice, Function};
use super::legacy::{LegacyConfig, LegacyDevices, debug_sink};
use super::network::{self, NetworkError};
use super::storage::StorageError;
use super::{Machine, boot_choice, identity};
use crate::boot::{Boot, BootError, BootPlan, net_rom};
use crate::channel::ChannelError;
use crate::console::ConsoleHub;
use crate::console::ends::{self, ConsoleError, Pty};
use crate::device_loop::DeviceThread;
use crate::kvm::cpuid;
use crate::kvm::doorbells::KvmDoorbells;
use crate::kvm::interrupts::Interrupts;
use crate::kvm::vcpu::{Buses, Surroundings, Vcpu, Vcpus};
use crate::kvm::{self, KvmError, ReadOnlyMemory, Vm, call, msrs};
use crate::layout::{
    COM1_IRQ, ECAM_BASE, ECAM_LEN, PCI_CONFIG_PORT, PCI_IRQS, PCI_SLOTS, PCI_WINDOW_BASE,
    PCI_WINDOW_LEN, RTC_IRQ, SCI_IRQ, ovmf_pci_hole,
};
use crate::lifecycle::Mailbox;
use crate::memory::{self, MemoryError};

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The vCPUs' topology.
    #[error(transparent)]
    Topology(#[from] edgevmm_config::TopologyError),
    /// A disk.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// What starts the guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The console's host end.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A channel's host end.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// PCI configuration space.
    #[error("Can't make the PCI bus")]
    Pci(#[from] PciError),
    /// A virtio device.
    #[error("Can't put a device on the PCI bus")]
    Virtio(#[from] VirtioPciError),
    /// More devices than slots.
    #[error(
        "The machine has more devices than the {} free PCI slots: use fewer disks and network \
         interfaces",
        PCI_SLOTS - 1
    )]
    Slots,
    /// A bus range.
    #[error("The machine's address map is inconsistent")]
    Bus(#[from] BusError),
    /// A host resource.
    #[error("Can't get {what} for the machine")]
    Host {
        /// What for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The debug port's file.
    #[error("Can't write the firmware's debug output to {}", path.display())]
    Debug {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] crate::tables::acpi::AcpiError),
    /// Firmware data.
    #[error("Can't describe the machine to its firmware")]
    Firmware(#[from] edgevmm_devices::legacy::fw_cfg::FwCfgError),
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// Devices on the PCI bus, as they are added.
struct PciBuilder<'a> {
    host: PciHost,
    interrupts: &'a Interrupts,
    platform: &'a Platform,
    memory: &'a Arc<GuestMemory>,
    /// BARs are placed by us when no firmware does it.
    place_bars: bool,
    next_slot: u8,
    functions: Vec<Function>,
}

impl PciBuilder<'_> {
    /// Adds `device` and gives its slot.
    fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, BuildError> {
        let place = self.place(VirtioPci::vectors_needed(&*device)?)?;
        let config = VirtioPciConfig {
            slot: self.host.slot(place.slot)?,
            platform: self.platform.clone(),
            msi: place.msi,
            intx: place.intx,
            memory: Arc::clone(self.memory),
            bar_address: place.bar,
        };
        let function = shared(VirtioPci::new(device, config)?);
        self.functions.push(Function::Virtio(Arc::clone(&function)));
        self.host.add(place.slot, function)?;
        Ok(place.slot)
    }

    /// Adds a SATA adapter with `drives` and gives its slot.
    fn add_sata(&mut self, drives: Vec<Drive>) -> Result<u8, BuildError> {
        let place = self.place(1)?;
        let config = AhciConfig {
            slot: self.host.slot(place.slot)?,
            msi: place.msi,
            intx: place.intx,
            memory: Arc::clone(self.memory),
            bar_address: place.bar,
        };
        let function = shared(Ahci::new(drives, config)?);
        self.functions.push(Function::Sata(Arc::clone(&function)));
        self.host.add(place.slot, function)?;
        Ok(place.slot)
    }

    /// Adds a watchdog.
    fn add_watchdog(&mut self) -> Result<(), BuildError> {
        let place = self.place(0)?;
        let config = WatchdogConfig {
            slot: self.host.slot(place.slot)?,
            bar_address: place.bar,
            control: Arc::clone(&self.platform.control),
            clock: Arc::new(MonotonicClock::default()),
        };
        let function = shared(Watchdog::new(config)?);
        let timer = Watchdog::handler(&function);
        let added = self.platform.device_loop.add(Box::new(timer));
        added.map_err(host("the watchdog's events"))?;
        self.functions
            .push(Function::Watchdog(Arc::clone(&function)));
        self.host.add(place.slot, function)?;
        Ok(())
    }

    /// The next slot, for a function with so many vectors.
    fn place(&mut self, vectors: u16) -> Result<Place, BuildError> {
        let slot = self.next_slot;
        if slot >= PCI_SLOTS {
            return Err(BuildError::Slots);
        }
        let irq = PCI_IRQS[usize::from(slot) % PCI_IRQS.len()];
        // Room for the longest BAR of any function.
        let bar = u64::from(slot - 1) * u64::from(VirtioPci::BAR_LEN) + PCI_WINDOW_BASE;
        self.next_slot += 1;
        Ok(Place {
            slot,
            msi: self
                .interrupts
                .vectors(vectors)
                .map_err(host("interrupt events"))?,
            intx: self.interrupts.line(irq).ok_or(BuildError::Slots)?,
            bar: u32::try_from(bar).ok().filter(|_| self.place_bars),
        })
    }
}

/// Where a function goes.
struct Place {
    slot: u8,
    msi: Arc<dyn MsiVectors>,
    intx: Arc<dyn IrqLine>,
    /// Address of its BAR, if it has one from the start.
    bar: Option<u32>,
}

/// The console: its hub, and the ends of both devices, of which one is heard.
struct ConsoleParts {
    hub: Arc<ConsoleHub>,
    serial: (Arc<dyn ConsoleSink>, Arc<ConsoleInput>),
    virtio: (Arc<dyn ConsoleSink>, Arc<ConsoleInput>),
}

/// A console end where nobody listens.
#[derive(Debug)]
struct Unheard;

impl ConsoleSink for Unheard {
    fn write(&self, _: &[u8]) {}
}

fn open_console(config: &VmConfig) -> Result<ConsoleParts, BuildError> {
    let input = || {
        ConsoleInput::new()
            .map(Arc::new)
            .map_err(host("console events"))
    };
    let hub = ConsoleHub::new(input()?);
    let heard: (Arc<dyn ConsoleSink>, _) = (hub.clone(), Arc::clone(hub.input()));
    let unheard: (Arc<dyn ConsoleSink>, _) = (Arc::new(Unheard), input()?);
    let (serial, virtio) = match config.console.device {
        ConsoleDevice::Serial => (heard, unheard),
        ConsoleDevice::Virtio => (unheard, heard),
    };
    Ok(ConsoleParts {
        hub,
        serial,
        virtio,
    })
}

/// Connects the console's host end. A file is made here, so this is the last step that may fail.
fn connect_console(config: &VmConfig, hub: &Arc<ConsoleHub>) -> Result<Option<Pty>, BuildError> {
    match &config.console.output {
        ConsoleOutput::Pty => Ok(Some(Pty::open(hub)?)),
        ConsoleOutput::File(path) => {
            ends::to_file(hub, path)?;
            Ok(None)
        }
        // Whoever starts us connects the standard streams; see `Started`.
        ConsoleOutput::Stdio | ConsoleOutput::None => Ok(None),
    }
}

impl Machine {
    /// Builds the machine that `config` describes. Its devices report to `mailbox`.
    ///
    /// # Errors
    /// Names what can't be had and why; nothing was changed then.
    pub fn build(config: &VmConfig, mailbox: &Mailbox) -> Result<Machine, BuildError> {
        let uuid = identity::uuid(config);
        let topology = config.cpus.topology()?;
        let description = firmware_data::describe(config, topology, uuid);
        let kvm = kvm::open()?;
        let disks = disks::open(config, uuid)?;
        let (mut boot, boot_note) = boot_choice::open(config, &disks, &description)?;
        let net_rom = net_rom(config, &boot)?;
        let (nics, net_helpers) = network::open(config, uuid)?;
        let console = open_console(config)?;

        let base = Base::new(&kvm, config, &boot, mailbox)?;
        let Base {
            vm,
            memory,
            interrupts,
            device_thread,
            platform,
            mut pci_host,
            flash,
        } = base;
        let ovmf = boot.all().any(Boot::places_ecam);
        let lpc = ovmf.then(|| add_lpc(&mut pci_host)).transpose()?;
        let mut pci = PciBuilder {
            host: pci_host,
            interrupts: &interrupts,
            platform: &platform,
            memory: &memory,
            place_bars: !boot.current().places_bars(),
            next_slot: 1,
            functions: Vec::new(),
        };
        let (disks, mut order) = add_disks(&mut pci, disks)?;
        for nic in nics {
            let place = nic.boot_order.map(|place| (place, order.len()));
            let slot = pci.add(nic.into_device(Arc::clone(&platform.device_loop)))?;
            order.extend(place.map(|place| (place, BootDevice::Net { slot })));
        }
        order.sort_unstable();
        let boot_devices: Vec<_> = order.into_iter().map(|(_, device)| device).collect();
        boot.set_boot_slots(&BootDevice::virtio_slots(&boot_devices));
        pci.add(Box::new(Rng::new(Arc::clone(&platform.device_loop))))?;
        let resizer = match config.console.device {
            ConsoleDevice::Serial => None,
            ConsoleDevice::Virtio => Some(add_console(&mut pci, console.virtio)?),
        };
        let channels = Channels::new(config).map_err(host("channels"))?;
        if let Some(ports) = channels.device(&platform.device_loop) {
            pci.add(ports)?;
        }
        let balloon = add_balloon(&mut pci, config)?;
        if config.watchdog.is_some() {
            pci.add_watchdog()?;
        }
        let functions = pci.functions;
        let pci = Arc::new(pci.host);

        let wanted = boot.all().any(Boot::fw_cfg);
        let fw_cfg =
            wanted.then(|| firmware_data::fw_cfg(&description, &boot_devices, ovmf, net_rom));
        let line = |gsi| interrupts.line(gsi).ok_or(BuildError::Slots);
        let legacy = LegacyDevices::new(LegacyConfig {
            platform: &platform,
            memory: Arc::clone(&memory),
            ram: config.memory.size.0,
            cpus: config.cpus.count,
            com1: line(COM1_IRQ)?,
            rtc: line(RTC_IRQ)?,
            sci: line(SCI_IRQ)?,
            serial: console.serial,
            fw_cfg: fw_cfg.transpose()?,
            debug: open_debug(config)?,
            boot_port: boot.all().any(Boot::reports),
            flash,
        });
        let legacy = legacy.map_err(host("the real-time clock's timer"))?;
        legacy
            .serve(&platform)
            .map_err(host("the legacy devices' events"))?;
        let mut buses = Buses::default();
        legacy.attach(&mut buses)?;
        attach_pci(&pci, &platform, ovmf, &mut buses)?;

        pci.set_face(boot.current().bridge(), boot.current().config_ports());
        legacy.reset(boot.current().reports());
        let entry = boot.load(&memory)?;
        let chips = vm.chips()?;
        let surroundings = Surroundings {
            buses: Arc::new(buses),
            memory: Arc::clone(&memory),
            report: mailbox.vcpu_report(),
        };
        let vcpus = create_vcpus(&kvm, &vm, topology, config.cpus.count)?;
        let vcpus = Vcpus::start(vcpus, &surroundings, entry)?;
        let (agent, channels) = channels.connect(config)?;
        let pty = connect_console(config, &console.hub)?;
        Ok(Machine {
            vcpus,
            pci,
            functions,
            legacy,
            lpc,
            disks,
            _device_thread: device_thread,
            net_helpers,
            agent,
            channels,
            pty,
            resizer,
            balloon,
            console: console.hub,
            boot,
            boot_note,
            chips,
            _interrupts: interrupts,
            vm,
            memory,
        })
    }
}

/// What the devices are built on.
struct Base {
    vm: Vm,
    memory: Arc<GuestMemory>,
    interrupts: Interrupts,
    device_thread: DeviceThread,
    platform: Platform,
    pci_host: PciHost,
    /// UEFI variables that last, with their address.
    flash: Option<(u64, PflashConfig)>,
}

impl Base {
    fn new(
        kvm: &Kvm,
        config: &VmConfig,
        boot: &BootPlan,
        mailbox: &Mailbox,
    ) -> Result<Base, BuildError> {
        let memory = memory::create(config.memory.size.0, config.memory.hugepages)?;
        let mut vm = Vm::new(kvm, &memory)?;
        for (address, rom) in boot.all().flat_map(Boot::roms) {
            vm.map_readonly(address, ReadOnlyMemory::Rom(rom))?;
        }
        let flash = boot.all().find_map(Boot::flash);
        let flash = flash.map(|(address, vars)| {
            let window = vm.map_flash(address, vars.array())?;
            Ok::<_, KvmError>((address, vars, window))
        });
        let flash = flash.transpose()?;
        // With the RAM, before the interrupt controllers: a slot that is set after they have put
        // themselves on KVM's buses waits until the kernel is sure that nobody uses the old ones.
        let pci_host = if boot.all().any(Boot::places_ecam) {
            PciHost::new(ovmf_pci_hole(config.memory.size.0))?.with_movable_ecam(ECAM_BASE)
        } else {
            let host = PciHost::new(PCI_WINDOW_BASE..PCI_WINDOW_BASE + PCI_WINDOW_LEN)?;
            let config_memory = Arc::clone(host.config_memory());
            vm.map_readonly(ECAM_BASE, ReadOnlyMemory::PciConfig(config_memory))?;
            host
        };
        vm.create_interrupt_controllers()?;
        let interrupts = Interrupts::new(vm.fd())?;
        let device_thread = DeviceThread::start().map_err(host("a device thread"))?;
        let platform = Platform {
            doorbells: Arc::new(KvmDoorbells::new(Arc::clone(vm.fd()))),
            device_loop: device_thread.handle(),
            control: mailbox.control(),
        };
        let flash = flash.map(|(address, vars, window)| {
            let config = PflashConfig {
                array: Arc::clone(vars.array()),
                store: vars,
                window,
                control: Arc::clone(&platform.control),
            };
            (address, config)
        });
        Ok(Base {
            vm,
            memory,
            interrupts,
            device_thread,
            platform,
            pci_host,
            flash,
        })
    }
}

/// Adds a virtio console between these ends.
fn add_console(
    pci: &mut PciBuilder<'_>,
    (sink, input): (Arc<dyn ConsoleSink>, Arc<ConsoleInput>),
) -> Result<Resizer, BuildError> {
    let size = TerminalSize::default();
    let device_loop = Arc::clone(&pci.platform.device_loop);
    let device = Console::new(ConsoleConfig { sink, input, size }, device_loop);
    let resizer = device.resizer();
    pci.add(Box::new(device))?;
    Ok(resizer)
}

/// Adds a balloon if there is to be one. Reserved huge pages could not go back to the host.
fn add_balloon(
    pci: &mut PciBuilder<'_>,
    config: &VmConfig,
) -> Result<Option<BalloonHandle>, BuildError> {
    if !config.memory.balloon || config.memory.hugepages {
        return Ok(None);
    }
    let device_loop = Arc::clone(&pci.platform.device_loop);
    let device = Balloon::new(device_loop).map_err(host("balloon events"))?;
    let handle = device.handle();
    pci.add(Box::new(device))?;
    Ok(Some(handle))
}

fn open_debug(config: &VmConfig) -> Result<Option<Arc<dyn LineSink>>, BuildError> {
    let open = |path: &Path| {
        debug_sink(path).map_err(|source| BuildError::Debug {
            path: path.to_path_buf(),
            source,
        })
    };
    config.debugcon.as_deref().map(open).transpose()
}

/// The ROM by which SeaBIOS boots from a network, if it is to.
fn net_rom(config: &VmConfig, boot: &BootPlan) -> Result<Option<Vec<u8>>, BootError> {
    let net = config.nets.iter().any(|net| net.bootindex.is_some());
    let wanted = net && boot.all().any(Boot::net_rom);
    let rom = wanted.then(|| net_rom::read(config.boot.net_rom.as_deref()));
    rom.transpose()
}

/// Devices to boot from, each with its place: that of the config, and among equals its number.
type BootOrder = Vec<((u32, usize), BootDevice)>;

/// Adds the disks and gives those to boot from.
fn add_disks(
    pci: &mut PciBuilder<'_>,
    open: Vec<OpenDisk>,
) -> Result<(Vec<Disk>, BootOrder), BuildError> {
    let (mut disks, mut order, mut drives) = (Vec::new(), Vec::new(), Vec::new());
    for (number, disk) in open.into_iter().enumerate() {
        let place = disk.boot_order.map(|place| (place, number));
        let (device, disk) = disk.into_device(Arc::clone(&pci.platform.control));
        match device {
            DiskDevice::Sata(drive) => drives.push((place, *drive)),
            DiskDevice::Virtio(device) => {
                let slot = pci.add(device)?;
                order.extend(place.map(|place| (place, BootDevice::Virtio { slot })));
            }
        }
        disks.push(disk);
    }
    let mut drives = drives.into_iter().peekable();
    while drives.peek().is_some() {
        let (places, some): (Vec<_>, Vec<_>) = drives.by_ref().take(ahci::PORTS).unzip();
        let slot = pci.add_sata(some)?;
        let on_ports = places.into_iter().enumerate();
        order.extend(on_ports.filter_map(|(port, place)| {
            place.map(|place| (place, BootDevice::Sata { slot, port }))
        }));
    }
    Ok((disks, order))
}

/// Puts PCI on the buses.
fn attach_pci(
    pci: &Arc<PciHost>,
    platform: &Platform,
    movable_ecam: bool,
    buses: &mut Buses,
) -> Result<(), BusError> {
    let (host, control) = (|| Arc::clone(pci), Arc::clone(&platform.control));
    let ports = shared(PciConfigPorts::new(host(), control));
    buses
        .pio
        .insert(u64::from(PCI_CONFIG_PORT), PciConfigPorts::LEN, ports)?;
    if !movable_ecam {
        let ecam = Arc::new(PciEcam::new(host()));
        buses.mmio.insert(ECAM_BASE, ECAM_LEN, ecam)?;
    }
    let window = pci.window();
    buses.mmio.insert(
        window.start,
        window.end - window.start,
        Arc::new(PciWindow::new(host())),
    )
}

/// Adds the LPC bridge, which OVMF looks for.
fn add_lpc(host: &mut PciHost) -> Result<Shared<LpcBridge>, PciError> {
    let lpc = shared(LpcBridge::new(host.slot(LpcBridge::SLOT)?));
    host.add(LpcBridge::SLOT, lpc.clone())?;
    Ok(lpc)
}

fn create_vcpus(kvm: &Kvm, vm: &Vm, topology: Topology, count: u8) -> Result<Vec<Vcpu>, KvmError> {
    let supported = cpuid::supported(kvm)?;
    let indices = msrs::state_indices(kvm)?;
    let create = |index| {
        let apic_id = u64::from(topology.apic_id(index));
        let fd = vm.fd().create_vcpu(apic_id).map_err(call("make a vCPU"))?;
        let cpuid = cpuid::for_vcpu(&supported, topology, index)?;
        fd.set_cpuid2(&cpuid).map_err(call("set a vCPU's CPUID"))?;
        Vcpu::new(vm, index, fd, &indices)
    };
    (0..count).map(create).collect()
}
