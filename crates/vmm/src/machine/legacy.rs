//! The devices that every PC has, wherever it boots from.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use edgevmm_devices::GuestMemory;
use edgevmm_devices::bus::{BusError, Shared, lock, shared};
use edgevmm_devices::console::{ConsoleInput, ConsoleSink};
use edgevmm_devices::legacy::acpi_pm::{self, AcpiPm, AcpiPmConfig, AcpiPmState};
use edgevmm_devices::legacy::boot_port::{self, BootPhase, BootPort, BootPortState};
use edgevmm_devices::legacy::clock::{MonotonicClock, WallClock};
use edgevmm_devices::legacy::cmos::{self, Cmos, CmosConfig, CmosMachine, CmosState};
use edgevmm_devices::legacy::debug_port::{DebugPort, LineSink};
use edgevmm_devices::legacy::fw_cfg::{self, FwCfg, FwCfgItems, FwCfgState};
use edgevmm_devices::legacy::i8042::{self, ControlPortA, ControlPortAState, I8042, I8042State};
use edgevmm_devices::legacy::pflash::{Pflash, PflashConfig, PflashState};
use edgevmm_devices::legacy::pvpanic::{self, PvPanic, PvPanicState};
use edgevmm_devices::legacy::serial::{self, Serial, SerialConfig, SerialState};
use edgevmm_devices::platform::{IrqLine, Platform};
use edgevmm_devices::state::{StateError, same};
use serde::{Deserialize, Serialize};

use crate::kvm::vcpu::Buses;
use crate::layout::{
    ACPI_PM_PORT, BOOT_PORT, CMOS_PORT, COM1_PORT, CONTROL_PORT_A, DEBUG_PORT, FW_CFG_PORT,
    I8042_PORT, LOW_RAM_END, PVPANIC_PORT,
};

/// What the legacy devices are connected to.
pub(super) struct LegacyConfig<'a> {
    pub platform: &'a Platform,
    pub memory: Arc<GuestMemory>,
    pub ram: u64,
    pub cpus: u8,
    pub com1: Arc<dyn IrqLine>,
    pub rtc: Arc<dyn IrqLine>,
    pub sci: Arc<dyn IrqLine>,
    /// Ends of the serial port.
    pub serial: (Arc<dyn ConsoleSink>, Arc<ConsoleInput>),
    /// Items for firmware; none when a kernel starts straight.
    pub fw_cfg: Option<FwCfgItems>,
    pub debug: Option<Arc<dyn LineSink>>,
    /// Whether there is a port for the project's own boot firmware.
    pub boot_port: bool,
    /// UEFI variables that last, with their address.
    pub flash: Option<(u64, PflashConfig)>,
}

/// The legacy devices of a machine.
#[derive(Debug)]
pub(super) struct LegacyDevices {
    serial: Shared<Serial>,
    cmos: Shared<Cmos>,
    i8042: Shared<I8042>,
    control_a: Shared<ControlPortA>,
    acpi_pm: Shared<AcpiPm>,
    pvpanic: Shared<PvPanic>,
    fw_cfg: Option<Shared<FwCfg>>,
    debug: Option<Shared<DebugPort>>,
    boot_port: Option<Shared<BootPort>>,
    flash: Option<(u64, Shared<Pflash>)>,
}

/// State of [`LegacyDevices`]. The debug port has none that a guest would miss.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LegacyState {
    serial: SerialState,
    cmos: CmosState,
    i8042: I8042State,
    control_a: ControlPortAState,
    acpi_pm: AcpiPmState,
    pvpanic: PvPanicState,
    fw_cfg: Option<FwCfgState>,
    boot_port: Option<BootPortState>,
    flash: Option<PflashState>,
}

impl LegacyDevices {
    pub fn new(config: LegacyConfig<'_>) -> io::Result<LegacyDevices> {
        let control = &config.platform.control;
        let (sink, input) = config.serial;
        let acpi_pm = AcpiPmConfig {
            sci: config.sci,
            control: Arc::clone(control),
            clock: Arc::new(MonotonicClock::default()),
        };
        let cmos = CmosConfig {
            irq: config.rtc,
            clock: Arc::new(WallClock),
            machine: CmosMachine {
                low_ram: config.ram.min(LOW_RAM_END),
                high_ram: config.ram.saturating_sub(LOW_RAM_END),
                cpus: config.cpus,
            },
        };
        Ok(LegacyDevices {
            serial: shared(Serial::new(SerialConfig {
                irq: config.com1,
                sink,
                input,
            })),
            cmos: shared(Cmos::new(cmos)?),
            i8042: shared(I8042::new(Arc::clone(control))),
            control_a: shared(ControlPortA::new(Arc::clone(control))),
            acpi_pm: shared(AcpiPm::new(acpi_pm)),
            pvpanic: shared(PvPanic::new(Arc::clone(control))),
            fw_cfg: config
                .fw_cfg
                .map(|items| shared(FwCfg::new(config.memory, items))),
            debug: config.debug.map(|sink| shared(DebugPort::new(sink))),
            boot_port: (config.boot_port).then(|| shared(BootPort::new(Arc::clone(control)))),
            flash: config
                .flash
                .map(|(address, config)| (address, shared(Pflash::new(config)))),
        })
    }

