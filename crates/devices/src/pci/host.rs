//! The PCI bus as the processor side sees it: who is in which slot and who decodes what.

use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::bridge::{BridgeModel, HostBridge};
use super::config_memory::{ConfigMemory, ConfigPage, FUNCTION_LEN, SLOT_LEN, SLOTS};
use super::config_space::ConfigSpaceState;
use super::dword::dword_parts;
use super::{DecodedBar, DecodedBars, PciError, PciFunction};
use crate::bus::{Shared, lock, shared};
use crate::state::{StateError, ensure};

/// Configuration address register: the access is meant for us.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Reset control register: resets the machine when it changes from 0 to 1.
const RESET_CPU: u8 = 1 << 2;
/// The bits of the reset control register: reset kind, trigger and full reset.
const RESET_BITS: u8 = 0b1110;

/// Length of ECAM: 256 buses, of which all but the first are empty.
const ECAM_LEN: u64 = 256 << 20;

/// What a function needs to have of the bus it is put on.
#[derive(Debug)]
pub struct PciSlot {
    pub(super) page: ConfigPage,
    pub(super) window: Range<u64>,
}

/// One BAR in the table of decoded BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    slot: u8,
    bar: DecodedBar,
}

/// One PCI bus with its host bridge in slot 0. Functions are added before the vCPUs run.
pub struct PciHost {
    memory: Arc<ConfigMemory>,
    window: Range<u64>,
    bridge: Shared<HostBridge>,
    functions: [Option<Arc<Mutex<dyn PciFunction>>>; SLOTS as usize],
    /// What is decoded, by slot. Taken while a function's lock is held, never before it.
    mappings: RwLock<Vec<Mapping>>,
    /// Where ECAM is in the window, if it is there, as long as the bridge's PCIEXBAR puts it
    /// nowhere.
    first_ecam: Option<u64>,
    /// Where it is now; 0 for nowhere in the window.
    ecam: AtomicU64,
    /// Whether the configuration ports answer.
    config_ports: AtomicBool,
    /// The configuration address register.
    address: AtomicU32,
    /// The reset control register.
    reset_control: AtomicU8,
}

impl Debug for PciHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciHost")
            .field("window", &self.window)
            .field("mappings", &self.mappings)
            .finish_non_exhaustive()
    }
}

impl PciHost {
    /// A bus with nothing but the host bridge. BARs are decoded in `window` only.
    ///
    /// # Errors
    /// Fails when the host has no memory for configuration space.
    pub fn new(window: Range<u64>) -> Result<Self, PciError> {
        let memory = Arc::new(ConfigMemory::new().map_err(PciError::ConfigMemory)?);
        let bridge = shared(HostBridge::new(take_slot(&memory, &window, 0)?));
        let mut functions = [const { None }; SLOTS as usize];
        functions[0] = Some(bridge.clone() as Arc<Mutex<dyn PciFunction>>);
        Ok(Self {
            memory,
            window,
            bridge,
            functions,
            mappings: RwLock::default(),
            first_ecam: None,
            ecam: AtomicU64::new(0),
            config_ports: AtomicBool::new(true),
            address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
        })
    }

    /// Puts ECAM into the window: at `first`, and then where firmware wants it by the host bridge's
    /// PCIEXBAR. Without this, it is where whoever uses [`PciHost::config_read`] has it.
    #[must_use]
    pub fn with_movable_ecam(mut self, first: u64) -> Self {
        self.first_ecam = Some(first);
        self.move_ecam();
        self
    }

    /// Takes up what PCIEXBAR says.
    fn move_ecam(&self) {
        if let Some(first) = self.first_ecam {
            let base = lock(&self.bridge).ecam().unwrap_or(first);
            self.ecam.store(base, Ordering::Relaxed);
        }
    }

    /// Where in ECAM an address of the window is.
    fn in_ecam(&self, address: u64) -> Option<u64> {
        let base = self.ecam.load(Ordering::Relaxed);
        let offset = address.checked_sub(base).filter(|_| base != 0)?;
        (offset < ECAM_LEN).then_some(offset)
    }

