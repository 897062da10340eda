//! The chip's 128 cells: clock registers in the guest's notation, and memory.

use super::CmosMachine;
use super::calendar::DateTime;

const SECOND: u8 = 0x00;
pub(super) const ALARM_SECOND: u8 = 0x01;
const MINUTE: u8 = 0x02;
pub(super) const ALARM_MINUTE: u8 = 0x03;
const HOUR: u8 = 0x04;
pub(super) const ALARM_HOUR: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
pub(super) const REGISTER_A: u8 = 0x0a;
pub(super) const REGISTER_B: u8 = 0x0b;
pub(super) const REGISTER_C: u8 = 0x0c;
pub(super) const REGISTER_D: u8 = 0x0d;
/// Century; where firmware and the FADT put it.
pub(super) const CENTURY: u8 = 0x32;

pub(super) const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// 32.768 kHz time base, 1024 Hz periodic rate: the data sheet's and every PC's default.
const DEFAULT_A: u8 = 0x26;

pub(super) const MODE_SET: u8 = 1 << 7;
pub(super) const MODE_UPDATE_IRQ: u8 = FLAG_UPDATE;
const MODE_BINARY: u8 = 1 << 2;
const MODE_24_HOURS: u8 = 1 << 1;

pub(super) const FLAG_IRQ: u8 = 1 << 7;
/// Flags and the enable bits of register B sit at the same bits.
pub(super) const FLAG_PERIODIC: u8 = 1 << 6;
pub(super) const FLAG_ALARM: u8 = 1 << 5;
pub(super) const FLAG_UPDATE: u8 = 1 << 4;
const FLAGS_ENABLED: u8 = FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE;

pub(super) const VALID_RAM_AND_TIME: u8 = 1 << 7;

const PM: u8 = 1 << 7;
/// An alarm register of this or above matches anything.
const ALARM_ANY: u8 = 0xc0;

const COUNT: usize = 128;
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Whether cell `index` shows the time.
pub(super) fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECOND | MINUTE | HOUR | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

/// The cells. An index has seven bits.
#[derive(Debug, Clone)]
pub(super) struct Cells([u8; COUNT]);

impl Cells {
    /// The cells as firmware expects them in `machine`.
    pub(super) fn new(machine: CmosMachine) -> Self {
        let mut cells = Self([0; COUNT]);
        cells.set(REGISTER_A, DEFAULT_A);
        cells.set(REGISTER_B, MODE_24_HOURS);
        // Equipment: a numeric coprocessor; no floppy drives, displays by their own firmware.
        cells.set(0x14, 0x02);
        // Memory: 640 KiB, above 1 MiB in KiB, above 16 MiB and above 4 GiB in 64 KiB.
        cells.set_word(0x15, 640);
        let extended = saturate(machine.low_ram.saturating_sub(MIB) / KIB);
        cells.set_word(0x17, extended);
        cells.set_word(0x30, extended);
        cells.set_word(
            0x34,
            saturate(machine.low_ram.saturating_sub(16 * MIB) / (64 * KIB)),
        );
        let high = (machine.high_ram / (64 * KIB)).min(0xff_ffff).to_le_bytes();
        for (index, byte) in (0x5b..=0x5d).zip(high) {
            cells.set(index, byte);
        }
        // Boot from disk, then CD, then network; no floppy signature check.
        cells.set(0x3d, 0x32);
        cells.set(0x38, 0x41);
        cells.set(0x5f, machine.cpus.saturating_sub(1));
        cells
    }