    /// Puts the devices on the port bus.
    pub fn attach(&self, buses: &mut Buses) -> Result<(), BusError> {
        let ports = &mut buses.pio;
        let at = u64::from;
        ports.insert(at(COM1_PORT), serial::PORT_RANGE, self.serial.clone())?;
        ports.insert(at(CMOS_PORT), cmos::PORT_RANGE, self.cmos.clone())?;
        ports.insert(at(I8042_PORT), i8042::PORT_RANGE, self.i8042.clone())?;
        ports.insert(at(CONTROL_PORT_A), 1, self.control_a.clone())?;
        let acpi_pm = self.acpi_pm.clone();
        ports.insert(at(ACPI_PM_PORT), acpi_pm::PORT_RANGE, acpi_pm)?;
        let pvpanic = self.pvpanic.clone();
        ports.insert(at(PVPANIC_PORT), pvpanic::PORT_RANGE, pvpanic)?;
        if let Some(device) = &self.fw_cfg {
            ports.insert(at(FW_CFG_PORT), fw_cfg::PORT_RANGE, device.clone())?;
        }
        if let Some(debug) = &self.debug {
            ports.insert(at(DEBUG_PORT), 1, debug.clone())?;
        }
        if let Some(port) = &self.boot_port {
            ports.insert(at(BOOT_PORT), boot_port::PORT_RANGE, port.clone())?;
        }
        if let Some((address, flash)) = &self.flash {
            let len = lock(flash).len();
            buses.mmio.insert(*address, len, flash.clone())?;
        }
        Ok(())
    }

    /// Brings what is typed to the serial port, and the clock's interrupts to the guest.
    pub fn serve(&self, platform: &Platform) -> io::Result<()> {
        platform
            .device_loop
            .add(Box::new(Serial::handler(&self.serial)))?;
        platform
            .device_loop
            .add(Box::new(Cmos::handler(&self.cmos)))?;
        Ok(())
    }

    pub fn press_power_button(&self) {
        lock(&self.acpi_pm).press_power_button();
    }

    pub fn state(&self) -> LegacyState {
        LegacyState {
            serial: lock(&self.serial).state(),
            cmos: lock(&self.cmos).state(),
            i8042: lock(&self.i8042).state(),
            control_a: lock(&self.control_a).state(),
            acpi_pm: lock(&self.acpi_pm).state(),
            pvpanic: lock(&self.pvpanic).state(),
            fw_cfg: self.fw_cfg.as_ref().map(|device| lock(device).state()),
            boot_port: self.boot_port.as_ref().map(|port| lock(port).state()),
            flash: self.flash.as_ref().map(|(_, device)| lock(device).state()),
        }
    }

    pub fn restore(&self, state: &LegacyState) -> Result<(), StateError> {
        let (saved, own) = (state.fw_cfg.is_some(), self.fw_cfg.is_some());
        same("number of fw_cfg devices", u64::from(saved), u64::from(own))?;
        let (saved, own) = (state.boot_port.is_some(), self.boot_port.is_some());
        same("number of boot ports", u64::from(saved), u64::from(own))?;
        let (saved, own) = (state.flash.is_some(), self.flash.is_some());
        same("number of flashes", u64::from(saved), u64::from(own))?;
        lock(&self.serial).restore(&state.serial)?;
        lock(&self.cmos).restore(&state.cmos)?;
        lock(&self.i8042).restore(&state.i8042)?;
        lock(&self.control_a).restore(&state.control_a);
        lock(&self.acpi_pm).restore(&state.acpi_pm)?;
        lock(&self.pvpanic).restore(&state.pvpanic);
        if let (Some(device), Some(state)) = (&self.fw_cfg, &state.fw_cfg) {
            lock(device).restore(state);
        }
        if let (Some(port), Some(state)) = (&self.boot_port, &state.boot_port) {
            lock(port).restore(state)?;
        }
        if let (Some((_, device)), Some(state)) = (&self.flash, &state.flash) {
            lock(device).restore(state);
        }
        Ok(())
    }

    /// What the project's own boot firmware is at, and what it wrote.
    pub fn boot_report(&self) -> (BootPhase, String) {
        match &self.boot_port {
            Some(port) => {
                let port = lock(port);
                (port.phase(), port.text().to_owned())
            }
            None => (BootPhase::Closed, String::new()),
        }
    }

    /// Returns all to the state after power-on; the boot firmware's port is open if `boot_port`.
    pub fn reset(&self, boot_port: bool) {
        lock(&self.serial).reset();
        lock(&self.cmos).reset();
        lock(&self.i8042).reset();
        lock(&self.control_a).reset();
        lock(&self.acpi_pm).reset();
        lock(&self.pvpanic).reset();
        if let Some(fw_cfg) = &self.fw_cfg {
            lock(fw_cfg).reset();
        }
        if let Some(debug) = &self.debug {
            lock(debug).reset();
        }
        if let Some(port) = &self.boot_port {
            lock(port).reset(boot_port);
        }
        if let Some((_, flash)) = &self.flash {
            lock(flash).reset();
        }
    }

    /// Stores what the guest has written to its UEFI variables and the host has failed to store.
    pub fn flush(&self) -> io::Result<()> {
        match &self.flash {
            Some((_, flash)) => lock(flash).flush(),
            None => Ok(()),
        }
    }
}

/// Writes debug lines to a file or standard error.
struct LineWriter(Mutex<Box<dyn Write + Send>>);

impl std::fmt::Debug for LineWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LineWriter")
    }
}

impl LineSink for LineWriter {
    fn line(&self, line: &str) {
        // The debug log is a help, not a promise: a full disk must not stop the guest.
        let _ = writeln!(lock(&self.0), "{line}");
    }
}

/// Opens the target of debug lines: `-` is standard error.
pub(super) fn debug_sink(path: &Path) -> io::Result<Arc<dyn LineSink>> {
    let target: Box<dyn Write + Send> = if path == Path::new("-") {
        Box::new(io::stderr())
    } else {
        Box::new(OpenOptions::new().create(true).append(true).open(path)?)
    };
    Ok(Arc::new(LineWriter(Mutex::new(target))))
}
