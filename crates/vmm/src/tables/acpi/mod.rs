//! ACPI tables (ACPI 4.0, which old and new operating systems take) of a PC with fixed hardware.
//!
//! FADT, FACS, MADT, MCFG and DSDT under both an RSDT and an XSDT. There are no processor objects
//! (the MADT has all there is to say), no general-purpose events, and of the sleeping states only
//! S5. The fixed power button is the only button.

mod dsdt;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use edgevmm_devices::legacy::acpi_pm;
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::loader::{BlobId, Linker, Width, Zone};
use super::{FirmwareFile, PlacedBytes};
use crate::layout::{
    ACPI_PM_PORT, ACPI_TABLES, ACPI_TABLES_LEN, ECAM_BASE, IOAPIC_BASE, LAPIC_BASE, PCI_IRQS,
    RESET_PORT, SCI_IRQ,
};

/// Name of the tables among the `fw_cfg` files.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the root pointer among the `fw_cfg` files.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";

const OEM_ID: [u8; 6] = *b"EDGEVM";
const OEM_TABLE_ID: [u8; 8] = *b"EDGEVMM ";
const OEM_REVISION: u32 = 1;

const HEADER_LEN: usize = 36;
const CHECKSUM_AT: usize = 9;
const RSDP_LEN: usize = 36;
/// Room for the root pointer before the tables, which keeps them aligned.
const TABLES_OFFSET: u64 = 64;
const TABLES_ALIGN: u32 = 64;

/// Written to the reset port: restart of the whole machine.
const RESET_VALUE: u8 = 6;
/// APIC IDs from here on need the x2APIC's form of MADT entries.
const FIRST_X2APIC_ID: u32 = 255;
/// Interrupt source override: level-triggered, active high.
const LEVEL_HIGH: u16 = 0b1101;
/// A latency that says "this C-state does not exist".
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Why the tables can't be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// There are too many vCPUs for the room below 1 MiB.
    #[error("The ACPI tables take {needed} bytes where {room} fit: use fewer vCPUs")]
    NoRoom {
        /// Bytes that they take.
        needed: usize,
        /// Bytes that there are.
        room: u64,
    },
}

/// What the tables depend on beside the layout.
#[derive(Debug, Clone)]
pub struct AcpiConfig<'a> {
    /// APIC ID of each vCPU, the boot vCPU's first.
    pub apic_ids: &'a [u32],
    /// Announce the keyboard controller; operating systems then wait for keyboards.
    pub i8042: bool,
    /// PCI has configuration ports.
    pub config_ports: bool,
    /// The machine has the `fw_cfg` device.
    pub fw_cfg: bool,
    /// Where the firmware puts ECAM and BARs as it likes. The tables can't tell then where ECAM is,
    /// and operating systems do without. Else both are where the layout has them.
    pub firmware_pci_hole: Option<Range<u64>>,
    /// The machine has the port for firmware's debug output.
    pub debug_port: bool,
}

/// The tables, not yet placed.
#[derive(Debug)]
pub struct AcpiTables {
    linker: Linker,
    tables: BlobId,
}

impl AcpiTables {
    /// Makes the tables of a machine.
    pub fn new(config: &AcpiConfig) -> Self {
        let mut blob = TableBlob::default();
        let facs = blob.push(&encode(&FACS::new()));
        let dsdt = blob.push_sdt(&sdt(*b"DSDT", 2, &dsdt::body(config)));
        let fadt = blob.push_sdt(&fadt(config, facs, dsdt));
        let madt = blob.push_sdt(&madt(config.apic_ids));
        let mcfg = config
            .firmware_pci_hole
            .is_none()
            .then(|| blob.push_sdt(&mcfg()));
        for at in [36, 40] {
            blob.pointers.push((fadt + at, Width::Dword));
        }
        blob.pointers.push((fadt + 140, Width::Qword));
        let roots: Vec<_> = [fadt, madt].into_iter().chain(mcfg).collect();
        let (rsdt, xsdt) = blob.push_roots(&roots);

        let mut linker = Linker::default();
        let rsdp = linker.add_blob(RSDP_FILE, rsdp(rsdt, xsdt), 16, Zone::FSegment);
        let tables = linker.add_blob(TABLES_FILE, blob.bytes, TABLES_ALIGN, Zone::High);
        for (at, width) in blob.pointers {
            linker.add_pointer(tables, at, width, tables);
        }
        for (start, len) in blob.sdts {
            linker.add_checksum(tables, start + CHECKSUM_AT, start..start + len);
        }
        linker.add_pointer(rsdp, 16, Width::Dword, tables);
        linker.add_pointer(rsdp, 24, Width::Qword, tables);
        linker.add_checksum(rsdp, 8, 0..20);
        linker.add_checksum(rsdp, 32, 0..RSDP_LEN);
        Self { linker, tables }
    }

