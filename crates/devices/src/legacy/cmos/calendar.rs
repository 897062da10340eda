//! The Gregorian calendar as far as a clock chip needs it.

/// Seconds of a day.
pub const DAY: i64 = 86_400;

/// A date and time of day, UTC. Kept within what the chip can show: years 0 to 9999.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DateTime {
    /// Year, 0 to 9999.
    pub year: u16,
    /// Month, 1 to 12.
    pub month: u8,
    /// Day of the month, from 1.
    pub day: u8,
    /// Hour, 0 to 23.
    pub hour: u8,
    /// Minute.
    pub minute: u8,
    /// Second.
    pub second: u8,
}

impl DateTime {
    /// The date and time `seconds` after the start of 1970, held within years 0 to 9999.
    pub fn from_unix(seconds: i64) -> Self {
        let first = days_before(0, 1, 1) * DAY;
        let last = days_before(10_000, 1, 1) * DAY - 1;
        let seconds = seconds.clamp(first, last);
        let days = seconds.div_euclid(DAY);
        let of_day = seconds.rem_euclid(DAY);
        // An estimate that is at most one year early, since a year has at most 366 days.
        let mut year = (days - days_before(0, 1, 1)) * 400 / 146_097;
        while days_before(year + 1, 1, 1) <= days {
            year += 1;
        }
        while days_before(year, 1, 1) > days {
            year -= 1;
        }
        let mut month = 1;
        while month < 12 && days_before(year, month + 1, 1) <= days {
            month += 1;
        }
        Self {
            year: narrow(year),
            month: narrow(month),
            day: narrow(days - days_before(year, month, 1) + 1),
            hour: narrow(of_day / 3600),
            minute: narrow(of_day / 60 % 60),
            second: narrow(of_day % 60),
        }
    }

    /// Seconds after the start of 1970. Fields out of range count as the nearest in range.
    pub fn to_unix(self) -> i64 {
        let year = i64::from(self.year.min(9999));
        let month = i64::from(self.month.clamp(1, 12));
        let (next_year, next_month) = if month == 12 {
            (year + 1, 1)
        } else {
            (year, month + 1)
        };
        let month_start = days_before(year, month, 1);
        let month_len = days_before(next_year, next_month, 1) - month_start;
        let day = i64::from(self.day).clamp(1, month_len);
        let of_day = i64::from(self.hour.min(23)) * 3600
            + i64::from(self.minute.min(59)) * 60
            + i64::from(self.second.min(59));
        (month_start + day - 1) * DAY + of_day
    }

    /// Day of the week: 1 is Sunday.
    pub fn weekday(self) -> u8 {
        // 1970 started on a Thursday.
        narrow((self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) + 1)
    }
}

/// Days from the start of 1970 to a date. Counts years from March, so that the leap day is last.
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // Five months from March or August have 153 days.
    let of_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + leap_days + of_year - 719_468
}

/// Values are in range by construction; a type's default stands for "can't happen".
fn narrow<T: TryFrom<i64> + Default>(value: i64) -> T {
    T::try_from(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_dates() {
        for (unix, text, weekday) in [
            (0, (1970, 1, 1, 0, 0, 0), 5),
            (951_827_696, (2000, 2, 29, 12, 34, 56), 3),
            (1_709_251_199, (2024, 2, 29, 23, 59, 59), 5),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0), 2),
            (-1, (1969, 12, 31, 23, 59, 59), 4),
            (i64::MAX, (9999, 12, 31, 23, 59, 59), 6),
            (i64::MIN, (0, 1, 1, 0, 0, 0), 7),
        ] {
            let t = DateTime::from_unix(unix);
            assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second), text);
            assert_eq!(t.weekday(), weekday, "{t:?}");
        }
    }

    #[test]
    fn a_day_too_late_is_the_month_s_last() {
        let mut t = DateTime::from_unix(951_827_696);
        t.day = 31;
        assert_eq!(DateTime::from_unix(t.to_unix()).day, 29);
        t.month = 0;
        assert_eq!(DateTime::from_unix(t.to_unix()).month, 1);
    }

    proptest! {
        #[test]
        fn every_second_survives_the_round_trip(unix in -62_167_219_200_i64..253_402_300_800) {
            prop_assert_eq!(DateTime::from_unix(unix).to_unix(), unix);
        }
    }
}
