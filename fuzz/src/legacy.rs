//! The targets of `edgevmm-devices` that firmware talks to: fw_cfg and the flash of UEFI variables.

use std::sync::{Arc, Mutex, PoisonError};

use edgevmm_devices::GuestMemory;
use edgevmm_devices::bus::BusDevice;
use edgevmm_devices::legacy::fw_cfg::{FwCfg, FwCfgItems, NumberedItems};
use edgevmm_devices::legacy::pflash::{FlashStore, FlashWindow, Pflash, PflashConfig};
use edgevmm_devices::platform::{MachineControl, MachineRequest};
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory};

const INPUT_MAX: usize = 16 << 10;
const STEPS_MAX: usize = 1000;
const MEMORY: usize = 1 << 20;
const FLASH: usize = 16 << 10;

/// A step: what is done, where, with which data.
struct Step {
    what: u8,
    at: u16,
    data: [u8; 8],
    len: usize,
}

impl Step {
    const LEN: usize = 12;

    fn data(&self) -> &[u8] {
        self.data.get(..self.len).unwrap_or_default()
    }
}

fn steps(input: &[u8]) -> impl Iterator<Item = Step> {
    let input = input.get(..INPUT_MAX).unwrap_or(input);
    let (chunks, _) = input.as_chunks::<{ Step::LEN }>();
    chunks.iter().take(STEPS_MAX).map(|step| {
        let [what, len, a0, a1, data @ ..] = *step;
        Step {
            what,
            at: u16::from_le_bytes([a0, a1]),
            data,
            len: usize::from(len) % 9,
        }
    })
}

/// Selects items and reads them, by port and by DMA requests that the input puts into memory.
pub fn fw_cfg(input: &[u8]) {
    let Ok(memory) = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]) else {
        return;
    };
    let memory = Arc::new(memory);
    let mut items = FwCfgItems::new(NumberedItems {
        cpus: 1,
        max_cpus: 1,
        boot_menu: false,
    });
    for (name, len) in [("etc/empty", 0), ("etc/some", 300), ("etc/much", 100_000)] {
        if items.add_file(name, vec![0x5a; len]).is_err() {
            return;
        }
    }
    let mut device = FwCfg::new(Arc::clone(&memory), items);
    for mut step in steps(input) {
        let (at, len) = (u64::from(step.at), step.len);
        match step.what % 4 {
            0 => device.write(at % 12, step.data()),
            1 => device.read(at % 12, step.data.get_mut(..len).unwrap_or_default()),
            // A request, or a part of one. Beyond memory nothing can be written.
            2 => drop(memory.write_slice(step.data(), GuestAddress(at))),
            _ => {
                device.write(4, &[0; 4]);
                device.write(8, &u32::from(step.at).to_be_bytes());
            }
        }
    }
    let state = device.state();
    device.reset();
    device.restore(&state);
    assert_eq!(device.state(), state);
}

/// The host's part of a flash.
#[derive(Debug)]
struct Host {
    stored: Mutex<Vec<u8>>,
}

impl FlashStore for Host {
    fn write(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let range = start..start.saturating_add(bytes.len());
        let Some(place) = stored.get_mut(range) else {
            panic!("{} bytes at {offset} are outside of the flash", bytes.len());
        };
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl FlashWindow for Host {
    fn show(&self, _: bool) -> std::io::Result<()> {
        Ok(())
    }
}

impl MachineControl for Host {
    fn request(&self, request: MachineRequest) {
        unreachable!("{request:?}");
    }

    fn pause(&self, reason: String) {
        unreachable!("{reason}");
    }
}

/// Programs and erases; what the guest sees at last is what is stored.
pub fn pflash(input: &[u8]) {
    let Ok(array) = MmapRegion::new(FLASH) else {
        return;
    };
    let array = Arc::new(array);
    let host = Arc::new(Host {
        stored: Mutex::new(vec![0; FLASH]),
    });
    let mut flash = Pflash::new(PflashConfig {
        array: Arc::clone(&array),
        store: host.clone(),
        window: host.clone(),
        control: host.clone(),
    });
    for mut step in steps(input) {
        let (at, len) = (u64::from(step.at), step.len);
        match step.what % 4 {
            0 => flash.read(at, step.data.get_mut(..len).unwrap_or_default()),
            1 => flash.write(at, &[0x40]),
            2 => {
                let state = flash.state();
                flash.restore(&state);
            }
            _ => flash.write(at, step.data()),
        }
    }
    flash.reset();
    let mut shown = vec![0; FLASH];
    let all = array.get_slice(0, FLASH);
    assert!(all.is_ok_and(|all| all.read_slice(&mut shown, 0).is_ok()));
    let stored = host.stored.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(*stored == shown, "the guest sees what is not stored");
}