    /// The tables below 1 MiB, for a kernel that is started directly. The root pointer is at
    /// [`ACPI_TABLES`].
    ///
    /// # Errors
    /// Fails when there are too many vCPUs for the room there.
    pub fn place(&self) -> Result<Vec<PlacedBytes>, AcpiError> {
        let needed = self.linker.len_of(self.tables);
        let room = ACPI_TABLES_LEN - TABLES_OFFSET;
        if needed as u64 > room {
            return Err(AcpiError::NoRoom { needed, room });
        }
        Ok(self
            .linker
            .place(&[ACPI_TABLES, ACPI_TABLES + TABLES_OFFSET]))
    }

    /// The files for firmware: tables, root pointer and the script that places them.
    pub fn into_files(self) -> Vec<FirmwareFile> {
        self.linker.into_files()
    }
}

/// Tables behind each other, with offsets in place of pointers.
#[derive(Default)]
struct TableBlob {
    bytes: Vec<u8>,
    /// Offset and length of each table with the standard header.
    sdts: Vec<(usize, usize)>,
    pointers: Vec<(usize, Width)>,
}

impl TableBlob {
    /// Appends `table` at the next multiple of 16 and returns its offset.
    fn push(&mut self, table: &[u8]) -> usize {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend(table);
        start
    }

    fn push_sdt(&mut self, table: &[u8]) -> usize {
        let start = self.push(table);
        self.sdts.push((start, table.len()));
        start
    }

    /// Appends an RSDT and an XSDT of the tables at `offsets`.
    fn push_roots(&mut self, offsets: &[usize]) -> (usize, usize) {
        let short: Vec<u8> = offsets
            .iter()
            .flat_map(|at| dword(*at).to_le_bytes())
            .collect();
        let long: Vec<u8> = offsets
            .iter()
            .flat_map(|at| u64::from(dword(*at)).to_le_bytes())
            .collect();
        let rsdt = self.push_sdt(&sdt(*b"RSDT", 1, &short));
        let xsdt = self.push_sdt(&sdt(*b"XSDT", 1, &long));
        for index in 0..offsets.len() {
            self.pointers
                .push((rsdt + HEADER_LEN + 4 * index, Width::Dword));
            self.pointers
                .push((xsdt + HEADER_LEN + 8 * index, Width::Qword));
        }
        (rsdt, xsdt)
    }
}

fn encode(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// An offset within the tables, which are far smaller than 4 GiB.
fn dword(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

/// The low half of an address that lies below 4 GiB.
fn low_dword(address: u64) -> u32 {
    let [a, b, c, d, ..] = address.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        signature,
        dword(HEADER_LEN),
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// The FADT of ACPI 4.0. Later ones only add what hardware-reduced machines need, and old
/// operating systems complain about their length.
fn fadt(config: &AcpiConfig, facs: usize, dsdt: usize) -> Vec<u8> {
    const REVISION: u8 = 4;
    const LEN: u32 = 244;
    const LEGACY_DEVICES: u16 = 1 << 0;
    const KEYBOARD_CONTROLLER: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const CENTURY_CELL: u8 = 0x32;

    let [event, control, timer] = [
        acpi_pm::EVENT_BLOCK,
        acpi_pm::CONTROL_BLOCK,
        acpi_pm::TIMER_BLOCK,
    ]
    .map(|offset| ACPI_PM_PORT + offset);
    let port = |bits, access, port: u16| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
    };
    let keyboard = if config.i8042 { KEYBOARD_CONTROLLER } else { 0 };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .firmware_ctrl_32(dword(facs))
        .dsdt_64(u64::from(dword(dsdt)));
    fadt.dsdt = dword(dsdt).into();
    fadt.major_version = REVISION;
    fadt.fadt_minor_version = 0;
    fadt.length = LEN.into();
    fadt.sci_int = u16::try_from(SCI_IRQ).unwrap_or(u16::MAX).into();
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, event);
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, control);
    fadt.x_pm_tmr_blk = port(32, AccessSize::DwordAccess, timer);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY_CELL;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | keyboard).into();
    fadt.reset_reg = port(8, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    // What is cut off is zero, so the checksum holds for the rest.
    let mut bytes = encode(&fadt.finalize());
    bytes.truncate(usize::try_from(LEN).unwrap_or(usize::MAX));
    bytes
}

