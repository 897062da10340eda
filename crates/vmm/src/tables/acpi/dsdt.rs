//! The DSDT: what can't be found by looking for it. Kept small, for it is interpreted at boot.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, Path, ResourceTemplate, Scope,
};
use edgevmm_devices::legacy::acpi_pm::S5_SLEEP_TYPE;
use edgevmm_devices::legacy::{acpi_pm, fw_cfg, pvpanic};

use super::{AcpiConfig, low_dword};
use crate::layout::{
    ACPI_PM_PORT, CMOS_PORT, COM1_IRQ, COM1_PORT, DEBUG_PORT, ECAM_BASE, ECAM_RESERVED_LEN,
    FW_CFG_PORT, OVMF_ECAM_BASE, PCI_CONFIG_PORT, PCI_IRQS, PCI_SLOTS, PCI_WINDOW_BASE,
    PCI_WINDOW_LEN, PVPANIC_PORT, RESET_PORT, RTC_IRQ,
};

/// Pins of a PCI slot: INTA to INTD.
const PINS: u8 = 4;

/// The body of the DSDT, without its header.
pub(super) fn body(config: &AcpiConfig) -> Vec<u8> {
    let bridge = host_bridge(config);
    let serial = isa_device("COM1", "PNP0501", COM1_PORT, 8, COM1_IRQ);
    let clock = isa_device("RTC_", "PNP0B00", CMOS_PORT, 2, RTC_IRQ);
    let panics = pvpanic();
    let reserved = motherboard(config);
    let sleep = u32::from(S5_SLEEP_TYPE);
    let mut body = Vec::new();
    let devices: Vec<&dyn Aml> = vec![&bridge, &serial, &clock, &panics, &reserved];
    Scope::new(Path::new("\\_SB_"), devices).to_aml_bytes(&mut body);
    let s5 = Package::new(vec![&sleep, &sleep, &0_u8, &0_u8]);
    Name::new(Path::new("\\_S5_"), &s5).to_aml_bytes(&mut body);
    body
}

/// AML that is already encoded.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, hid: &str, resources: Vec<&dyn Aml>, more: &[&dyn Aml]) -> Encoded {
    let hid = Name::new(Path::new("_HID"), &EISAName::new(hid));
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources));
    let mut children: Vec<&dyn Aml> = vec![&hid, &crs];
    children.extend(more);
    let mut bytes = Vec::new();
    Device::new(Path::new(name), children).to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

fn isa_device(name: &str, hid: &str, port: u16, len: u8, irq: u32) -> Encoded {
    let ports = IO::new(port, port, 1, len);
    // Edge-triggered, active high, not shared: as ISA lines are.
    let interrupt = Interrupt::new(true, true, false, false, irq);
    device(name, hid, vec![&ports, &interrupt], &[])
}

/// The PCI host bridge with its windows, the interrupt lines of the slots and, if there are any,
/// its configuration ports.
fn host_bridge(config: &AcpiConfig) -> Encoded {
    let buses = AddressSpace::new_bus_number(0_u16, 0_u16);
    let config_ports = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8);
    let ports_below = AddressSpace::new_io(0_u16, PCI_CONFIG_PORT - 1, None);
    let ports_above = AddressSpace::new_io(PCI_CONFIG_PORT + 8, u16::MAX, None);
    let memory: Vec<_> = windows(config)
        .map(|window| {
            AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                low_dword(window.start),
                low_dword(window.end - 1),
                None,
            )
        })
        .collect();
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports_below, &ports_above];
    resources.extend(memory.iter().map(|window| window as &dyn Aml));
    if config.config_ports {
        resources.insert(1, &config_ports);
    }
    let compatible = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let routing = Name::new(Path::new("_PRT"), &pci_routing());
    device("PCI0", "PNP0A08", resources, &[&compatible, &routing])
}

/// Where memory BARs may be: anywhere but in ECAM.
fn windows(config: &AcpiConfig) -> impl Iterator<Item = Range<u64>> {
    let window = PCI_WINDOW_BASE..PCI_WINDOW_BASE + PCI_WINDOW_LEN;
    let around = OVMF_ECAM_BASE..OVMF_ECAM_BASE + ECAM_RESERVED_LEN;
    let parts = if let Some(hole) = &config.firmware_pci_hole {
        [
            hole.start..ECAM_BASE,
            window.start..around.start,
            around.end..window.end,
        ]
    } else {
        [window, 0..0, 0..0]
    };
    parts.into_iter().filter(|part| !part.is_empty())
}

/// Interrupt line of `pin` (0 to 3) of `slot`.
pub(super) fn pci_irq(slot: u8, pin: u8) -> u32 {
    PCI_IRQS[usize::from(slot + pin) % PCI_IRQS.len()]
}

fn pci_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        // High word: the slot. Low word: any function.
        let address = u32::from(slot) << 16 | 0xffff;
        for pin in 0..PINS {
            let irq = pci_irq(slot, pin);
            table.add_element(&Package::new(vec![&address, &pin, &0_u8, &irq]));
        }
    }
    table
}

/// The port of panics, by the name under which drivers know it: no EISA one.
fn pvpanic() -> Encoded {
    let hid = Name::new(Path::new("_HID"), &"QEMU0001");
    let port = port_range(PVPANIC_PORT, pvpanic::PORT_RANGE);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port]));
    let mut bytes = Vec::new();
    Device::new(Path::new("PEVT"), vec![&hid, &crs]).to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

/// What no driver claims but nobody else may take.
fn motherboard(config: &AcpiConfig) -> Encoded {
    let ecam = Memory32Fixed::new(true, low_dword(ECAM_BASE), low_dword(ECAM_RESERVED_LEN));
    let debug = IO::new(DEBUG_PORT, DEBUG_PORT, 1, 1);
    let pm = port_range(ACPI_PM_PORT, acpi_pm::PORT_RANGE);
    let fw_cfg = port_range(FW_CFG_PORT, fw_cfg::PORT_RANGE);
    let reset = IO::new(RESET_PORT, RESET_PORT, 1, 1);
    let mut resources: Vec<&dyn Aml> = vec![&pm];
    if config.firmware_pci_hole.is_none() {
        resources.insert(0, &ecam);
    }
    if config.debug_port {
        resources.push(&debug);
    }
    if config.fw_cfg {
        resources.push(&fw_cfg);
    }
    if !config.config_ports {
        // Else it is one of the host bridge's.
        resources.push(&reset);
    }
    device("MBRD", "PNP0C02", resources, &[])
}

fn port_range(port: u16, len: u64) -> IO {
    IO::new(port, port, 1, u8::try_from(len).unwrap_or(u8::MAX))
}
