//! PCI: functions, their configuration space, and the host bridge that reaches them.

/// A PCI function as the host bridge sees it.
///
/// Configuration reads have no side effects: they are answered from the function's 4 KiB of
/// configuration space, which the VMM may also map into the guest read-only.
pub trait PciFunction: Send {
    /// Reads `data.len()` bytes (1, 2 or 4) of configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes `data` (1, 2 or 4 bytes) to configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// The memory BARs that are decoded now: (BAR index, guest-physical base, length).
    fn decoded(&self) -> DecodedBars;

    /// Reads from a memory BAR. `data` comes filled with ones.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes to a memory BAR.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// Returns to the state after power-on.
    fn reset(&mut self);
}

/// One decoded memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodedBar {
    /// BAR index, 0 to 5.
    pub bar: u8,
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The decoded BARs of a function, without allocation: at most six.
pub type DecodedBars = [Option<DecodedBar>; 6];
