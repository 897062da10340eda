//! MSI-X: capability, vector table and pending bits (PCI Local Bus 3.0, 6.8.2).
//!
//! A vector is connected to its message while MSI-X is enabled and neither the function nor the
//! vector is masked. Bus mastering is not asked for.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PciError;
use super::config_memory::ConfigPage;
use super::config_space::ConfigSpaceBuilder;
use super::dword::dword_parts;
use crate::platform::{MsiMessage, MsiVectors};
use crate::state::{StateError, ensure, same};

const CAPABILITY_ID: u8 = 0x11;
const CONTROL_ENABLE: u32 = 1 << 31;
const CONTROL_FUNCTION_MASK: u32 = 1 << 30;
const VECTOR_MASKED: u32 = 1;
/// Most vectors that the capability can express.
const MAX_VECTORS: u16 = 2048;

/// Length of a table entry in bytes.
pub const ENTRY_LEN: u32 = 16;

/// Where in the function's BARs table and pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// The BAR of both.
    pub bar: u8,
    /// Offset of the table, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits, a multiple of 8.
    pub pending: u32,
}

/// Message control, as configuration space has it at this moment. May be asked from any thread.
#[derive(Debug, Clone)]
pub struct MsixControl {
    page: ConfigPage,
    register: u8,
}

impl MsixControl {
    /// Whether the driver has switched from the interrupt pin to MSI-X.
    pub fn enabled(&self) -> bool {
        self.page.load(self.register) & CONTROL_ENABLE != 0
    }

    fn delivers(&self) -> bool {
        let control = self.page.load(self.register);
        control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE
    }
}

/// A table entry as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The vector's mask bit.
    pub masked: bool,
}

impl Default for MsixEntry {
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            masked: true,
        }
    }
}

impl MsixEntry {
    fn dword(&self, index: u64) -> u32 {
        match index {
            0 => (self.address & 0xffff_ffff) as u32,
            1 => (self.address >> 32) as u32,
            2 => self.data,
            _ => u32::from(self.masked) * VECTOR_MASKED,
        }
    }

    fn set_dword(&mut self, index: u64, value: u32) {
        let wide = u64::from(value);
        match index {
            0 => self.address = self.address & !0xffff_ffff | wide,
            1 => self.address = self.address & 0xffff_ffff | wide << 32,
            2 => self.data = value,
            _ => self.masked = value & VECTOR_MASKED != 0,
        }
    }
}

/// The MSI-X vectors of a function.
#[derive(Debug)]
pub struct Msix {
    control: MsixControl,
    /// Each vector's entry, and the message it is connected to now.
    table: Vec<(MsixEntry, Option<MsiMessage>)>,
    vectors: Arc<dyn MsiVectors>,
    /// A refused route was logged; the guest could repeat it without end.
    complained: bool,
}

impl Msix {
    /// Adds the capability for `count` vectors; returns its offset for [`Msix::new`].
    ///
    /// # Errors
    /// Refuses a count of 0 or beyond the specification's and fails when configuration space is
    /// full.
    pub fn add_capability(
        builder: &mut ConfigSpaceBuilder,
        layout: MsixLayout,
        count: u16,
    ) -> Result<u8, PciError> {
        let size = match count.checked_sub(1) {
            Some(size) if count <= MAX_VECTORS => size.to_le_bytes(),
            _ => return Err(PciError::InvalidVectorCount(count)),
        };
        let mut body = [0; 10];
        let table = (layout.table | u32::from(layout.bar)).to_le_bytes();
        let pending = (layout.pending | u32::from(layout.bar)).to_le_bytes();
        let bytes = size.into_iter().chain(table).chain(pending);
        body.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        builder.capability(CAPABILITY_ID, &body, &[0, 0xc0])
    }

    /// The vectors of a function whose configuration space has the capability at `capability`.
    pub fn new(page: ConfigPage, capability: u8, count: u16, vectors: Arc<dyn MsiVectors>) -> Self {
        Self {
            control: MsixControl {
                page,
                register: capability / 4,
            },
            table: vec![<_>::default(); count.into()],
            vectors,
            complained: false,
        }
    }

