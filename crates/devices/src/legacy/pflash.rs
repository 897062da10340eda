//! A NOR flash for UEFI variables, with what OVMF's driver uses of the Intel command set (CFI
//! primary command set 0001): read array, read and clear status, program a byte, erase a block.
//!
//! Left out: identifier and CFI query, buffered programming, locking, and the wait for an end of
//! the operation. Like QEMU's, programming sets bits as well as it clears them. After programming
//! or erasing the array is read at once, where a real chip gives its status until it is told to
//! read the array.
//!
//! The guest reads the array without exits while it may, through a [`FlashWindow`]. What it writes
//! is durable before it can go on: a sequence of programmed bytes at the command that ends it, an
//! erased block at once. So a power cut leaves what a real flash would have, which UEFI's variable
//! store is made for. A host that fails to store pauses the machine; it is tried again with the
//! next change, and when the machine goes on or ends.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::bus::BusDevice;
use crate::platform::MachineControl;

/// Bytes that are erased together.
const BLOCK: usize = 4096;

const READ_ARRAY: u8 = 0xff;
const READ_STATUS: u8 = 0x70;
const CLEAR_STATUS: u8 = 0x50;
const PROGRAM: [u8; 2] = [0x10, 0x40];
const ERASE: u8 = 0x20;
const ERASE_CONFIRM: u8 = 0xd0;

const STATUS_READY: u8 = 1 << 7;
const STATUS_PROGRAM_ERROR: u8 = 1 << 4;

/// Where the content is kept.
pub trait FlashStore: Send + Sync + Debug {
    /// Writes at `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the host says.
    fn sync(&self) -> io::Result<()>;
}

/// The guest's view of the flash.
pub trait FlashWindow: Send + Sync + Debug {
    /// Lets the guest read the array itself, or sends its reads to the device.
    ///
    /// # Errors
    /// What the host says.
    fn show(&self, array: bool) -> io::Result<()>;
}

/// What a flash is made of.
#[derive(Debug, Clone)]
pub struct PflashConfig {
    /// The content, which the window shows.
    pub array: Arc<MmapRegion>,
    /// Where the content is kept.
    pub store: Arc<dyn FlashStore>,
    /// The guest's view.
    pub window: Arc<dyn FlashWindow>,
    /// Takes the news that the host can't store.
    pub control: Arc<dyn MachineControl>,
}

/// What the last command has begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Begun {
    #[default]
    Nothing,
    Program,
    Erase,
}

/// State of a [`Pflash`]. Its content is kept where its store is, like that of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PflashState {
    begun: Begun,
    /// Reads give the status.
    shows_status: bool,
    status: u8,
}

/// The flash.
#[derive(Debug)]
pub struct Pflash {
    config: PflashConfig,
    state: PflashState,
    /// Blocks of the array, by number, that are not stored yet.
    unsaved: BTreeSet<usize>,
}

impl Pflash {
    /// A flash after power-on.
    pub fn new(config: PflashConfig) -> Self {
        Self {
            config,
            state: PflashState::default(),
            unsaved: BTreeSet::new(),
        }
    }

