//! What the VMM tells by the command line: `ecam=ADDR window=ADDR disks=SLOT,SLOT port=PORT`.

use alloc::vec::Vec;

/// The machine as far as memory map and tables don't tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Where PCI configuration space is in memory.
    pub ecam: u64,
    /// Where the BARs go, from here up.
    pub window: u64,
    /// PCI slots of the disks to boot from, in this order.
    pub disks: Vec<u8>,
    /// The control port.
    pub port: u16,
}

impl Parameters {
    /// Reads a command line. Words of other names are for others.
    ///
    /// `None` when something is missing or no number.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let value = |name| {
            let mut words = line.split_ascii_whitespace();
            words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let number = |name| parse_number(value(name)?);
        let disks = value("disks")?.split(',').filter(|slot| !slot.is_empty());
        Some(Self {
            ecam: number("ecam")?,
            window: number("window")?,
            disks: disks
                .map(|slot| slot.parse().ok().filter(|slot| *slot < 32))
                .collect::<Option<_>>()?,
            port: u16::try_from(number("port")?).ok()?,
        })
    }
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_read() {
        let line = "ecam=0xb0000000 other window=0xc0000000 disks=1,3 port=1504";
        let expected = Parameters {
            ecam: 0xb000_0000,
            window: 0xc000_0000,
            disks: vec![1, 3],
            port: 1504,
        };
        assert_eq!(Parameters::parse(line), Some(expected));
        let none = Parameters::parse("ecam=1 window=2 disks= port=3");
        assert_eq!(none.map(|parameters| parameters.disks), Some(Vec::new()));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "",
            "ecam=1 window=2 port=3",
            "ecam=x window=2 disks=1 port=3",
            "ecam=1 window=2 disks=32 port=3",
            "ecam=1 window=2 disks=1 port=65536",
        ] {
            assert_eq!(Parameters::parse(line), None, "{line}");
        }
    }
}
