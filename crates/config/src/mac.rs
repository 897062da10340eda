//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// Why a text isn't the address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MacAddrError {
    /// Not six pairs of hexadecimal digits.
    #[error("`{0}` is not a MAC address: write six hexadecimal pairs, like 52:54:00:12:34:56")]
    Syntax(String),
    /// A group address, which no interface may have.
    #[error("`{0}` is a multicast address: make its first byte even, like 52:54:00:12:34:56")]
    Multicast(String),
    /// The null address.
    #[error("`{0}` is the null address: choose another, like 52:54:00:12:34:56")]
    Null(String),
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || MacAddrError::Syntax(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(syntax)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
        }
        if parts.next().is_some() {
            return Err(syntax());
        }
        if bytes[0] & 1 != 0 {
            return Err(MacAddrError::Multicast(text.to_owned()));
        }
        if bytes == [0; 6] {
            return Err(MacAddrError::Null(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(MacVisitor)
    }
}

/// Takes texts.
struct MacVisitor;

impl de::Visitor<'_> for MacVisitor {
    type Value = MacAddr;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a MAC address like 52:54:00:12:34:56")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<MacAddr, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_separators_are_taken() {
        let mac = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0xab]);
        assert_eq!("52:54:00:12:34:ab".parse(), Ok(mac));
        assert_eq!("52-54-00-12-34-AB".parse(), Ok(mac));
        assert_eq!(
            serde_json::to_string(&mac).unwrap(),
            "\"52:54:00:12:34:ab\""
        );
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "+2:54:00:12:34:56",
        ] {
            assert_eq!(
                text.parse::<MacAddr>(),
                Err(MacAddrError::Syntax(text.into()))
            );
        }
        let group = "01:00:5e:00:00:01";
        assert_eq!(
            group.parse::<MacAddr>(),
            Err(MacAddrError::Multicast(group.into()))
        );
        let null = "00:00:00:00:00:00";
        assert_eq!(
            null.parse::<MacAddr>(),
            Err(MacAddrError::Null(null.into()))
        );
    }

    proptest! {
        #[test]
        fn display_parses_to_the_same(mut bytes: [u8; 6]) {
            bytes[0] = bytes[0] & !1 | 2;
            prop_assert_eq!(MacAddr(bytes).to_string().parse(), Ok(MacAddr(bytes)));
        }

        #[test]
        fn no_text_panics(text in "[0-9a-f:\u{e9}-]*") {
            let _ = text.parse::<MacAddr>();
        }
    }
}
