//! Where things are in the machine: guest-physical addresses, ports and interrupt lines.
//!
//! The shape is that of a q35 PC as far as SeaBIOS cares: it moves its own ECAM window and
//! 32-bit PCI window to these very addresses, so they are fixed here.

/// End of the RAM below 4 GiB; what is beyond starts again at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xb000_0000;
/// Start of the RAM above 4 GiB.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// PCI configuration space, memory-mapped (ECAM). SeaBIOS programs this address on a q35.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Length of the ECAM window we decode: one bus.
pub const ECAM_LEN: u64 = 0x10_0000;
/// Address range that ECAM takes from the memory map: 256 buses, as firmware declares it.
pub const ECAM_RESERVED_LEN: u64 = 0x1000_0000;
/// Window of the PCI memory BARs.
pub const PCI_WINDOW_BASE: u64 = 0xc000_0000;
/// Length of the window of the PCI memory BARs.
pub const PCI_WINDOW_LEN: u64 = IOAPIC_BASE - PCI_WINDOW_BASE;
/// Where OVMF may put ECAM beside [`ECAM_BASE`]: which of both depends on its version.
pub const OVMF_ECAM_BASE: u64 = 0xe000_0000;
/// I/O APIC registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// One page for KVM's real-mode identity map (Intel without unrestricted guest).
pub const IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for KVM's real-mode TSS (Intel without unrestricted guest).
pub const KVM_TSS: u64 = 0xfeff_d000;
/// End of the firmware ROM; its size says where it starts.
pub const FIRMWARE_END: u64 = HIGH_RAM_START;

/// Top of conventional memory: an EBDA of 1 KiB and the legacy hole follow.
pub const EBDA_START: u64 = 0x9_fc00;
/// Start of the legacy hole (VGA, option ROMs, BIOS).
pub const LEGACY_HOLE_START: u64 = 0xa_0000;
/// Direct boot: ACPI tables, RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Direct boot: room for the ACPI tables.
pub const ACPI_TABLES_LEN: u64 = 0x1_0000;
/// Direct boot: SMBIOS entry point and tables.
pub const SMBIOS_TABLES: u64 = 0xf_0000;
/// End of the legacy hole.
pub const LEGACY_HOLE_END: u64 = 0x10_0000;

/// The first serial port.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// PS/2 controller data port; its command port is at +4.
pub const I8042_PORT: u16 = 0x60;
/// System control port A: fast A20 gate and fast reset.
pub const CONTROL_PORT_A: u16 = 0x92;
/// CMOS index port; data at +1.
pub const CMOS_PORT: u16 = 0x70;
/// Interrupt line of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// The port of panics.
pub const PVPANIC_PORT: u16 = 0x505;
/// fw_cfg selector port; data at +1, DMA address at +4.
pub const FW_CFG_PORT: u16 = 0x510;
/// Control port of the project's own boot firmware: text; what it is about at +1.
pub const BOOT_PORT: u16 = 0x5e0;
/// SeaBIOS' debug port.
pub const DEBUG_PORT: u16 = 0x402;
/// PCI configuration address port; data at +4.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Reset control register, inside the range of the PCI configuration ports.
pub const RESET_PORT: u16 = 0xcf9;
/// ACPI PM1a event block; control block at +4, timer at +8.
pub const ACPI_PM_PORT: u16 = 0x600;
/// Interrupt line of ACPI events.
pub const SCI_IRQ: u32 = 9;
/// Interrupt lines of the PCI pins: pin p of slot s is on `PCI_IRQS[(s + p) % 4]`, which is what
/// SeaBIOS writes into the functions of a q35. ISA lines that both PIC and I/O APIC have, so guests
/// without APIC work as well.
pub const PCI_IRQS: [u32; 4] = [10, 10, 11, 11];
/// What OVMF leaves to PCI below 4 GiB, with `ram` bytes of RAM: ECAM and the memory BARs. It
/// begins where a range that is a power of two ends at 4 GiB, at least half of that.
pub fn ovmf_pci_hole(ram: u64) -> std::ops::Range<u64> {
    const HALF: u64 = 2 << 30;
    (if ram <= HALF { HALF } else { ECAM_BASE })..IOAPIC_BASE
}

/// Number of slots on the only PCI bus.
pub const PCI_SLOTS: u8 = 32;
