//! What drives tell of themselves: IDENTIFY DEVICE and IDENTIFY PACKET DEVICE (ATA8-ACS, 7.16 and
//! 7.17).

use edgevmm_block::{BlockBackend, SECTOR_SIZE};

use super::ata::{AtaState, MULTIPLE_MAX, TRIM_BLOCKS};
use super::drive::SCRATCH_LEN;

/// The page's last byte makes the sum of all zero; the one before says so.
const SEALED: u8 = 0xa5;
/// Largest number of sectors that commands of 28 bits reach.
const SHORT_SECTORS: u64 = 0x0fff_ffff;
/// Largest number of cylinders that a disk may tell.
const CYLINDERS_MAX: u64 = 16383;

/// A page of 256 words.
#[derive(Debug)]
pub struct Page([u16; SCRATCH_LEN / 2]);

impl Page {
    fn set(&mut self, word: usize, value: u16) {
        if let Some(slot) = self.0.get_mut(word) {
            *slot = value;
        }
    }

    /// Puts a number into as many words as are needed for its type, the low one first.
    fn set_wide(&mut self, word: usize, value: u64, words: usize) {
        for (index, slot) in self.0.iter_mut().skip(word).take(words).enumerate() {
            *slot = (value >> (16 * index) & 0xffff) as u16;
        }
    }

    /// Puts a text into words, two letters each, the first in the high byte, padded with spaces.
    fn set_text(&mut self, word: usize, words: usize, text: &str) {
        let printable = |letter: u8| letter == b' ' || letter.is_ascii_graphic();
        let mut letters = text
            .bytes()
            .map(|letter| if printable(letter) { letter } else { b'_' });
        for slot in self.0.iter_mut().skip(word).take(words) {
            let mut next = || letters.next().unwrap_or(b' ');
            *slot = u16::from_be_bytes([next(), next()]);
        }
    }

    /// The page as bytes, with its checksum.
    pub fn write_to(&self, bytes: &mut [u8; SCRATCH_LEN]) {
        for (pair, word) in bytes.chunks_exact_mut(2).zip(&self.0) {
            pair.copy_from_slice(&word.to_le_bytes());
        }
        bytes[SCRATCH_LEN - 2] = SEALED;
        seal(bytes, SEALED);
    }
}

/// Makes the sum of all bytes zero. `before` is the byte before the last, which may be part of it.
pub fn seal(bytes: &mut [u8; SCRATCH_LEN], before: u8) {
    bytes[SCRATCH_LEN - 2] = before;
    bytes[SCRATCH_LEN - 1] = 0;
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[SCRATCH_LEN - 1] = sum.wrapping_neg();
}

/// What all drives have in common.
fn common(serial: &str, model: &str) -> Page {
    let mut page = Page([0; SCRATCH_LEN / 2]);
    page.set_text(10, 10, serial);
    page.set_text(23, 4, env!("CARGO_PKG_VERSION"));
    page.set_text(27, 20, model);
    // Words 64 to 70 and 88 are valid.
    page.set(53, 0x0006);
    // Multiword DMA up to mode 2, PIO up to mode 4 at 120 ns a cycle.
    page.set(63, 0x0007);
    page.set(64, 0x0003);
    for word in 65..=68 {
        page.set(word, 120);
    }
    // 1.5 and 3 Gb/s.
    page.set(76, 0x0006);
    // ATA-4 up to ATA8.
    page.set(80, 0x01f0);
    // Ultra DMA up to mode 6, which is selected.
    page.set(88, 0x407f);
    page
}

/// Bytes of a sector: what partition tables and file systems of the disk were made for.
pub fn sector_len(backend: &dyn BlockBackend) -> u64 {
    u64::from(backend.limits().logical_block).max(SECTOR_SIZE)
}

/// Of a disk.
pub fn disk(backend: &dyn BlockBackend, serial: &str, state: &AtaState) -> Page {
    let mut page = common(serial, "edgevmm disk");
    let (sector_len, limits) = (sector_len(backend), backend.limits());
    let sectors = backend.size() / sector_len;
    let cylinders = (sectors / (16 * 63)).min(CYLINDERS_MAX);
    page.set(0, 0x0040);
    // The geometry, as made and as it is now.
    for (cylinder, head, sector) in [(1, 3, 6), (54, 55, 56)] {
        page.set_wide(cylinder, cylinders, 1);
        page.set(head, 16);
        page.set(sector, 63);
    }
    page.set_wide(57, cylinders * 16 * 63, 2);
    page.set(47, 0x8000 | u16::from(MULTIPLE_MAX));
    // DMA, sector addresses, IORDY, standby timer.
    page.set(49, 0x2f00);
    page.set(50, 0x4000);
    page.set(53, 0x0007);
    if state.multiple > 0 {
        page.set(59, 0x0100 | u16::from(state.multiple));
    }
    page.set_wide(60, sectors.min(SHORT_SECTORS), 2);
    // 32 commands in the queue.
    page.set(75, 31);
    page.set(76, 0x0106);
    // Write cache and look-ahead; 48 bits, both flushes; FUA, logs.
    let enabled = u16::from(state.write_cache) << 5 | u16::from(state.look_ahead) << 6;
    page.set(82, 0x0060);
    page.set(83, 0x7400);
    page.set(84, 0x4060);
    page.set(85, enabled);
    // Words 119 and 120 are valid.
    page.set(86, 0xb400);
    page.set(87, 0x4060);
    page.set_wide(100, sectors, 4);
    // Several sectors are a physical one; sectors are longer than usual, as so many words.
    let ratio = (u64::from(limits.physical_block) / sector_len).max(1);
    let several = u16::try_from(ratio.ilog2().min(15)).unwrap_or(0);
    let long = sector_len > SECTOR_SIZE;
    if several > 0 || long {
        let kind = u16::from(several > 0) << 13 | u16::from(long) << 12;
        page.set(106, 0x4000 | kind | several);
    }
    if long {
        page.set_wide(117, sector_len / 2, 2);
    }
    // READ LOG DMA EXT.
    page.set(119, 0x4008);
    page.set(120, 0x4008);
    if limits.discard_granularity > 0 && !backend.read_only() {
        page.set(105, TRIM_BLOCKS);
        page.set(169, 1);
    }
    // Not a rotating disk.
    page.set(217, 1);
    page
}

/// Of a CD-ROM drive.
pub fn cdrom(serial: &str) -> Page {
    let mut page = common(serial, "edgevmm CD-ROM");
    // ATAPI, CD-ROM, removable, packets of 12 bytes.
    page.set(0, 0x85c0);
    // DMA, sector addresses, IORDY.
    page.set(49, 0x0f00);
    // DEVICE RESET and PACKET.
    for word in [82, 85] {
        page.set(word, 0x0210);
    }
    for word in [83, 84, 87] {
        page.set(word, 0x4000);
    }
    page
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn texts_are_padded_and_swapped_and_pages_sum_to_zero() {
        let mut bytes = [0; SCRATCH_LEN];
        cdrom("ab\u{e9}c").write_to(&mut bytes);
        assert_eq!(&bytes[20..28], b"ba__ c  ");
        assert_eq!(bytes[510], SEALED);
        assert_eq!(
            bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
    }
}
