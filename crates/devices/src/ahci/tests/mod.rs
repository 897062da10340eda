#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod cd;
mod disk;
mod faults;
mod hostile;
mod state;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use edgevmm_block::{BlockBackend, DiskOptions, open};
use tempfile::NamedTempFile;

use super::*;
use crate::GuestMemory;
use crate::pci::{PciFunction, PciHost};
use crate::testing::{MockControl, MockIrq, MockMsi, guest_memory};
use sata::*;

#[path = "../../../tests/driver/sata.rs"]
mod sata;

const MEMORY: usize = 16 << 20;
const DATA: u64 = 0x10_0000;
const DISK: u64 = 4 << 20;
const BAR: u64 = 0xc000_0000;

impl Adapter for Ahci {
    fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.bar_read(5, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.bar_write(5, offset, &value.to_le_bytes());
    }
}

/// A disk on port 0 and a CD-ROM drive on port 1.
struct Rig {
    ahci: Ahci,
    disk: Port,
    cd: Port,
    image: NamedTempFile,
    media: MediaHandle,
    retry: crate::disk::BlockHandle,
    control: Arc<MockControl>,
    irq: Arc<MockIrq>,
    msi: Arc<MockMsi>,
}

fn byte(at: u64) -> u8 {
    (at / 512 + at) as u8
}

/// What the image has in `len` bytes from `at` on.
fn pattern(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte).collect()
}

fn image(len: u64) -> NamedTempFile {
    let mut image = NamedTempFile::new().unwrap();
    image.write_all(&pattern(0, len)).unwrap();
    image
}

fn disc(len: u64) -> Arc<dyn BlockBackend> {
    let options = DiskOptions {
        read_only: true,
        ..DiskOptions::new(image(len).reopen().unwrap(), "disc")
    };
    open(options).unwrap()
}

impl Rig {
    fn new() -> Self {
        Self::with(|_| (), |disk| disk, Some(disc(1 << 20)))
    }

    fn with(
        configure: impl FnOnce(&mut DriveConfig),
        wrap: impl FnOnce(Arc<dyn BlockBackend>) -> Arc<dyn BlockBackend>,
        medium: Option<Arc<dyn BlockBackend>>,
    ) -> Self {
        let image = image(DISK);
        let backend = open(DiskOptions::new(image.reopen().unwrap(), "disk")).unwrap();
        let control = Arc::<MockControl>::default();
        let mut config = DriveConfig {
            name: "disk0".into(),
            serial: "sn-1".into(),
            ..DriveConfig::default()
        };
        configure(&mut config);
        let disk = Drive::disk(config, wrap(backend), control.clone());
        let config = DriveConfig {
            name: "cdrom0".into(),
            error_policy: crate::disk::ErrorPolicy::Report,
            ..DriveConfig::default()
        };
        let cd = Drive::cdrom(config, medium, control.clone());
        let (retry, media) = (disk.handle(), cd.media().unwrap());
        let memory = guest_memory(MEMORY);
        let (irq, msi) = (Arc::new(MockIrq::default()), Arc::new(MockMsi::new(1)));
        let host = PciHost::new(BAR..BAR + 0x1000_0000).unwrap();
        let config = AhciConfig {
            slot: host.slot(1).unwrap(),
            msi: msi.clone(),
            intx: irq.clone(),
            memory: memory.clone(),
            bar_address: Some(BAR as u32),
        };
        let mut rig = Self {
            ahci: Ahci::new(vec![disk, cd], config).unwrap(),
            disk: Port::new(&memory, 0),
            cd: Port::new(&memory, 1),
            image,
            media,
            retry,
            control,
            irq,
            msi,
        };
        rig.disk.start(&mut rig.ahci);
        rig.cd.start(&mut rig.ahci);
        rig
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.disk.memory
    }

    /// Has the disk do a command. Returns PxTFD.
    fn run(&mut self, ata: &Ata, pieces: &[(u64, u32)]) -> u32 {
        self.disk.run(&mut self.ahci, ata, pieces)
    }

    /// Has the drive do a packet with `len` bytes of data. Returns PxTFD.
    fn packet(&mut self, packet: &[u8], len: u32) -> u32 {
        let mut padded = [0; 12];
        padded[..packet.len()].copy_from_slice(packet);
        let pieces = [(DATA, len)];
        let pieces = if len == 0 { &[][..] } else { &pieces };
        self.cd.put(DATA, &vec![0; len as usize]);
        self.cd.run(&mut self.ahci, &Ata::packet(padded), pieces)
    }

    /// As [`Rig::packet`], which must succeed. Returns the data.
    fn answer(&mut self, packet: &[u8], len: u32) -> Vec<u8> {
        assert_eq!(self.packet(packet, len), 0x50, "{packet:x?}");
        let moved = self.cd.bytes(self.cd.header(0) + 4, 4);
        let moved = u32::from_le_bytes(moved.try_into().unwrap());
        self.cd.bytes(DATA, moved.min(len) as usize)
    }

    /// As [`Rig::packet`], which must fail. Restarts the port and returns key, code and qualifier.
    fn refusal(&mut self, packet: &[u8], len: u32) -> [u8; 3] {
        let registers = self.packet(packet, len);
        assert_eq!(registers & 0xff, 0x51, "{packet:x?}: {registers:#x}");
        self.cd.restart(&mut self.ahci);
        let sense = self.answer(&[3, 0, 0, 0, 18], 18);
        assert_eq!(u32::from(sense[2]), registers >> 12);
        [sense[2], sense[12], sense[13]]
    }

    /// The image's bytes.
    fn stored(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image.as_file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

fn word(page: &[u8], word: usize) -> u16 {
    u16::from_le_bytes([page[2 * word], page[2 * word + 1]])
}
