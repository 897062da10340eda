//! What a virtio function looks like on the bus: ids, its one BAR and its capabilities
//! (virtio 1.2, 4.1.2 to 4.1.4).

use crate::pci::PciError;
use crate::pci::config_space::{ConfigSpaceBuilder, Identity};
use crate::pci::msix::{ENTRY_LEN, MsixLayout};

const VENDOR: u16 = 0x1af4;
/// The device id is this plus the device type.
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;
/// Modern devices have a revision of at least 1.
const REVISION: u8 = 1;

const CAPABILITY_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Index of the one BAR.
pub(super) const BAR: u8 = 0;
/// Length of the BAR.
pub(super) const BAR_LEN: u32 = 0x4000;
/// Distance of two queues' doorbells in bytes.
pub(super) const NOTIFY_STRIDE: u32 = 4;

/// A part of the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u32,
    pub(super) len: u32,
}

pub(super) const COMMON: Region = Region::new(0, 0x40);
pub(super) const ISR: Region = Region::new(0x100, 4);
pub(super) const DEVICE: Region = Region::new(0x800, 0x800);
/// Doorbells have a page of their own, so do the MSI-X table and its pending bits.
pub(super) const NOTIFY: Region = Region::new(0x1000, 0x1000);
pub(super) const MSIX_TABLE: Region = Region::new(0x2000, 0x1000);
pub(super) const MSIX_PENDING: Region = Region::new(0x3000, 0x1000);

pub(super) const MSIX: MsixLayout = MsixLayout {
    bar: BAR,
    table: MSIX_TABLE.offset,
    pending: MSIX_PENDING.offset,
};

/// Most queues that the BAR and the MSI-X table have room for.
pub(super) const MAX_QUEUES: usize = (MSIX_TABLE.len / ENTRY_LEN) as usize - 1;

impl Region {
    const fn new(offset: u32, len: u32) -> Self {
        Self { offset, len }
    }

    /// Offset from the region's start when the whole access is inside of it.
    pub(super) fn find(&self, offset: u64, len: usize) -> Option<u64> {
        let at = offset.checked_sub(self.offset.into())?;
        let end = at.checked_add(u64::try_from(len).ok()?)?;
        (end <= self.len.into()).then_some(at)
    }
}

/// Class code, subclass and programming interface by device type.
fn class(device_type: u16) -> u32 {
    match device_type {
        // Network: Ethernet.
        1 => 0x02_0000,
        // Block, SCSI and file system: other mass storage.
        2 | 8 | 26 => 0x01_8000,
        // Console: other communication.
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

/// A builder for the function of a device.
pub(super) fn builder(device_type: u16, bar_address: u32) -> Result<ConfigSpaceBuilder, PciError> {
    let mut builder = ConfigSpaceBuilder::new(&Identity {
        vendor: VENDOR,
        device: DEVICE_BASE.saturating_add(device_type),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
        class: class(device_type),
        revision: REVISION,
    });
    builder.interrupt_pin_a();
    builder.memory_bar(BAR, BAR_LEN, bar_address)?;
    Ok(builder)
}

/// Adds the virtio capabilities; returns the offset of the one for access by configuration space.
pub(super) fn add_capabilities(
    builder: &mut ConfigSpaceBuilder,
    queues: u16,
) -> Result<u8, PciError> {
    let doorbells = Region::new(NOTIFY.offset, u32::from(queues) * NOTIFY_STRIDE);
    let mut add = |kind, region: Region, more: &[u8], writable: &[u8]| {
        let mut body = vec![0; 14];
        body[1] = kind;
        body[2] = BAR;
        body[6..10].copy_from_slice(&region.offset.to_le_bytes());
        body[10..14].copy_from_slice(&region.len.to_le_bytes());
        body.extend_from_slice(more);
        body[0] = u8::try_from(body.len() + 2).unwrap_or(u8::MAX);
        builder.capability(CAPABILITY_VENDOR, &body, writable)
    };
    add(CFG_COMMON, COMMON, &[], &[])?;
    add(CFG_ISR, ISR, &[], &[])?;
    add(CFG_DEVICE, DEVICE, &[], &[])?;
    add(CFG_NOTIFY, doorbells, &NOTIFY_STRIDE.to_le_bytes(), &[])?;
    // BAR, offset, length and data are the driver's to write.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    add(CFG_PCI, Region::new(0, 0), &[0; 4], &writable)
}
