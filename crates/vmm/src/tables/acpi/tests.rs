#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::process::Command;

use super::*;
use crate::layout::{
    COM1_PORT, DEBUG_PORT, FW_CFG_PORT, LEGACY_HOLE_END, PCI_CONFIG_PORT, PCI_SLOTS, ovmf_pci_hole,
};
use crate::tables::loader::tests::{execute, sum};

fn tables(apic_ids: &[u32]) -> AcpiTables {
    AcpiTables::new(&config(apic_ids))
}

/// A machine that has all there can be but the keyboard controller.
fn config(apic_ids: &[u32]) -> AcpiConfig<'_> {
    AcpiConfig {
        apic_ids,
        i8042: false,
        config_ports: true,
        fw_cfg: true,
        firmware_pci_hole: None,
        debug_port: true,
    }
}

/// Memory that a reader of placed tables sees.
struct Memory(Vec<PlacedBytes>);

impl Memory {
    fn at(&self, address: u64, len: usize) -> &[u8] {
        let found = self.0.iter().find_map(|(base, bytes)| {
            let start = usize::try_from(address.checked_sub(*base)?).unwrap();
            bytes.get(start..start + len)
        });
        found.unwrap_or_else(|| panic!("{address:#x} is not in a table"))
    }

    fn dword(&self, address: u64) -> u64 {
        u32::from_le_bytes(self.at(address, 4).try_into().unwrap()).into()
    }

    fn qword(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.at(address, 8).try_into().unwrap())
    }

    fn table(&self, address: u64) -> &[u8] {
        let len = usize::try_from(self.dword(address + 4)).unwrap();
        let table = self.at(address, len);
        assert_eq!(
            sum(table),
            0,
            "checksum of {:?}",
            String::from_utf8_lossy(&table[..4])
        );
        table
    }

    /// Follows root pointer, RSDT and XSDT as an operating system does. Gives all tables.
    fn walk(&self, rsdp: u64) -> BTreeMap<String, Vec<u8>> {
        assert_eq!(self.at(rsdp, 8), b"RSD PTR ");
        assert_eq!(sum(self.at(rsdp, 20)), 0);
        assert_eq!(sum(self.at(rsdp, 36)), 0);
        let rsdt = self.dword(rsdp + 16);
        let xsdt = self.qword(rsdp + 24);
        let long: Vec<u64> = self.table(xsdt)[36..]
            .chunks(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
            .collect();
        let short: Vec<u64> = self.table(rsdt)[36..]
            .chunks(4)
            .map(|entry| u32::from_le_bytes(entry.try_into().unwrap()).into())
            .collect();
        assert_eq!(long, short);
        let mut found = BTreeMap::new();
        for address in long {
            assert_eq!(address % 16, 0);
            let table = self.table(address);
            let name = String::from_utf8(table[..4].to_vec()).unwrap();
            if name == "FACP" {
                let facs = self.dword(address + 36);
                assert_eq!(facs % 64, 0);
                assert_eq!(self.at(facs, 4), b"FACS");
                assert_eq!(self.dword(facs + 4), 64);
                let dsdt = self.dword(address + 40);
                assert_eq!(self.qword(address + 140), dsdt);
                found.insert("DSDT".to_owned(), self.table(dsdt).to_vec());
            }
            found.insert(name, table.to_vec());
        }
        found
    }
}

#[test]
fn placed_tables_hang_together() {
    let placed = tables(&[0, 1, 4, 5]).place().unwrap();
    assert_eq!(placed[0].0, ACPI_TABLES);
    for (address, bytes) in &placed {
        assert!(address + bytes.len() as u64 <= ACPI_TABLES + ACPI_TABLES_LEN);
    }
    let found = Memory(placed).walk(ACPI_TABLES);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "MCFG"]);
}

#[test]
fn firmware_gets_the_same_tables_by_the_script() {
    let placed = tables(&[0, 1]).place().unwrap();
    let files = tables(&[0, 1]).into_files();
    let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"]
    );
    let executed = execute(&files, |name, len, align, zone| {
        let (address, room) = match name {
            RSDP_FILE => (0xf_5a80, LEGACY_HOLE_END - 0xf_5a80),
            _ => (0x1ffe_0040, 0x1_0000),
        };
        assert_eq!(zone == Zone::FSegment as u8, name == RSDP_FILE);
        assert_eq!(address % u64::from(align), 0);
        assert!(len as u64 <= room);
        address
    });
    let memory = Memory(executed.into_values().collect());
    let (ours, theirs) = (Memory(placed).walk(ACPI_TABLES), memory.walk(0xf_5a80));
    assert_eq!(ours["DSDT"], theirs["DSDT"]);
    assert_eq!(ours["APIC"], theirs["APIC"]);
}