    /// Length of the range of addresses.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.config.array.size() as u64
    }

    /// Takes up a saved state.
    pub fn restore(&mut self, state: &PflashState) {
        self.state = state.clone();
        self.show(!state.shows_status);
    }

    /// The state to go on from; all content is stored.
    pub fn state(&mut self) -> PflashState {
        self.save();
        self.state.clone()
    }

    /// Returns to the state after power-on.
    pub fn reset(&mut self) {
        self.save();
        self.state = PflashState::default();
        self.show(true);
    }

    /// Stores what is not stored yet.
    ///
    /// # Errors
    /// What the host says; it can be tried again.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unsaved.is_empty() {
            return Ok(());
        }
        let mut bytes = [0; BLOCK];
        for block in &self.unsaved {
            let at = block * BLOCK;
            let len = BLOCK.min(self.config.array.size().saturating_sub(at));
            let part = bytes.get_mut(..len).unwrap_or_default();
            self.read_array(at, part);
            self.config.store.write(at as u64, part)?;
        }
        self.config.store.sync()?;
        self.unsaved.clear();
        Ok(())
    }

    fn save(&mut self) {
        if let Err(error) = self.flush() {
            self.state.status |= STATUS_PROGRAM_ERROR;
            let reason = format!("The UEFI variables can't be stored: {error}");
            self.config.control.pause(reason);
        }
    }

    fn show(&self, array: bool) {
        if let Err(error) = self.config.window.show(array) {
            // Worst the guest finds no flash, and keeps its variables in memory.
            tracing::warn!(%error, "The flash can't be shown to the guest as it should be");
        }
    }

    fn read_array(&self, offset: usize, bytes: &mut [u8]) {
        // Out of range, `bytes` stay ones.
        let _ = (self.config.array)
            .get_slice(offset, bytes.len())
            .and_then(|slice| slice.read_slice(bytes, 0).map(|()| slice));
    }

    fn write_array(&mut self, offset: usize, bytes: &[u8]) {
        let written = (self.config.array)
            .get_slice(offset, bytes.len())
            .and_then(|slice| slice.write_slice(bytes, 0).map(|()| slice))
            .is_ok();
        if let (true, Some(last)) = (written, bytes.len().checked_sub(1)) {
            let blocks = offset / BLOCK..=(offset + last) / BLOCK;
            self.unsaved.extend(blocks);
        }
        self.state.status |= STATUS_READY;
    }

    fn command(&mut self, command: u8) {
        let shown = self.state.shows_status;
        match command {
            READ_STATUS => self.state.shows_status = true,
            CLEAR_STATUS => self.state.status = 0,
            ERASE => self.state.begun = Begun::Erase,
            command if PROGRAM.contains(&command) => self.state.begun = Begun::Program,
            READ_ARRAY => {
                self.state.shows_status = false;
                self.save();
            }
            _ => self.state.shows_status = false,
        }
        if shown != self.state.shows_status {
            self.show(shown);
        }
    }
}