    /// Shows `model` as the host bridge, and the configuration ports or none, which leaves ECAM:
    /// what is to start next asks for it. Call this while no vCPU runs.
    pub fn set_face(&self, model: BridgeModel, config_ports: bool) {
        lock(&self.bridge).set_model(model);
        self.config_ports.store(config_ports, Ordering::Relaxed);
    }

    /// Whether the configuration ports answer.
    pub(super) fn has_config_ports(&self) -> bool {
        self.config_ports.load(Ordering::Relaxed)
    }

    /// Reserves a slot (1 to 31) for a function that is to be made. Once made, it is put there
    /// with [`PciHost::add`].
    ///
    /// # Errors
    /// Refuses a slot that is taken or does not exist.
    pub fn slot(&self, slot: u8) -> Result<PciSlot, PciError> {
        take_slot(&self.memory, &self.window, slot)
    }

    /// Puts a function into the slot that was reserved for it.
    ///
    /// # Errors
    /// Refuses a slot that is taken or does not exist.
    pub fn add(&mut self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) -> Result<(), PciError> {
        let free = match self.functions.get_mut(usize::from(slot)) {
            Some(free @ None) => free,
            Some(Some(_)) => return Err(PciError::SlotTaken(slot)),
            None => return Err(PciError::NoSuchSlot(slot)),
        };
        let decoded = lock(&function).decoded();
        *free = Some(function);
        self.set_decoded(slot, &decoded);
        Ok(())
    }

    /// The memory of configuration space. The VMM may map it at the ECAM window's address as a
    /// read-only slot; it must keep the memory while it does.
    pub fn config_memory(&self) -> &Arc<ConfigMemory> {
        &self.memory
    }

