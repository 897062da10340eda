//! Quantities, as Kubernetes writes them: a decimal number with a suffix.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Suffixes, and how many thousandths of one they are.
const SUFFIXES: [(&str, u128); 14] = [
    ("Ki", 1000 << 10),
    ("Mi", 1000 << 20),
    ("Gi", 1000 << 30),
    ("Ti", 1000 << 40),
    ("Pi", 1000 << 50),
    ("Ei", 1000 << 60),
    ("m", 1),
    ("k", 1_000_000),
    ("M", 1_000_000_000),
    ("G", 1_000_000_000_000),
    ("T", 1_000_000_000_000_000),
    ("P", 1_000_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000_000),
    ("", 1000),
];
/// Longest text of a number.
const MAX_DIGITS: usize = 24;

/// How many bytes, or other units, rounded up. `None` when it is no quantity, or too much.
#[must_use]
pub fn units(quantity: &Quantity) -> Option<u64> {
    u64::try_from(thousandths(&quantity.0)?.div_ceil(1000)).ok()
}

/// How many thousandths of a unit, rounded up.
#[must_use]
pub fn thousandths(text: &str) -> Option<u128> {
    let text = text.trim();
    if let Some((number, exponent)) = text.split_once(['e', 'E']).filter(|(_, e)| is_number(e)) {
        let exponent: u32 = exponent.parse().ok().filter(|exponent| *exponent <= 18)?;
        return scaled(
            number,
            1000_u128.checked_mul(10_u128.checked_pow(exponent)?)?,
        );
    }
    let (suffix, scale) = SUFFIXES.iter().find(|(suffix, _)| text.ends_with(suffix))?;
    scaled(text.strip_suffix(suffix)?, *scale)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// `number` times `scale`, rounded up.
fn scaled(number: &str, scale: u128) -> Option<u128> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = [whole, part].concat();
    if !is_number(&digits) || digits.len() > MAX_DIGITS {
        return None;
    }
    let divisor = 10_u128.checked_pow(u32::try_from(part.len()).ok()?)?;
    let product = digits.parse::<u128>().ok()?.checked_mul(scale)?;
    Some(product.div_ceil(divisor))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn suffixes_scale_and_fractions_round_up() {
        let units = |text: &str| units(&Quantity(text.to_owned()));
        assert_eq!(units("128Mi"), Some(128 << 20));
        assert_eq!(units("1.5Gi"), Some(3 << 29));
        assert_eq!(units("1024M"), Some(1_024_000_000));
        assert_eq!(units("100m"), Some(1));
        assert_eq!(units("2"), Some(2));
        assert_eq!(units("1e3"), Some(1000));
        assert_eq!(units("12E6"), Some(12_000_000));
        assert_eq!(units("1E"), Some(1_000_000_000_000_000_000));
        assert_eq!(thousandths("250m"), Some(250));
    }

    #[test]
    fn what_is_no_quantity_is_none() {
        for text in [
            "", "-1", "Mi", "1 Gi", "1.2.3", "0x10", "1e99", "99999Ei", "٣",
        ] {
            assert_eq!(units(&Quantity(text.to_owned())), None, "{text}");
        }
    }
}
