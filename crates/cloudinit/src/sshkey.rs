//! Public keys in the form of OpenSSH's authorized_keys (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").

use thiserror::Error;

/// Key types of OpenSSH and the number of strings that such a key consists of, its type counted.
/// Certificates are left out: a guest does not trust them one by one.
const TYPES: [(&str, usize); 7] = [
    ("ssh-ed25519", 2),
    ("ssh-rsa", 3),
    ("ecdsa-sha2-nistp256", 3),
    ("ecdsa-sha2-nistp384", 3),
    ("ecdsa-sha2-nistp521", 3),
    ("sk-ssh-ed25519@openssh.com", 3),
    ("sk-ecdsa-sha2-nistp256@openssh.com", 4),
];

/// Longest line: an RSA key of 16384 bits with options and comment has under 4 KiB.
const MAX_LINE: usize = 8192;

/// Why a text is no list of public keys. The text itself is not repeated: it may be a secret.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SshKeyError {
    /// A private key was given.
    #[error("Line {line} begins a private key: give the public one, as a rule the file with .pub")]
    Private {
        /// Number of the line, from 1.
        line: usize,
    },
    /// A public key in the form of RFC 4716 was given.
    #[error(
        "Line {line} begins a key in the form of RFC 4716: convert it with `ssh-keygen -i -f FILE`"
    )]
    Rfc4716 {
        /// Number of the line, from 1.
        line: usize,
    },
    /// A line does not hold a known type of key.
    #[error("Line {line} has no key of a known type (such as ssh-ed25519 or ssh-rsa)")]
    Type {
        /// Number of the line, from 1.
        line: usize,
    },
    /// The base64 after the type is damaged or of another type.
    #[error("Line {line} has a key that is cut off, wrapped or damaged")]
    Damaged {
        /// Number of the line, from 1.
        line: usize,
    },
    /// A line is too long, or has characters that are no text.
    #[error("Line {line} has control characters or more than {MAX_LINE} bytes")]
    Line {
        /// Number of the line, from 1.
        line: usize,
    },
}

/// The keys of `text`, one to a line; blank lines and lines that begin with `#` are left out.
///
/// A key may have options before it and a comment after it, which are kept.
///
/// # Errors
/// Fails at the first line that is no public key.
pub fn parse_authorized_keys(text: &str) -> Result<Vec<String>, SshKeyError> {
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let key = line.trim();
        if !key.is_empty() && !key.starts_with('#') {
            check_line(key, index + 1)?;
            keys.push(key.to_owned());
        }
    }
    Ok(keys)
}

fn check_line(key: &str, line: usize) -> Result<(), SshKeyError> {
    if key.starts_with("-----BEGIN") || key.starts_with("PuTTY-User-Key-File") {
        return Err(SshKeyError::Private { line });
    }
    if key.starts_with("---- BEGIN") {
        return Err(SshKeyError::Rfc4716 { line });
    }
    if key.len() > MAX_LINE || key.chars().any(breaks_yaml) {
        return Err(SshKeyError::Line { line });
    }
    let (first, rest) = split_field(key);
    let (name, rest) = if strings_of(first).is_some() {
        (first, rest)
    } else {
        split_field(rest)
    };
    let Some(strings) = strings_of(name) else {
        return Err(SshKeyError::Type { line });
    };
    let (blob, _comment) = split_field(rest);
    match decode_base64(blob) {
        Some(blob) if is_key(&blob, name, strings) => Ok(()),
        _ => Err(SshKeyError::Damaged { line }),
    }
}

fn strings_of(name: &str) -> Option<usize> {
    TYPES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, strings)| *strings)
}

/// Characters that YAML refuses or folds inside a quoted string.
fn breaks_yaml(c: char) -> bool {
    (c.is_control() && c != '\t') || matches!(c, '\u{2028}' | '\u{2029}' | '\u{fffe}' | '\u{ffff}')
}