    /// The window in which BARs are decoded.
    pub fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Reads configuration space at `offset` from the start of ECAM. Takes no lock.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.memory.read(offset, data);
    }

    /// Writes configuration space at `offset` from the start of ECAM.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        for part in dword_parts(offset, data.len()) {
            let Ok(dword) = usize::try_from(part.dword) else {
                continue;
            };
            let in_slot = dword % SLOT_LEN + part.lane;
            if in_slot < FUNCTION_LEN
                && let Ok(slot) = u8::try_from(dword / SLOT_LEN)
                && let Ok(offset) = u16::try_from(in_slot)
                && let Some(part) = data.get(part.data)
            {
                self.function_config_write(slot, offset, part);
            }
        }
    }

    fn function_config_write(&self, slot: u8, offset: u16, data: &[u8]) {
        let Some(function) = self.function(slot) else {
            return;
        };
        let mut function = lock(function);
        let before = function.decoded();
        function.config_write(offset, data);
        let after = function.decoded();
        if before != after {
            self.set_decoded(slot, &after);
        }
        drop(function);
        if slot == 0 {
            self.move_ecam();
        }
    }

    /// Reads `data` at guest-physical `address` from whichever BAR is there.
    pub fn window_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = self.in_ecam(address) {
            self.config_read(offset, data);
        } else if let Some((function, bar, offset)) = self.find(address, data.len()) {
            lock(function).bar_read(bar, offset, data);
        }
    }

    /// Writes `data` at guest-physical `address` to whichever BAR is there.
    pub fn window_write(&self, address: u64, data: &[u8]) {
        if let Some(offset) = self.in_ecam(address) {
            self.config_write(offset, data);
        } else if let Some((function, bar, offset)) = self.find(address, data.len()) {
            lock(function).bar_write(bar, offset, data);
        }
    }

    /// The configuration address register.
    pub(super) fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Writes the configuration address register.
    pub(super) fn set_address(&self, value: u32) {
        self.address.store(value, Ordering::Relaxed);
    }

    /// Where in ECAM the configuration address register points; `None` when that is not on our
    /// bus.
    pub(super) fn selected(&self) -> Option<u64> {
        let address = self.address();
        let bus = address >> 16 & 0xff;
        let function = u64::from(address >> 8 & 0xff);
        let register = u64::from(address & 0xfc);
        (address & ADDRESS_ENABLE != 0 && bus == 0)
            .then_some(function * FUNCTION_LEN as u64 + register)
    }

    /// The reset control register.
    pub(super) fn reset_control(&self) -> u8 {
        self.reset_control.load(Ordering::Relaxed)
    }

    /// Writes the reset control register. Returns whether the machine is to be reset; a reset
    /// of the processors alone is not told apart.
    pub(super) fn set_reset_control(&self, value: u8) -> bool {
        let old = self
            .reset_control
            .swap(value & RESET_BITS, Ordering::Relaxed);
        !old & value & RESET_CPU != 0
    }

    /// Returns the bus and all its functions to the state after power-on.
    pub fn reset_all(&self) {
        self.set_address(0);
        self.reset_control.store(0, Ordering::Relaxed);
        for (slot, function) in self.present() {
            let mut function = lock(function);
            function.reset();
            self.set_decoded(slot, &function.decoded());
        }
        self.move_ecam();
    }

    /// State of the bus and the host bridge; every other function has its own.
    pub fn state(&self) -> PciHostState {
        PciHostState {
            address: self.address(),
            reset_control: self.reset_control(),
            bridge: lock(&self.bridge).state(),
        }
    }

    /// Takes up a saved state of the bus and the host bridge. Restore the other functions first:
    /// where their BARs are counts from here on.
    ///
    /// # Errors
    /// Refuses a state that this bus can't be in.
    pub fn restore(&self, state: &PciHostState) -> Result<(), StateError> {
        let control = state.reset_control;
        let what = "PCI reset control register";
        ensure(control & !RESET_BITS == 0, what, control)?;
        lock(&self.bridge).restore(&state.bridge)?;
        self.set_address(state.address);
        self.reset_control.store(control, Ordering::Relaxed);
        for (slot, function) in self.present() {
            let function = lock(function);
            self.set_decoded(slot, &function.decoded());
        }
        self.move_ecam();
        Ok(())
    }

    fn present(&self) -> impl Iterator<Item = (u8, &Mutex<dyn PciFunction>)> {
        let slots = (0..).zip(&self.functions);
        slots.filter_map(|(slot, function)| Some((slot, function.as_deref()?)))
    }

    fn function(&self, slot: u8) -> Option<&Mutex<dyn PciFunction>> {
        self.functions.get(usize::from(slot))?.as_deref()
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn PciFunction>, u8, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        // Where a guest lets BARs overlap, the lowest slot answers.
        let found = *mappings
            .iter()
            .find(|m| address >= m.bar.base && last - m.bar.base < m.bar.len)?;
        drop(mappings);
        let function = self.function(found.slot)?;
        Some((function, found.bar.bar, address - found.bar.base))
    }

    fn set_decoded(&self, slot: u8, decoded: &DecodedBars) {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| mapping.slot != slot);
        let bars = decoded.iter().flatten();
        mappings.extend(bars.map(|bar| Mapping { slot, bar: *bar }));
        mappings.sort_by_key(|mapping| mapping.slot);
    }
}

fn take_slot(
    memory: &Arc<ConfigMemory>,
    window: &Range<u64>,
    slot: u8,
) -> Result<PciSlot, PciError> {
    if slot >= SLOTS {
        return Err(PciError::NoSuchSlot(slot));
    }
    let page = memory.add_page(slot).map_err(PciError::ConfigMemory)?;
    Ok(PciSlot {
        page: page.ok_or(PciError::SlotTaken(slot))?,
        window: window.clone(),
    })
}

/// State of a [`PciHost`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHostState {
    /// The configuration address register.
    pub address: u32,
    /// The reset control register.
    pub reset_control: u8,
    /// Registers of the host bridge.
    pub bridge: ConfigSpaceState,
}
