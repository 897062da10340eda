//! What cloud-init is told inline.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// The text that is `encoded` in base 64, which may be on several lines.
#[must_use]
pub fn decode(encoded: &str) -> Option<String> {
    let plain: String = encoded.split_ascii_whitespace().collect();
    String::from_utf8(BASE64_STANDARD.decode(plain).ok()?).ok()
}
