//! Answers: the value asked for, or the agent's refusal.

use serde::{Deserialize, de::DeserializeOwned};

/// Most letters of a text that are worth showing.
const SHOWN: usize = 400;

/// Why there is no value.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The agent does not do it.
    #[error("The guest agent refused: {description}")]
    Refused {
        /// The agent does not know the command, or it is switched off.
        unknown: bool,
        /// What it said, made harmless.
        description: String,
    },
    /// It is no answer to the request.
    #[error("The guest agent's answer makes no sense")]
    Malformed(#[source] serde_json::Error),
}

#[derive(Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
struct Envelope<T> {
    error: Option<Refusal>,
    #[serde(rename = "return")]
    value: Option<T>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// Reads the answer in a line.
///
/// # Errors
/// When it is a refusal or no answer.
pub fn answer<T: DeserializeOwned>(line: &[u8]) -> Result<T, AnswerError> {
    let envelope: Envelope<T> = serde_json::from_slice(line).map_err(AnswerError::Malformed)?;
    if let Some(refusal) = envelope.error {
        return Err(AnswerError::Refused {
            unknown: refusal.class == "CommandNotFound",
            description: harmless(&refusal.desc),
        });
    }
    let missing = || serde::de::Error::missing_field("return");
    envelope
        .value
        .ok_or_else(|| AnswerError::Malformed(missing()))
}

/// A text of the guest as one line for a terminal: without what could control it, and not endless.
#[must_use]
pub fn harmless(text: &str) -> String {
    let mut letters = text.chars();
    let shown: String = letters
        .by_ref()
        .take(SHOWN)
        .map(|letter| {
            if letter.is_control() || is_bidi(letter) {
                '?'
            } else {
                letter
            }
        })
        .collect();
    let rest = if letters.next().is_some() { "..." } else { "" };
    shown + rest
}

/// Whether a letter turns the writing direction around.
const fn is_bidi(letter: char) -> bool {
    matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::commands::Empty;

    #[test]
    fn values_and_refusals_are_told_apart() {
        assert_eq!(answer::<i64>(br#"{"return": 7, "id": 1}"#).unwrap(), 7);
        answer::<Empty>(br#"{"return": {}}"#).unwrap();
        let refused = answer::<Empty>(
            br#"{"error": {"class": "CommandNotFound", "desc": "no\u001b[31m such\nthing"}}"#,
        );
        let Err(AnswerError::Refused {
            unknown,
            description,
        }) = refused
        else {
            panic!("{refused:?}")
        };
        assert_eq!(
            (unknown, description.as_str()),
            (true, "no?[31m such?thing")
        );
        for nonsense in [
            &b""[..],
            b"[]",
            b"{}",
            b"\xfe",
            br#"{"return": []}"#,
            b"{\"return\": 1",
        ] {
            let error = answer::<i64>(nonsense).unwrap_err();
            assert!(matches!(error, AnswerError::Malformed(_)), "{error:?}");
        }
        let deep = format!("{{\"return\": {}", "[".repeat(100_000));
        answer::<Vec<Empty>>(deep.as_bytes()).unwrap_err();
    }

    #[test]
    fn texts_are_short_and_plain() {
        let text = harmless(&"a\u{202e}\u{9b}".repeat(1000));
        assert_eq!(text.chars().count(), SHOWN + 3);
        assert!(text.starts_with("a??a") && text.ends_with("..."));
        assert_eq!(harmless("M\u{fc}ller"), "M\u{fc}ller");
    }
}