    /// Message control, for whoever signals interrupts.
    pub fn control(&self) -> &MsixControl {
        &self.control
    }

    /// Connects and masks vectors after message control may have changed.
    pub fn update(&mut self) {
        for index in 0..self.table.len() {
            self.connect(index);
        }
    }

    /// Reads the table at `offset` from its start.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for part in dword_parts(offset, data.len()) {
            if let Some((entry, _)) = entry_index(part.dword).and_then(|i| self.table.get(i)) {
                part.extract(entry.dword(part.dword % 16 / 4), data);
            }
        }
    }

    /// Writes the table at `offset` from its start. Anything but whole dwords is ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        for part in dword_parts(offset, data.len()).filter(|part| part.is_whole()) {
            if let Some(index) = entry_index(part.dword)
                && let Some((entry, _)) = self.table.get_mut(index)
            {
                entry.set_dword(part.dword % 16 / 4, part.insert(data).0);
                // A qword write of the address connects twice at worst: drivers mask first.
                self.connect(index);
            }
        }
    }

    /// Reads the pending bits at `offset` from their start.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for part in dword_parts(offset, data.len()) {
            let mut bits = 0;
            for bit in 0..32 {
                let vector = part.dword.saturating_mul(8).saturating_add(bit);
                if let Ok(vector) = u16::try_from(vector)
                    && usize::from(vector) < self.table.len()
                    && self.vectors.pending(vector)
                {
                    bits |= 1 << bit;
                }
            }
            part.extract(bits, data);
        }
    }

    /// Forgets the interrupts that wait to be unmasked: whoever they were for is gone.
    pub fn clear_pending(&self) {
        for (vector, _) in (0..).zip(&self.table) {
            self.vectors.clear(vector);
        }
    }

    /// Masks and clears all entries. Message control is configuration space's to reset.
    pub fn reset(&mut self) {
        for (entry, _) in &mut self.table {
            *entry = MsixEntry::default();
        }
        self.update();
        self.clear_pending();
    }

    /// The table and which vectors are pending.
    pub fn state(&self) -> MsixState {
        MsixState {
            table: self.table.iter().map(|(entry, _)| *entry).collect(),
            pending: (0..)
                .zip(&self.table)
                .map(|(vector, _)| vector)
                .filter(|vector| self.vectors.pending(*vector))
                .collect(),
        }
    }

    /// Takes up a saved state, once configuration space has its own.
    ///
    /// # Errors
    /// Refuses a state with another number of vectors.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), StateError> {
        same(
            "number of MSI-X vectors",
            state.table.len(),
            self.table.len(),
        )?;
        for vector in &state.pending {
            let exists = usize::from(*vector) < self.table.len();
            ensure(exists, "pending MSI-X vector", *vector)?;
        }
        self.clear_pending();
        for ((entry, _), saved) in self.table.iter_mut().zip(&state.table) {
            *entry = *saved;
        }
        self.update();
        for vector in &state.pending {
            self.vectors.trigger(*vector);
        }
        Ok(())
    }

    fn connect(&mut self, index: usize) {
        let Some((entry, connected)) = self.table.get_mut(index) else {
            return;
        };
        let wanted = (!entry.masked && self.control.delivers()).then_some(MsiMessage {
            address: entry.address,
            data: entry.data,
        });
        let Ok(vector) = u16::try_from(index) else {
            return;
        };
        if wanted == *connected {
            return;
        }
        match self.vectors.route(vector, wanted) {
            Ok(()) => *connected = wanted,
            Err(error) if !self.complained => {
                self.complained = true;
                tracing::warn!(vector, %error, "failed to route an MSI-X vector");
            }
            Err(_) => {}
        }
    }
}

fn entry_index(offset: u64) -> Option<usize> {
    usize::try_from(offset / u64::from(ENTRY_LEN)).ok()
}

/// State of an [`Msix`]; message control is part of configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The table.
    pub table: Vec<MsixEntry>,
    /// Vectors whose interrupt waits to be unmasked.
    pub pending: Vec<u16>,
}