#[test]
fn fadt_describes_the_fixed_hardware() {
    let found = Memory(tables(&[0]).place().unwrap()).walk(ACPI_TABLES);
    let fadt = &found["FACP"];
    let word = |at: usize| u16::from_le_bytes(fadt[at..at + 2].try_into().unwrap());
    let dword = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
    assert_eq!((fadt.len(), fadt[8]), (244, 4));
    assert_eq!(word(46), 9, "SCI");
    assert_eq!(dword(48), 0, "no SMI port: always in ACPI mode");
    assert_eq!((dword(56), dword(64), dword(76)), (0x600, 0x604, 0x608));
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
    assert_eq!(fadt[108], 0x32);
    assert_eq!(
        word(109),
        0b101,
        "legacy devices, no keyboard controller, no VGA"
    );
    let flags = dword(112);
    assert_eq!(flags & (1 << 4), 0, "a fixed power button");
    assert_ne!(flags & (1 << 8), 0, "a 32-bit timer");
    assert_ne!(flags & (1 << 10), 0, "a reset register");
    assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
    assert_eq!(fadt[116..120], [1, 8, 0, 1]);
    assert_eq!((word(120), fadt[128]), (RESET_PORT, 6));
    let with = AcpiTables::new(&AcpiConfig {
        i8042: true,
        ..config(&[0])
    });
    let found = Memory(with.place().unwrap()).walk(ACPI_TABLES);
    assert_eq!(found["FACP"][109], 0b111);
}

#[test]
fn madt_lists_processors_and_overrides() {
    let found = Memory(tables(&[0, 254, 255, 300]).place().unwrap()).walk(ACPI_TABLES);
    let madt = &found["APIC"];
    assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
    let mut entries = Vec::new();
    let mut rest = &madt[44..];
    while let [_, len, ..] = rest {
        let (entry, next) = rest.split_at((*len).into());
        entries.push(entry);
        rest = next;
    }
    assert!(rest.is_empty());
    let of = |kind: u8| {
        entries
            .iter()
            .filter(move |e| e[0] == kind)
            .copied()
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of(0),
        [&[0, 8, 0, 0, 1, 0, 0, 0], &[0, 8, 1, 254, 1, 0, 0, 0]]
    );
    let x2apic: Vec<_> = of(9).iter().map(|e| (e[4], e[5], e[12])).collect();
    assert_eq!(x2apic, [(255, 0, 2), (44, 1, 3)]);
    assert_eq!(of(1).len(), 1);
    let overrides: Vec<_> = of(2).iter().map(|e| (e[3], e[4], e[8])).collect();
    assert_eq!(overrides[..2], [(0, 2, 0), (9, 9, 0xd)]);
    let pci = PCI_IRQS.map(|irq| u8::try_from(irq).unwrap());
    let pci: Vec<_> = BTreeSet::from(pci)
        .into_iter()
        .map(|irq| (irq, irq, 0xd))
        .collect();
    assert_eq!(overrides[2..], pci);
    assert_eq!(of(4), [&[4, 6, 0xff, 0, 0, 1]]);
}

#[test]
fn mcfg_covers_one_bus() {
    let found = Memory(tables(&[0]).place().unwrap()).walk(ACPI_TABLES);
    let mcfg = &found["MCFG"];
    assert_eq!(mcfg.len(), 60);
    assert_eq!(mcfg[44..52], ECAM_BASE.to_le_bytes());
    assert_eq!(mcfg[52..56], [0; 4]);
}

#[test]
fn too_many_processors_are_refused() {
    let ids: Vec<u32> = (0..5000).collect();
    assert!(matches!(
        tables(&ids).place(),
        Err(AcpiError::NoRoom { .. })
    ));
    let ids: Vec<u32> = (0..255).collect();
    tables(&ids).place().unwrap();
}

/// What the reference disassembler makes of a table.
fn disassembled(table: &[u8]) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("table.aml"), table).unwrap();
    let run = Command::new("iasl")
        .current_dir(dir.path())
        .args(["-d", "table.aml"])
        .output();
    let Ok(output) = run else {
        eprintln!("skipped: iasl is not installed (package acpica-tools)");
        return None;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        !said.contains("Error") && !said.contains("Warning"),
        "{said}"
    );
    Some(std::fs::read_to_string(dir.path().join("table.dsl")).unwrap())
}