impl BusDevice for Pflash {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.state.shows_status {
            data.fill(self.state.status);
        } else if let Ok(offset) = usize::try_from(offset) {
            self.read_array(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), [first, ..]) = (usize::try_from(offset), data) else {
            return;
        };
        match std::mem::take(&mut self.state.begun) {
            Begun::Nothing => self.command(*first),
            Begun::Program => self.write_array(offset, data),
            Begun::Erase if *first == ERASE_CONFIRM => {
                self.write_array(offset / BLOCK * BLOCK, &[0xff; BLOCK]);
                self.save();
            }
            Begun::Erase => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::bus::lock;
    use crate::testing::MockControl;

    const LEN: usize = 4 * BLOCK;

    #[derive(Debug)]
    struct Host {
        durable: Mutex<Vec<u8>>,
        written: Mutex<Vec<u8>>,
        full: AtomicBool,
        shown: AtomicBool,
    }

    impl FlashStore for Host {
        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            if self.full.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let offset = usize::try_from(offset).unwrap();
            lock(&self.written)[offset..offset + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            lock(&self.durable).clone_from(&lock(&self.written));
            Ok(())
        }
    }

    impl FlashWindow for Host {
        fn show(&self, array: bool) -> io::Result<()> {
            self.shown.store(array, Ordering::Relaxed);
            Ok(())
        }
    }

    struct Machine {
        flash: Pflash,
        host: Arc<Host>,
        control: Arc<MockControl>,
    }

    fn machine() -> Machine {
        let host = Arc::new(Host {
            durable: Mutex::new(vec![0; LEN]),
            written: Mutex::new(vec![0; LEN]),
            full: AtomicBool::new(false),
            shown: AtomicBool::new(true),
        });
        let control = Arc::<MockControl>::default();
        let flash = Pflash::new(PflashConfig {
            array: Arc::new(MmapRegion::new(LEN).unwrap()),
            store: host.clone(),
            window: host.clone(),
            control: control.clone(),
        });
        Machine {
            flash,
            host,
            control,
        }
    }

    impl Machine {
        fn write(&mut self, offset: u64, bytes: &[u8]) {
            for byte in bytes {
                self.flash.write(offset, &[*byte]);
            }
        }

        fn read(&mut self, offset: u64) -> u8 {
            let mut byte = [0xff];
            self.flash.read(offset, &mut byte);
            byte[0]
        }

        fn durable(&self, offset: usize) -> u8 {
            lock(&self.host.durable)[offset]
        }
    }

    #[test]
    fn ovmf_takes_it_for_a_writable_flash() {
        let mut m = machine();
        m.flash.write_array(7, &[0xaa]);
        m.write(7, &[CLEAR_STATUS]);
        assert_eq!(m.read(7), 0xaa, "no RAM");
        m.write(7, &[READ_STATUS]);
        assert_eq!(m.read(7), 0, "no ROM");
        assert!(!m.host.shown.load(Ordering::Relaxed));
        m.write(7, &[0x10, 0xaa, READ_STATUS]);
        assert_eq!(m.read(7) & STATUS_PROGRAM_ERROR, 0, "writable");
        m.write(7, &[READ_ARRAY]);
        assert_eq!(m.read(7), 0xaa);
        assert!(m.host.shown.load(Ordering::Relaxed));
    }

    #[test]
    fn what_is_written_is_durable_when_the_guest_goes_on() {
        let mut m = machine();
        m.write(5, &[0x10, 1]);
        m.write(6000, &[0x40, 2]);
        assert_eq!((m.read(5), m.durable(5)), (1, 0));
        m.write(6000, &[READ_ARRAY]);
        assert_eq!((m.durable(5), m.durable(6000)), (1, 2));
        m.write(BLOCK as u64 + 3, &[ERASE, ERASE_CONFIRM]);
        assert_eq!(
            (m.durable(5), m.durable(6000), m.durable(BLOCK)),
            (1, 0xff, 0xff)
        );
        assert_eq!(m.durable(2 * BLOCK), 0);
        m.write(9, &[0x10, 3]);
        m.flash.reset();
        assert_eq!(m.durable(9), 3);
    }

    /// A driver that goes to and fro does not have the host write all of the flash each time.
    #[test]
    fn only_blocks_that_changed_are_stored() {
        let mut m = machine();
        lock(&m.host.written)[BLOCK + 7] = 0x77;
        m.write(3 * BLOCK as u64, &[0x10, 1]);
        m.flash.write(BLOCK as u64 - 4, &[0x40]);
        m.flash.write(BLOCK as u64 - 4, &[2; 4]);
        m.write(0, &[READ_ARRAY]);
        assert_eq!((m.durable(3 * BLOCK), m.durable(BLOCK - 1)), (1, 2));
        assert_eq!(m.durable(BLOCK + 7), 0x77);
    }

    #[test]
    fn nothing_is_erased_without_confirmation() {
        let mut m = machine();
        m.write(0, &[ERASE, READ_ARRAY]);
        assert_eq!(m.read(0), 0);
    }

    #[test]
    fn a_full_host_pauses_the_machine_and_gets_all_later() {
        let mut m = machine();
        m.host.full.store(true, Ordering::Relaxed);
        m.write(1, &[0x10, 1, READ_ARRAY]);
        assert_eq!(m.control.pauses(), 1);
        assert_eq!(m.durable(1), 0);
        m.flash.flush().unwrap_err();
        m.host.full.store(false, Ordering::Relaxed);
        m.write(2, &[0x10, 2, READ_ARRAY]);
        assert_eq!((m.durable(1), m.durable(2)), (1, 2));
    }

    #[test]
    fn state_survives_a_round_trip_by_text() {
        let mut m = machine();
        m.write(0, &[0x10, 5, READ_STATUS, ERASE]);
        let text = serde_json::to_string(&m.flash.state()).unwrap();
        assert_eq!(m.durable(0), 5);
        let mut other = machine();
        other.flash.restore(&serde_json::from_str(&text).unwrap());
        assert!(!other.host.shown.load(Ordering::Relaxed));
        assert_eq!(other.read(0), STATUS_READY);
        other.write(0, &[ERASE_CONFIRM, READ_ARRAY]);
        assert_eq!(other.read(0), 0xff);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(
            accesses in proptest::collection::vec(
                (0..LEN as u64 + 8, any::<bool>(), any::<[u8; 8]>(), 0usize..9), 0..200)
        ) {
            let mut m = machine();
            for (offset, write, mut bytes, len) in accesses {
                if write {
                    m.flash.write(offset, &bytes[..len]);
                } else {
                    m.flash.read(offset, &mut bytes[..len]);
                }
            }
            m.flash.reset();
            let array = lock(&m.host.durable).clone();
            let mut bytes = vec![0; LEN];
            m.flash.read_array(0, &mut bytes);
            if !array.iter().all(|byte| *byte == 0) {
                prop_assert_eq!(array, bytes);
            }
        }
    }
}
