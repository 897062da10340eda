//! Numbers of bytes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes, written as `512M`, `4G`, `65536`.
///
/// The suffixes are binary: `1K` is 1024 bytes. `Ki`, `KiB` and so on mean the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text isn't a number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ByteSizeError {
    /// There is no number, or something else than a suffix after it.
    #[error("`{0}` is not a size: write a whole number and K, M, G or T, like 512M")]
    Syntax(String),
    /// The suffix could mean powers of ten.
    #[error("`{0}` is ambiguous: write a binary suffix, like 512M or 512MiB")]
    Decimal(String),
    /// It doesn't fit 64 bits.
    #[error("`{0}` is too large")]
    Overflow(String),
}

/// Suffixes, largest first, with their power of two.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteSize {
    /// `mib` mebibytes.
    #[must_use]
    pub const fn mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || ByteSizeError::Syntax(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(syntax());
        }
        let overflow = || ByteSizeError::Overflow(text.to_owned());
        let number: u64 = number.parse().map_err(|_| overflow())?;
        let mut letters = suffix.chars();
        let shift = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
            None => return Ok(Self(number)),
            Some('B') if letters.as_str().is_empty() => return Ok(Self(number)),
            Some(letter) => {
                UNITS
                    .iter()
                    .find(|unit| unit.0 == letter)
                    .ok_or_else(syntax)?
                    .1
            }
        };
        match letters.as_str() {
            "" | "i" | "iB" => {}
            "B" | "b" => return Err(ByteSizeError::Decimal(text.to_owned())),
            _ => return Err(syntax()),
        }
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(overflow)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS
            .iter()
            .find(|unit| self.0 != 0 && self.0.is_multiple_of(1 << unit.1));
        match unit {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Takes texts and plain numbers.
struct SizeVisitor;

impl de::Visitor<'_> for SizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size like 512M")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(number))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<ByteSize, E> {
        u64::try_from(number)
            .map(ByteSize)
            .map_err(|_| E::custom(ByteSizeError::Syntax(number.to_string())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("7B", 7),
            ("1K", 1024),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("4G", 4 << 30),
            ("4Gi", 4 << 30),
            ("4GiB", 4 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "M", "-1", "1.5G", "1X", "1 G", "1Gi ", "1é", "0x10"] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(ByteSizeError::Syntax(text.into()))
            );
        }
        assert_eq!(
            "1GB".parse::<ByteSize>(),
            Err(ByteSizeError::Decimal("1GB".into()))
        );
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(ByteSizeError::Overflow(text.into()))
            );
        }
    }

    #[test]
    fn json_takes_texts_and_numbers_and_writes_texts() {
        assert_eq!(
            serde_json::from_str::<ByteSize>("\"1G\"").unwrap(),
            ByteSize(1 << 30)
        );
        assert_eq!(
            serde_json::from_str::<ByteSize>("4096").unwrap(),
            ByteSize(4096)
        );
        assert!(serde_json::from_str::<ByteSize>("-4096").is_err());
        assert_eq!(
            serde_json::to_string(&ByteSize::mib(512)).unwrap(),
            "\"512M\""
        );
    }

    proptest! {
        #[test]
        fn display_parses_to_the_same(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
