//! The control port: what the VMM is told. Text first, byte by byte, then what it is about.

use core::arch::asm;

use edgevmm_fast::Reason;

/// Written behind the text of a kernel that is about to start.
const BOOTING: u8 = 0x10;
/// Longer texts the VMM would cut.
const TEXT_MAX: usize = 160;

/// Writes a byte to an I/O port.
pub fn out_byte(port: u16, byte: u8) {
    // SAFETY: Ports are devices'; none of those written here touches the firmware's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) };
}

/// The port.
#[derive(Debug, Clone, Copy)]
pub struct ControlPort(pub u16);

impl ControlPort {
    /// Says that the disk is left to another firmware.
    pub fn decline(self, reason: Reason, text: &str) {
        self.tell(text, reason as u8);
    }

    /// Says that a kernel is about to start.
    pub fn booting(self, name: &str) {
        self.tell(name, BOOTING);
    }

    fn tell(self, text: &str, verb: u8) {
        let bytes = text.as_bytes();
        let bytes = bytes.get(..TEXT_MAX).unwrap_or(bytes);
        // SAFETY: Reads the text only; the port takes any number of bytes.
        unsafe {
            asm!(
                "rep outsb",
                in("dx") self.0,
                inout("rcx") bytes.len() => _,
                inout("rsi") bytes.as_ptr() => _,
                options(readonly, nostack, preserves_flags),
            );
        }
        out_byte(self.0.wrapping_add(1), verb);
    }
}
