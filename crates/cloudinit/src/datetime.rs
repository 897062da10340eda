//! Dates in the two forms of ISO 9660: ECMA-119 8.4.26.1 (17 bytes) and 9.1.5 (7 bytes), in UTC.

/// The last second whose year fits the 7-byte form, which counts from 1900 in one byte.
const LATEST: u64 = 5_869_583_999;

/// A civil date and time in UTC, from 1970 to 2155.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DateTime {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    /// The date of `seconds` after the Unix epoch; later ones than the format knows become its last.
    pub(crate) fn from_unix(seconds: u64) -> Self {
        let seconds = seconds.min(LATEST);
        let mut days = seconds / 86_400;
        let mut year = 1970_u16;
        while days >= days_in_year(year) {
            days -= days_in_year(year);
            year += 1;
        }
        let mut month = 1;
        while days >= days_in_month(year, month) {
            days -= days_in_month(year, month);
            month += 1;
        }
        let small = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
        Self {
            year,
            month,
            day: small(days + 1),
            hour: small(seconds / 3600 % 24),
            minute: small(seconds / 60 % 60),
            second: small(seconds % 60),
        }
    }

    /// The form of directory records.
    pub(crate) fn short(self) -> [u8; 7] {
        let year = u8::try_from(self.year - 1900).unwrap_or(u8::MAX);
        [
            year,
            self.month,
            self.day,
            self.hour,
            self.minute,
            self.second,
            0,
        ]
    }

    /// The form of volume descriptors: digits, then the offset from UTC.
    pub(crate) fn long(self) -> [u8; 17] {
        let text = format!(
            "{:04}{:02}{:02}{:02}{:02}{:02}00",
            self.year, self.month, self.day, self.hour, self.minute, self.second
        );
        let mut field = [0; 17];
        for (to, from) in field.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        field
    }

    /// The long form of "not given".
    pub(crate) fn unset() -> [u8; 17] {
        let mut field = [b'0'; 17];
        field[16] = 0;
        field
    }
}

fn is_leap(year: u16) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

fn days_in_year(year: u16) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u16, month: u8) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(seconds: u64) -> String {
        String::from_utf8_lossy(&DateTime::from_unix(seconds).long()[..16]).into_owned()
    }

    #[test]
    fn known_dates() {
        assert_eq!(long(0), "1970010100000000");
        assert_eq!(long(951_782_399), "2000022823595900");
        assert_eq!(long(951_782_400), "2000022900000000");
        assert_eq!(long(1_767_225_599), "2025123123595900");
        assert_eq!(
            DateTime::from_unix(1_700_000_000).short(),
            [123, 11, 14, 22, 13, 20, 0]
        );
    }

    #[test]
    fn dates_past_the_format_are_its_last() {
        assert_eq!(long(u64::MAX), "2155123123595900");
        assert_eq!(DateTime::from_unix(LATEST).short()[0], u8::MAX);
        assert_eq!(LATEST % 86_400, 86_399);
    }
}