#[test]
fn tables_disassemble_and_the_dsdt_compiles_again() {
    let found = Memory(tables(&[0, 1]).place().unwrap()).walk(ACPI_TABLES);
    for table in found.values() {
        let Some(text) = disassembled(table) else {
            return;
        };
        assert!(
            !text.contains("Incorrect") && !text.contains("Invalid"),
            "{text}"
        );
    }
    let text = disassembled(&found["DSDT"]).unwrap();
    for part in [
        "Scope (\\_SB)",
        "EisaId (\"PNP0A08\")",
        "EisaId (\"PNP0501\")",
        "EisaId (\"PNP0B00\")",
        "EisaId (\"PNP0C02\")",
        "Name (\\_S5, Package (0x04)",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("_S3") && !text.contains("_S4"));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("dsdt.dsl"), &text).unwrap();
    let run = Command::new("iasl")
        .current_dir(dir.path())
        .args(["-ve", "dsdt.dsl"])
        .output();
    let said = String::from_utf8(run.unwrap().stdout).unwrap();
    assert!(said.contains("0 Errors"), "{said}");
}

#[test]
fn every_pin_of_every_slot_has_a_line() {
    let found = Memory(tables(&[0]).place().unwrap()).walk(ACPI_TABLES);
    let Some(text) = disassembled(&found["DSDT"]) else {
        return;
    };
    let start = text.find("_PRT").unwrap();
    let words: Vec<u32> = text[start..]
        .split(|c: char| c.is_whitespace() || "(){},".contains(c))
        .filter_map(|word| match word {
            "Zero" => Some(0),
            "One" => Some(1),
            word => u32::from_str_radix(word.strip_prefix("0x")?, 16).ok(),
        })
        .collect();
    // A package of four per pin, with comments that hold no hexadecimal words.
    assert_eq!(words[0], 0x80);
    for (index, entry) in words[1..].chunks(5).take(128).enumerate() {
        let (slot, pin) = (
            u8::try_from(index / 4).unwrap(),
            u8::try_from(index % 4).unwrap(),
        );
        let expected = [
            4,
            u32::from(slot) << 16 | 0xffff,
            pin.into(),
            0,
            dsdt::pci_irq(slot, pin),
        ];
        assert_eq!(entry, expected);
        assert!(slot < PCI_SLOTS);
    }
}

/// Resource descriptor of the ports from `port`, as the DSDT encodes it.
fn io_descriptor(port: u16, len: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x47, 1, low, high, low, high, 1, len]
}

#[test]
fn the_dsdt_declares_the_ports_that_exist() {
    let [pci, reset] = [
        io_descriptor(PCI_CONFIG_PORT, 8),
        io_descriptor(RESET_PORT, 1),
    ];
    let [fw_cfg, debug] = [io_descriptor(FW_CFG_PORT, 12), io_descriptor(DEBUG_PORT, 1)];
    for bits in 0..8 {
        let [config_ports, has_fw_cfg, debug_port] = [1, 2, 4].map(|bit| bits & bit != 0);
        let tables = AcpiTables::new(&AcpiConfig {
            config_ports,
            fw_cfg: has_fw_cfg,
            debug_port,
            ..config(&[0])
        });
        let found = Memory(tables.place().unwrap()).walk(ACPI_TABLES);
        let count = |descriptor: &[u8]| {
            let dsdt = found["DSDT"].windows(descriptor.len());
            dsdt.filter(|window| *window == descriptor).count()
        };
        assert_eq!(count(&pci), usize::from(config_ports));
        assert_eq!(count(&reset), usize::from(!config_ports));
        assert_eq!(count(&fw_cfg), usize::from(has_fw_cfg));
        assert_eq!(count(&debug), usize::from(debug_port));
        assert_eq!(count(&io_descriptor(COM1_PORT, 8)), 1);
        disassembled(&found["DSDT"]);
    }
}

#[test]
fn the_dsdt_stays_small() {
    let found = Memory(tables(&[0]).place().unwrap()).walk(ACPI_TABLES);
    assert!(found["DSDT"].len() < 2300, "{} bytes", found["DSDT"].len());
}

#[test]
fn where_firmware_places_ecam_the_tables_keep_out_of_it() {
    let tables = AcpiTables::new(&AcpiConfig {
        firmware_pci_hole: Some(ovmf_pci_hole(1 << 30)),
        ..config(&[0])
    });
    let found = Memory(tables.place().unwrap()).walk(ACPI_TABLES);
    assert!(!found.contains_key("MCFG"));
    let dsdt = &found["DSDT"];
    let has = |start: u32, end: u32| {
        let range = [start.to_le_bytes(), (end - 1).to_le_bytes()].concat();
        dsdt.windows(8).any(|window| window == range)
    };
    assert!(has(0x8000_0000, 0xb000_0000));
    assert!(has(0xc000_0000, 0xe000_0000));
    assert!(has(0xf000_0000, 0xfec0_0000));
    assert!(!has(0xc000_0000, 0xfec0_0000));
    disassembled(dsdt);
}
