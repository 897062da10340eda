//! The target of `edgevmm-devices`: a driver of a SATA adapter that does whatever it likes.

use std::sync::{Arc, Mutex, PoisonError};

use edgevmm_block::{BlockBackend, BlockError, Limits, VolatileSlice};
use edgevmm_devices::GuestMemory;
use edgevmm_devices::ahci::{Ahci, AhciConfig, Drive, DriveConfig};
use edgevmm_devices::disk::{Aio, ErrorPolicy};
use edgevmm_devices::pci::{PciFunction, PciHost};
use edgevmm_devices::platform::{IrqLine, MachineControl, MachineRequest, MsiMessage, MsiVectors};
use vm_memory::{Bytes, GuestAddress};

const INPUT_MAX: usize = 16 << 10;
const STEPS_MAX: usize = 200;
const MEMORY: usize = 2 << 20;
const DISK: usize = 1 << 20;
const BAR: u8 = 5;

/// Where the steps below put a port's structures, each port's apart.
const LIST: u64 = 0x1_0000;
const RECEIVED: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const DATA: u64 = 0x4000;

/// A disk in memory.
#[derive(Debug)]
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn move_all(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        each: impl Fn(&VolatileSlice<'_>, &mut [u8]),
    ) -> Result<(), BlockError> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        let size = bytes.len() as u64;
        let outside = BlockError::OutOfRange {
            offset,
            len: len as u64,
            size,
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(mut part) = bytes.get_mut(start..start.saturating_add(len)) else {
            return Err(outside);
        };
        for buf in bufs {
            let (now, rest) = part.split_at_mut(buf.len());
            each(buf, now);
            part = rest;
        }
        Ok(())
    }
}

impl BlockBackend for Ram {
    fn size(&self) -> u64 {
        DISK as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block: 512,
            physical_block: 4096,
            discard_granularity: 512,
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.move_all(bufs, offset, |buf, bytes| buf.copy_from(&*bytes))
    }

    fn write_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.move_all(bufs, offset, |buf, bytes| {
            buf.copy_to(bytes);
        })
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        assert!(len > 0 && offset + len <= DISK as u64);
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        unreachable!("no ATA command zeroes");
    }
}

/// What the machine around the adapter does: nothing.
#[derive(Debug)]
struct Nowhere;

impl IrqLine for Nowhere {
    fn set_level(&self, _: bool) {}
}

impl MsiVectors for Nowhere {
    fn route(&self, vector: u16, _: Option<MsiMessage>) -> std::io::Result<()> {
        assert_eq!(vector, 0);
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        assert_eq!(vector, 0);
    }

    fn pending(&self, _: u16) -> bool {
        false
    }

    fn clear(&self, _: u16) {}
}

impl MachineControl for Nowhere {
    fn request(&self, request: MachineRequest) {
        unreachable!("{request:?}");
    }

    fn pause(&self, reason: String) {
        unreachable!("{reason}");
    }
}

fn adapter(memory: &Arc<GuestMemory>) -> Option<Ahci> {
    let config = |name: &str| DriveConfig {
        name: name.to_owned(),
        aio: Aio::Threads,
        error_policy: ErrorPolicy::Report,
        ..DriveConfig::default()
    };
    let ram = || Arc::new(Ram(Mutex::new(vec![0x5a; DISK])));
    let disk = Drive::disk(config("disk"), ram(), Arc::new(Nowhere));
    let cd = Drive::cdrom(config("cd"), Some(ram()), Arc::new(Nowhere));
    let host = PciHost::new(0..0).ok()?;
    let config = AhciConfig {
        slot: host.slot(1).ok()?,
        msi: Arc::new(Nowhere),
        intx: Arc::new(Nowhere),
        memory: Arc::clone(memory),
        bar_address: None,
    };
    Ahci::new(vec![disk, cd], config).ok()
}

/// Takes the input apart.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*now)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }
}

/// Does the steps of the input: register and memory accesses, and whole commands.
pub fn ahci(input: &[u8]) {
    if input.len() > INPUT_MAX {
        return;
    }
    let Ok(memory) = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]) else {
        return;
    };
    let memory = Arc::new(memory);
    let Some(mut ahci) = adapter(&memory) else {
        return;
    };
    let mut input = Input(input);
    for _ in 0..STEPS_MAX {
        if step(&mut input, &mut ahci, &memory).is_none() {
            break;
        }
    }
    let state = ahci.suspend();
    if let Err(error) = ahci.restore(&state) {
        panic!("its own state is refused: {error}");
    }
    assert_eq!(ahci.suspend(), state);
    ahci.reset();
    let mut version = [0; 4];
    ahci.bar_read(BAR, 0x10, &mut version);
    assert_eq!(u32::from_le_bytes(version), 0x0001_0301);
}

fn step(input: &mut Input<'_>, ahci: &mut Ahci, memory: &GuestMemory) -> Option<()> {
    match input.byte()? % 8 {
        0 => {
            let at = u16::from_le_bytes(input.take()?) & 0x1fff;
            let data = input.take::<8>()?;
            let len = usize::from(data[0] % 8) + 1;
            ahci.bar_write(BAR, at.into(), data.get(..len)?);
            let mut data = data;
            ahci.bar_read(BAR, at.into(), &mut data);
        }
        1 => {
            let at = u32::from_le_bytes(input.take()?);
            let data = input.take::<8>()?;
            // Beyond memory nothing can be written, which is fine.
            let _ = memory.write_slice(&data, GuestAddress(u64::from(at) % MEMORY as u64));
        }
        2 => {
            let at = u16::from(input.byte()?) & !3;
            ahci.config_write(at, &input.take::<4>()?);
        }
        3 => {
            ahci.suspend();
            ahci.resume();
        }
        4 => ahci.reset(),
        _ => command(input, ahci, memory)?,
    }
    Some(())
}

/// Issues a command where a port can find it, and has it done.
fn command(input: &mut Input<'_>, ahci: &mut Ahci, memory: &GuestMemory) -> Option<()> {
    let [port, slot, pieces, queued] = input.take::<4>()?;
    let (port, slot) = (u64::from(port & 1), u64::from(slot & 31));
    let fis: [u8; 18] = input.take()?;
    let packet: [u8; 12] = input.take()?;
    let list = LIST * (port + 1);
    let (header, table) = (list + 32 * slot, list + TABLE);
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).ok();
    put(header, &[5, 0, pieces, 0, 0, 0, 0, 0])?;
    put(header + 8, &table.to_le_bytes())?;
    put(table, &[0x27])?;
    put(table + 1, &fis)?;
    put(table + 0x40, &packet)?;
    for piece in 0..u64::from(pieces.min(4)) {
        let [a, b, c, d] = input.take()?;
        let len = u32::from_le_bytes([a, b, c & 0x1f, d & 0x80]);
        put(table + 0x80 + 16 * piece, &(list + DATA).to_le_bytes())?;
        put(table + 0x8c + 16 * piece, &len.to_le_bytes())?;
    }
    let base = 0x100 + 0x80 * port;
    let mut set = |at: u64, value: u32| ahci.bar_write(BAR, base + at, &value.to_le_bytes());
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    set(0x00, low(list));
    set(0x04, 0);
    set(0x08, low(list + RECEIVED));
    set(0x0c, 0);
    set(0x18, 0);
    set(0x18, 0x11);
    if queued & 1 != 0 {
        set(0x34, 1 << slot);
    }
    set(0x38, 1 << slot);
    ahci.suspend();
    ahci.resume();
    Some(())
}
