//! From the adapter to its driver: IS, GHC.IE, the message and the interrupt pin (AHCI 1.3.1, 10.6).

use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::pci::config_memory::ConfigPage;
use crate::pci::config_space::{COMMAND_INTX_DISABLE, COMMAND_STATUS, STATUS_INTERRUPT};
use crate::pci::msi::MsiControl;
use crate::platform::{IrqLine, MsiVectors};

/// The only vector.
const VECTOR: u16 = 0;

/// The way of an adapter to its driver. May be used by any thread; its lock is innermost but for
/// the interrupt line's own.
#[derive(Debug)]
pub struct Interrupts {
    latch: Mutex<Latch>,
    vectors: Arc<dyn MsiVectors>,
    msi: MsiControl,
    line: Arc<dyn IrqLine>,
    page: ConfigPage,
}

#[derive(Debug, Default)]
struct Latch {
    /// IS: one bit for each port that has or had an interrupt.
    ports: u32,
    /// GHC.IE.
    enabled: bool,
}

impl Interrupts {
    pub fn new(
        vectors: Arc<dyn MsiVectors>,
        msi: MsiControl,
        line: Arc<dyn IrqLine>,
        page: ConfigPage,
    ) -> Self {
        Self {
            latch: Mutex::default(),
            vectors,
            msi,
            line,
            page,
        }
    }

    /// Port number `port` has an interrupt that its driver wants.
    pub fn raise(&self, port: usize) {
        let mut latch = lock(&self.latch);
        latch.ports |= 1 << port;
        self.signal(&latch);
    }

    /// IS.
    pub fn ports(&self) -> u32 {
        lock(&self.latch).ports
    }

    /// The driver clears bits of IS. Ports that still have an interrupt must be raised again.
    pub fn clear(&self, ports: u32) {
        let mut latch = lock(&self.latch);
        latch.ports &= !ports;
        self.set_line(&latch);
    }

    /// GHC.IE.
    pub fn enabled(&self) -> bool {
        lock(&self.latch).enabled
    }

    /// Sets GHC.IE.
    pub fn enable(&self, enabled: bool) {
        let mut latch = lock(&self.latch);
        if latch.enabled != enabled {
            latch.enabled = enabled;
            self.signal(&latch);
        }
    }

    /// Takes up both registers.
    pub fn set(&self, ports: u32, enabled: bool) {
        let mut latch = lock(&self.latch);
        *latch = Latch { ports, enabled };
        self.set_line(&latch);
    }

    /// Brings the line in accord with what configuration space says by now.
    pub fn sync_line(&self) {
        self.set_line(&lock(&self.latch));
    }

    fn signal(&self, latch: &Latch) {
        if self.msi.enabled() && latch.enabled && latch.ports != 0 {
            // One too many finds nothing to do; one too few would be waited for.
            self.vectors.trigger(VECTOR);
        }
        self.set_line(latch);
    }

    fn set_line(&self, latch: &Latch) {
        let pending = latch.enabled && latch.ports != 0 && !self.msi.enabled();
        let bit = if pending { STATUS_INTERRUPT } else { 0 };
        self.page.update(COMMAND_STATUS, STATUS_INTERRUPT, bit);
        let disabled = self.page.load(COMMAND_STATUS) & COMMAND_INTX_DISABLE != 0;
        self.line.set_level(pending && !disabled);
    }
}