    /// The cells of a saved state, if there are as many.
    pub(super) fn restore(saved: &[u8]) -> Option<Self> {
        saved.try_into().ok().map(Self)
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    pub(super) fn get(&self, index: u8) -> u8 {
        self.0[usize::from(index) % COUNT]
    }

    pub(super) fn set(&mut self, index: u8, byte: u8) {
        self.0[usize::from(index) % COUNT] = byte;
    }

    fn set_word(&mut self, index: u8, word: u16) {
        let [low, high] = word.to_le_bytes();
        self.set(index, low);
        self.set(index + 1, high);
    }

    /// What the reset pin does: no interrupts enabled, no flags.
    pub(super) fn reset(&mut self) {
        self.set(REGISTER_B, self.get(REGISTER_B) & !FLAGS_ENABLED);
        self.set(REGISTER_C, 0);
    }

    pub(super) fn has_mode(&self, bit: u8) -> bool {
        self.get(REGISTER_B) & bit != 0
    }

    pub(super) fn has_flag(&self, bit: u8) -> bool {
        self.get(REGISTER_C) & bit != 0
    }

    pub(super) fn add_flags(&mut self, flags: u8) {
        self.set(REGISTER_C, self.get(REGISTER_C) | flags);
    }

    pub(super) fn take_flags(&mut self) -> u8 {
        let flags = self.get(REGISTER_C);
        self.set(REGISTER_C, 0);
        flags
    }

    pub(super) fn enabled_interrupts(&self) -> u8 {
        self.get(REGISTER_B) & FLAGS_ENABLED
    }

    pub(super) fn pending_enabled(&self) -> bool {
        self.get(REGISTER_C) & self.enabled_interrupts() != 0
    }

    /// Period of the periodic interrupt; `None` when it is off.
    pub(super) fn period_nanos(&self) -> Option<u128> {
        // Rates 1 and 2 mean what 8 and 9 mean; the others halve 32.768 kHz that often less one.
        let shift = match self.get(REGISTER_A) & 0x0f {
            0 => return None,
            rate @ 1..=2 => rate + 6,
            rate => rate - 1,
        };
        Some((1_000_000_000 << shift) / 32_768)
    }

    /// Puts `time` in the registers, in the guest's notation.
    pub(super) fn show(&mut self, time: DateTime) {
        let hour = if self.has_mode(MODE_24_HOURS) {
            self.encode(time.hour)
        } else {
            let twelfth = self.encode((time.hour + 11) % 12 + 1);
            twelfth | if time.hour >= 12 { PM } else { 0 }
        };
        self.set(HOUR, hour);
        let [century, year] = [time.year / 100, time.year % 100];
        for (index, value) in [
            (SECOND, time.second),
            (MINUTE, time.minute),
            (WEEKDAY, time.weekday()),
            (DAY, time.day),
            (MONTH, time.month),
            (YEAR, u8::try_from(year).unwrap_or(0)),
            (CENTURY, u8::try_from(century).unwrap_or(0)),
        ] {
            self.set(index, self.encode(value));
        }
    }

    /// The time in the registers, read in the guest's notation.
    pub(super) fn time(&self) -> DateTime {
        let field = |index| self.decode(self.get(index));
        DateTime {
            year: u16::from(field(CENTURY)) * 100 + u16::from(field(YEAR)),
            month: field(MONTH),
            day: field(DAY),
            hour: self.decode_hour(self.get(HOUR)),
            minute: field(MINUTE),
            second: field(SECOND),
        }
    }

    /// The first second after `after` (both since 1970) that the alarm registers match.
    pub(super) fn next_alarm(&self, after: i64) -> Option<i64> {
        let matches = |index: u8, value: i64| {
            let wanted = self.get(index);
            let decoded = match index {
                ALARM_HOUR => self.decode_hour(wanted),
                _ => self.decode(wanted),
            };
            wanted >= ALARM_ANY || i64::from(decoded) == value
        };
        let mut at = after.checked_add(1)?;
        // Hours, then minutes, then seconds fall in place; an impossible alarm ends the search.
        for _ in 0..2 * (24 + 60 + 60) {
            let next = if !matches(ALARM_HOUR, at.rem_euclid(86_400) / 3600) {
                at.div_euclid(3600).checked_add(1)?.checked_mul(3600)?
            } else if !matches(ALARM_MINUTE, at.rem_euclid(3600) / 60) {
                at.div_euclid(60).checked_add(1)?.checked_mul(60)?
            } else if !matches(ALARM_SECOND, at.rem_euclid(60)) {
                at.checked_add(1)?
            } else {
                return Some(at);
            };
            at = next;
        }
        None
    }

    fn encode(&self, value: u8) -> u8 {
        if self.has_mode(MODE_BINARY) {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.has_mode(MODE_BINARY) {
            byte
        } else {
            (byte >> 4) * 10 + (byte & 0x0f)
        }
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.has_mode(MODE_24_HOURS) {
            return self.decode(byte);
        }
        let twelfth = self.decode(byte & !PM) % 12;
        twelfth + if byte & PM != 0 { 12 } else { 0 }
    }
}

fn saturate(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}