/// Splits at the first white space outside double quotes.
fn split_field(text: &str) -> (&str, &str) {
    let mut quoted = false;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if matches!(c, ' ' | '\t') && !quoted {
            let (field, rest) = text.split_at(at);
            return (field, rest.trim_start());
        }
        if c == '"' && !escaped {
            quoted = !quoted;
        }
        escaped = c == '\\';
    }
    (text, "")
}

/// Whether `blob` is a key from its first byte to its last (RFC 4253 6.6): `count` strings, each
/// behind its length, the first of them `name`.
fn is_key(blob: &[u8], name: &str, count: usize) -> bool {
    let mut rest = blob;
    for index in 0..count {
        let Some((length, tail)) = rest.split_first_chunk::<4>() else {
            return false;
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let Some((string, tail)) = tail.split_at_checked(length) else {
            return false;
        };
        if index == 0 && string != name.as_bytes() {
            return false;
        }
        rest = tail;
    }
    rest.is_empty()
}

/// Decodes base64 with its padding (RFC 4648 4).
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if text.is_empty() || !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ED25519: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB3kC8ZpRxtL7vTnHTSRyXwk8vmTS3R0Sf0HjSM4nP1u a@b";
    const P256: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBD\
        5ZWb0rSNPzvxHfVQyJqJH0k4wKJYvNMjUvHX1MQVGGFLmAVd9gqI2p2bGGn1S3EJ4nTg1u6aG4H8cFJ9mWn4g=";

    #[test]
    fn keys_comments_options_and_blank_lines() {
        let options = format!("from=\"10.0.0.0/8, fd00::/8\",command=\"echo \\\"a b\\\"\" {P256}");
        let text = format!("# mine\n\n  {ED25519}  \r\n{options}\n#{ED25519}\n");
        assert_eq!(
            parse_authorized_keys(&text).unwrap(),
            [ED25519.to_owned(), options]
        );
        assert_eq!(parse_authorized_keys("").unwrap(), [""; 0]);
    }

    #[test]
    fn private_and_foreign_keys() {
        let private = "\n-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn\n";
        assert_eq!(
            parse_authorized_keys(private),
            Err(SshKeyError::Private { line: 2 })
        );
        let putty = "PuTTY-User-Key-File-3: ssh-ed25519\n";
        assert_eq!(
            parse_authorized_keys(putty),
            Err(SshKeyError::Private { line: 1 })
        );
        let windows = "---- BEGIN SSH2 PUBLIC KEY ----\n";
        assert_eq!(
            parse_authorized_keys(windows),
            Err(SshKeyError::Rfc4716 { line: 1 })
        );
        for text in ["hello", "ssh-dss AAAA", "a b c", "ed25519 AAAA"] {
            assert_eq!(
                parse_authorized_keys(text),
                Err(SshKeyError::Type { line: 1 }),
                "{text}"
            );
        }
    }

    #[test]
    fn damaged_keys() {
        let (name, blob) = ED25519.rsplit_once(' ').unwrap().0.split_once(' ').unwrap();
        let cuts = (0..blob.len()).map(|length| format!("{name} {}", &blob[..length]));
        let others = [
            format!("{name} {}", blob.replace('B', "!")),
            format!("{name} {blob}{blob}"),
            format!("{name} {blob}===="),
            format!("ssh-rsa {blob}"),
        ];
        for text in cuts.chain(others) {
            assert_eq!(
                parse_authorized_keys(&text),
                Err(SshKeyError::Damaged { line: 1 })
            );
        }
        let long = format!("{ED25519} {}", "x".repeat(MAX_LINE));
        for text in [
            long,
            format!("{ED25519}\u{7f}"),
            format!("{ED25519}\u{2028}b"),
        ] {
            assert_eq!(
                parse_authorized_keys(&text),
                Err(SshKeyError::Line { line: 1 })
            );
        }
    }
}
