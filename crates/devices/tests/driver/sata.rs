//! The guest's side of a SATA adapter, for tests. Used by unit tests too, so it knows nothing but
//! memory and registers.

#![allow(dead_code, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Registers of a port.
pub const CLB: u64 = 0x00;
pub const FB: u64 = 0x08;
pub const PORT_IS: u64 = 0x10;
pub const PORT_IE: u64 = 0x14;
pub const CMD: u64 = 0x18;
pub const TFD: u64 = 0x20;
pub const SIG: u64 = 0x24;
pub const SSTS: u64 = 0x28;
pub const SCTL: u64 = 0x2c;
pub const SERR: u64 = 0x30;
pub const SACT: u64 = 0x34;
pub const CI: u64 = 0x38;

/// PxCMD: commands are taken, FISes received.
pub const STARTED: u32 = 0x11;
/// PxIS: a fatal error of any kind.
pub const FATAL: u32 = 0x6000_0000;

/// Where things of a port are.
const STRUCTURES: u64 = 0x1_0000;
const TABLES: u64 = 0x2000;
const TABLE_LEN: u64 = 0x200;

const PATIENCE: Duration = Duration::from_secs(20);

/// A command for a drive.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ata {
    pub command: u8,
    pub features: u16,
    pub lba: u64,
    pub count: u16,
    pub device: u8,
    pub control: u8,
    pub packet: [u8; 12],
}

impl Ata {
    pub fn new(command: u8, lba: u64, count: u16) -> Self {
        Self {
            command,
            lba,
            count,
            device: 0x40,
            ..Self::default()
        }
    }

    /// READ or WRITE FPDMA QUEUED.
    pub fn queued(command: u8, tag: usize, lba: u64, count: u16) -> Self {
        Self {
            features: count,
            count: (tag as u16) << 3,
            ..Self::new(command, lba, 0)
        }
    }

    pub fn packet(packet: [u8; 12]) -> Self {
        Self {
            features: 1,
            packet,
            ..Self::new(0xa0, 0, 0)
        }
    }

    pub fn fis(&self) -> [u8; 20] {
        let [l0, l1, l2, l3, l4, l5, ..] = self.lba.to_le_bytes();
        let ([f0, f1], [c0, c1]) = (self.features.to_le_bytes(), self.count.to_le_bytes());
        let is_command = if self.control == 0 && self.command != 0 {
            0x80
        } else {
            0
        };
        [
            0x27,
            is_command,
            self.command,
            f0,
            l0,
            l1,
            l2,
            self.device,
            l3,
            l4,
            l5,
            f1,
            c0,
            c1,
            0,
            self.control,
            0,
            0,
            0,
            0,
        ]
    }
}

/// Reads and writes registers of an adapter.
pub trait Adapter {
    fn read(&mut self, offset: u64) -> u32;
    fn write(&mut self, offset: u64, value: u32);
}

/// Drives one port.
#[derive(Debug)]
pub struct Port {
    pub memory: Arc<GuestMemoryMmap>,
    index: u64,
}

impl Port {
    pub fn new(memory: &Arc<GuestMemoryMmap>, index: u64) -> Self {
        Self {
            memory: memory.clone(),
            index,
        }
    }

    fn structures(&self) -> u64 {
        STRUCTURES * (self.index + 1)
    }

    /// Address of a received FIS.
    pub fn received(&self, at: u64) -> u64 {
        self.structures() + 0x1000 + at
    }

    pub fn table(&self, slot: usize) -> u64 {
        self.structures() + TABLES + TABLE_LEN * slot as u64
    }

    pub fn header(&self, slot: usize) -> u64 {
        self.structures() + 32 * slot as u64
    }

    pub fn get(&self, adapter: &mut dyn Adapter, register: u64) -> u32 {
        adapter.read(0x100 + 0x80 * self.index + register)
    }

    pub fn set(&self, adapter: &mut dyn Adapter, register: u64, value: u32) {
        adapter.write(0x100 + 0x80 * self.index + register, value);
    }

    /// Has the adapter take commands and tell of all that happens.
    pub fn start(&self, adapter: &mut dyn Adapter) {
        self.set(adapter, CLB, self.structures() as u32);
        self.set(adapter, FB, self.received(0) as u32);
        self.set(adapter, PORT_IS, u32::MAX);
        self.set(adapter, PORT_IE, 0x7fff_ffff);
        self.set(adapter, CMD, STARTED);
        adapter.write(4, 2);
    }

    /// As a driver does after an error.
    pub fn restart(&self, adapter: &mut dyn Adapter) {
        self.set(adapter, CMD, STARTED & !1);
        assert_eq!(self.get(adapter, CMD) & 0x8001, 0);
        assert_eq!((self.get(adapter, CI), self.get(adapter, SACT)), (0, 0));
        self.set(adapter, PORT_IS, u32::MAX);
        self.set(adapter, CMD, STARTED);
    }

    /// Writes a command into memory, with these pieces (address, bytes) for its data.
    pub fn prepare(&self, slot: usize, ata: &Ata, pieces: &[(u64, u32)]) {
        let (header, table) = (self.header(slot), self.table(slot));
        let options = 5 | (pieces.len() as u32) << 16;
        self.put(header, &options.to_le_bytes());
        self.put(header + 4, &[0; 4]);
        self.put(header + 8, &table.to_le_bytes());
        self.put(table, &ata.fis());
        self.put(table + 0x40, &ata.packet);
        for (at, (address, len)) in (table + 0x80..).step_by(16).zip(pieces) {
            self.put(at, &address.to_le_bytes());
            self.put(at + 12, &(len - 1).to_le_bytes());
        }
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Waits until none of `slots` is issued any more, or one has failed. Returns PxTFD.
    pub fn wait(&self, adapter: &mut dyn Adapter, slots: u32) -> u32 {
        let start = Instant::now();
        loop {
            let left = (self.get(adapter, CI) | self.get(adapter, SACT)) & slots;
            let fatal = self.get(adapter, PORT_IS) & FATAL;
            if left == 0 || fatal != 0 {
                return self.get(adapter, TFD);
            }
            assert!(start.elapsed() < PATIENCE, "{left:#x} are still issued");
            std::thread::yield_now();
        }
    }

    /// Has a command done that is not queued. Returns PxTFD.
    pub fn run(&self, adapter: &mut dyn Adapter, ata: &Ata, pieces: &[(u64, u32)]) -> u32 {
        self.prepare(0, ata, pieces);
        self.set(adapter, CI, 1);
        self.wait(adapter, 1)
    }
}
