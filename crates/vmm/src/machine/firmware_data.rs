//! What firmware or a kernel is told of the machine.

use edgevmm_config::{Topology, VmConfig};
use edgevmm_devices::legacy::fw_cfg::{FwCfgError, FwCfgItems, NumberedItems};
use uuid::Uuid;

use super::BuildError;
use super::functions::BootDevice;
use crate::boot::net_rom;
use crate::boot::pvh::Tables;
use crate::layout::{ACPI_TABLES, COM1_PORT, ovmf_pci_hole};
use crate::tables::acpi::{AcpiConfig, AcpiTables};
use crate::tables::smbios::{self, SmbiosConfig};
use crate::tables::{PlacedBytes, e820};

/// Milliseconds that SeaBIOS waits before it tries again to boot; it resets the machine then.
const BOOT_FAIL_WAIT_MS: u32 = 60_000;
/// Milliseconds that firmware waits for a key that shows its boot menu.
const BOOT_MENU_WAIT_MS: u16 = 5_000;

/// The machine as its tables tell it.
#[derive(Debug)]
pub(super) struct Description {
    ram: u64,
    cpus: u8,
    apic_ids: Vec<u32>,
    topology: Topology,
    uuid: Uuid,
    serial: Option<String>,
    debug_port: bool,
    boot_menu: bool,
}

pub(super) fn describe(config: &VmConfig, topology: Topology, uuid: Uuid) -> Description {
    Description {
        ram: config.memory.size.0,
        cpus: config.cpus.count,
        apic_ids: (0..config.cpus.count)
            .map(|index| topology.apic_id(index))
            .collect(),
        topology,
        uuid,
        serial: config.identity.serial.clone(),
        debug_port: config.debugcon.is_some(),
        boot_menu: config.boot.menu,
    }
}

impl Description {
    fn acpi(&self, config_ports: bool, fw_cfg: bool, ovmf: bool) -> AcpiTables {
        AcpiTables::new(&AcpiConfig {
            firmware_pci_hole: ovmf.then(|| ovmf_pci_hole(self.ram)),
            apic_ids: &self.apic_ids,
            i8042: false,
            config_ports,
            fw_cfg,
            debug_port: self.debug_port,
        })
    }

    fn smbios(&self) -> SmbiosConfig<'_> {
        SmbiosConfig {
            uuid: self.uuid,
            serial: self.serial.as_deref(),
            sockets: self.topology.sockets,
            cores: self.topology.cores,
            threads: self.topology.threads,
            ram: self.ram,
        }
    }
}

/// The tables in memory, as a kernel without firmware finds them, or firmware without fw_cfg, which
/// has the configuration ports.
pub(super) fn placed(description: &Description, config_ports: bool) -> Result<Tables, BuildError> {
    let mut tables: Vec<PlacedBytes> = description.acpi(config_ports, false, false).place()?;
    tables.extend(smbios::place(&description.smbios()));
    Ok(Tables {
        memory_map: e820::kernel_map(description.ram),
        rsdp: ACPI_TABLES,
        tables,
    })
}

/// The items that SeaBIOS asks for, or OVMF. It boots from `devices` in that order, from a network
/// by `net_rom`.
pub(super) fn fw_cfg(
    description: &Description,
    devices: &[BootDevice],
    ovmf: bool,
    net_rom: Option<Vec<u8>>,
) -> Result<FwCfgItems, FwCfgError> {
    let highest = description.apic_ids.iter().max().copied().unwrap_or(0);
    let mut items = FwCfgItems::new(NumberedItems {
        cpus: u16::from(description.cpus),
        max_cpus: u16::try_from(highest + 1).unwrap_or(u16::MAX),
        boot_menu: description.boot_menu,
    });
    let map = if ovmf {
        e820::ovmf_map(description.ram)
    } else {
        e820::firmware_map(description.ram)
    };
    items.add_file(e820::FILE, e820::encode(&map))?;
    let files = description.acpi(true, true, ovmf).into_files();
    let files = files
        .into_iter()
        .chain(smbios::files(&description.smbios()));
    for (name, bytes) in files {
        items.add_file(name, bytes)?;
    }
    items.add_file("bootorder", boot_order(devices).into_bytes())?;
    if let Some(rom) = net_rom {
        items.add_file(net_rom::FILE, rom)?;
    }
    let port = u64::from(COM1_PORT).to_le_bytes().to_vec();
    items.add_file("etc/sercon-port", port)?;
    let wait = BOOT_FAIL_WAIT_MS.to_le_bytes().to_vec();
    items.add_file("etc/boot-fail-wait", wait)?;
    let wait = BOOT_MENU_WAIT_MS.to_le_bytes().to_vec();
    items.add_file("etc/boot-menu-wait", wait)?;
    Ok(items)
}

/// The devices to boot from, a line each.
fn boot_order(devices: &[BootDevice]) -> String {
    let paths = devices.iter().map(|device| device.path() + "\n");
    paths.collect::<String>() + "\0"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_order_has_a_line_for_each_device() {
        let order = boot_order(&[
            BootDevice::Virtio { slot: 1 },
            BootDevice::Virtio { slot: 2 },
        ]);
        assert_eq!(
            order,
            "/pci@i0cf8/scsi@1/disk@0,0\n/pci@i0cf8/scsi@2/disk@0,0\n\0"
        );
    }
}
