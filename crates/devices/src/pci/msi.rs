//! MSI: the capability of a function with one message (PCI Local Bus 3.0, 6.8.1). Left out:
//! several messages and masking.

use std::sync::Arc;

use super::PciError;
use super::config_memory::ConfigPage;
use super::config_space::ConfigSpaceBuilder;
use crate::platform::{MsiMessage, MsiVectors};

const CAPABILITY_ID: u8 = 0x05;
/// Message control, in the capability's first dword.
const CONTROL_ENABLE: u32 = 1 << 16;
/// Addresses have 64 bits.
const WIDE: u8 = 1 << 7;
const VECTOR: u16 = 0;

/// Message control, as configuration space has it at this moment. May be asked from any thread.
#[derive(Debug, Clone)]
pub struct MsiControl {
    page: ConfigPage,
    register: u8,
}

impl MsiControl {
    /// Whether the driver has switched from the interrupt pin to MSI.
    pub fn enabled(&self) -> bool {
        self.page.load(self.register) & CONTROL_ENABLE != 0
    }

    fn message(&self) -> Option<MsiMessage> {
        let low = u64::from(self.page.load(self.register + 1));
        let high = u64::from(self.page.load(self.register + 2));
        self.enabled().then(|| MsiMessage {
            address: high << 32 | low,
            data: self.page.load(self.register + 3) & 0xffff,
        })
    }
}

/// The message of a function.
#[derive(Debug)]
pub struct Msi {
    control: MsiControl,
    vectors: Arc<dyn MsiVectors>,
    connected: Option<MsiMessage>,
    /// A refused route was logged; the guest could repeat it without end.
    complained: bool,
}

impl Msi {
    /// Adds the capability; returns its offset for [`Msi::new`].
    ///
    /// # Errors
    /// Fails when configuration space is full.
    pub fn add_capability(builder: &mut ConfigSpaceBuilder) -> Result<u8, PciError> {
        let mut body = [0; 12];
        body[0] = WIDE;
        let writable = [
            1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ];
        builder.capability(CAPABILITY_ID, &body, &writable)
    }

    /// The message of a function whose configuration space has the capability at `capability`.
    /// `vectors` has one vector.
    pub fn new(page: ConfigPage, capability: u8, vectors: Arc<dyn MsiVectors>) -> Self {
        Self {
            control: MsiControl {
                page,
                register: capability / 4,
            },
            vectors,
            connected: None,
            complained: false,
        }
    }

    /// Message control, for whoever signals interrupts.
    pub fn control(&self) -> &MsiControl {
        &self.control
    }

    /// Connects the vector as configuration space says; to be called whenever that may have
    /// changed.
    pub fn update(&mut self) {
        let wanted = self.control.message();
        if wanted == self.connected {
            return;
        }
        match self.vectors.route(VECTOR, wanted) {
            Ok(()) => self.connected = wanted,
            Err(error) if !self.complained => {
                self.complained = true;
                tracing::warn!(%error, "The guest's MSI message can't be routed");
            }
            Err(_) => {}
        }
    }

    /// Forgets an interrupt that waits for a message to be connected.
    pub fn clear_pending(&self) {
        self.vectors.clear(VECTOR);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::pci::PciHost;
    use crate::pci::config_space::Identity;
    use crate::testing::MockMsi;

    #[test]
    fn the_message_is_connected_while_enabled() {
        let identity = Identity {
            vendor: 1,
            device: 2,
            subsystem_vendor: 3,
            subsystem: 4,
            class: 5,
            revision: 6,
        };
        let mut builder = ConfigSpaceBuilder::new(&identity);
        let at = Msi::add_capability(&mut builder).unwrap();
        let host = PciHost::new(0..0).unwrap();
        let config = builder.build(host.slot(1).unwrap());
        let vectors = Arc::new(MockMsi::new(1));
        let mut msi = Msi::new(config.page().clone(), at, vectors.clone());
        let at = u16::from(at);
        config.write(at + 4, &0xfee0_1007_u32.to_le_bytes());
        config.write(at + 8, &1_u32.to_le_bytes());
        config.write(at + 12, &0xffff_0041_u32.to_le_bytes());
        msi.update();
        assert_eq!(vectors.vector(0).message, None);
        config.write(at + 2, &[0xff, 0xff]);
        // One message, of 64 bits, and no masking.
        assert_eq!(
            msi.control().page.load(u8::try_from(at / 4).unwrap()) >> 16,
            0x81
        );
        msi.update();
        let message = MsiMessage {
            address: 0x1_fee0_1004,
            data: 0x41,
        };
        assert_eq!(vectors.vector(0).message, Some(message));
        msi.update();
        assert_eq!(vectors.vector(0).routed, 1);
        config.reset();
        msi.update();
        assert_eq!(vectors.vector(0).message, None);
    }
}