/// MADT entry: an ISA interrupt that is not where or what it would be by default.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SourceOverride {
    kind: u8,
    len: u8,
    bus: u8,
    source: u8,
    gsi: U32,
    flags: U16,
}

impl SourceOverride {
    fn new(source: u8, gsi: u32, flags: u16) -> Self {
        Self {
            kind: 2,
            len: 10,
            bus: 0,
            source,
            gsi: gsi.into(),
            flags: flags.into(),
        }
    }
}

/// MADT entry: the local APICs' pin that is the NMI.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalApicNmi {
    kind: u8,
    len: u8,
    processor: u8,
    flags: U16,
    pin: u8,
}

/// MADT entry: a processor whose APIC ID does not fit in a byte.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    len: u8,
    reserved: U16,
    apic_id: U32,
    flags: U32,
    uid: U32,
}

fn madt(apic_ids: &[u32]) -> Vec<u8> {
    const REVISION: u8 = 3;
    const PC_AT_COMPATIBLE: u32 = 1;
    const ALL_PROCESSORS: u8 = 0xff;
    let mut body = low_dword(LAPIC_BASE).to_le_bytes().to_vec();
    body.extend(PC_AT_COMPATIBLE.to_le_bytes());
    for (uid, apic_id) in (0_u32..).zip(apic_ids) {
        match (u8::try_from(uid), u8::try_from(*apic_id)) {
            (Ok(uid), Ok(id)) if *apic_id < FIRST_X2APIC_ID => {
                ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => {
                let entry = LocalX2Apic {
                    kind: 9,
                    len: 16,
                    reserved: U16::ZERO,
                    apic_id: U32::new(*apic_id),
                    flags: U32::new(EnabledStatus::Enabled as u32),
                    uid: U32::new(uid),
                };
                body.extend(entry.as_bytes());
            }
        }
    }
    IoApic::new(0, low_dword(IOAPIC_BASE), 0).to_aml_bytes(&mut body);
    // The timer, as the interrupt routing table has it.
    body.extend(SourceOverride::new(0, 2, 0).as_bytes());
    for irq in [SCI_IRQ].into_iter().chain(BTreeSet::from(PCI_IRQS)) {
        let source = u8::try_from(irq).unwrap_or(u8::MAX);
        body.extend(SourceOverride::new(source, irq, LEVEL_HIGH).as_bytes());
    }
    let nmi = LocalApicNmi {
        kind: 4,
        len: 6,
        processor: ALL_PROCESSORS,
        flags: U16::ZERO,
        pin: 1,
    };
    body.extend(nmi.as_bytes());
    sdt(*b"APIC", REVISION, &body)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    encode(&mcfg)
}

fn rsdp(rsdt: usize, xsdt: usize) -> Vec<u8> {
    const REVISION: u8 = 2;
    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend(OEM_ID);
    rsdp.push(REVISION);
    rsdp.extend(dword(rsdt).to_le_bytes());
    rsdp.extend(dword(RSDP_LEN).to_le_bytes());
    rsdp.extend(u64::from(dword(xsdt)).to_le_bytes());
    // The second checksum and three reserved bytes.
    rsdp.resize(RSDP_LEN, 0);
    rsdp
}
