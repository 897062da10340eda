//! Names of machines.

/// Longest name, in bytes; a host name may be as long.
pub const MAX_NAME_LEN: usize = 63;

/// Why a text can't name a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("the machine's name is empty: leave it out to get one made from the first disk")]
    Empty,
    /// More than [`MAX_NAME_LEN`] bytes.
    #[error("the machine's name has {0} bytes: use at most {MAX_NAME_LEN}")]
    Long(usize),
    /// A character isn't allowed at its place.
    #[error(
        "`{0}` can't name a machine: use letters, digits, `-`, `_` and `.`, and begin with a \
         letter or digit"
    )]
    Characters(String),
}

/// Checks a machine's name. As it becomes the name of a folder, nothing in it may lead elsewhere.
///
/// # Errors
///
/// Says which rule the name breaks.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let Some(first) = name.bytes().next() else {
        return Err(NameError::Empty);
    };
    if name.len() > MAX_NAME_LEN {
        return Err(NameError::Long(name.len()));
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !first.is_ascii_alphanumeric() || !name.bytes().all(allowed) {
        return Err(NameError::Characters(name.escape_debug().to_string()));
    }
    Ok(())
}

/// Makes a valid name from any text, such as the stem of a file's name.
#[must_use]
pub fn name_from(text: &str) -> String {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    let name: String = text
        .chars()
        .map(|letter| if allowed(letter) { letter } else { '-' })
        .skip_while(|letter| !letter.is_ascii_alphanumeric())
        .take(MAX_NAME_LEN)
        .collect();
    if name.is_empty() {
        "vm".to_owned()
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn path_tricks_are_refused() {
        for name in [
            ".", "..", "a/b", "/", "-a", ".a", "a b", "a\0", "é", "a\n", "a:b",
        ] {
            assert!(
                matches!(check_name(name), Err(NameError::Characters(_))),
                "{name:?}"
            );
        }
        assert_eq!(check_name(""), Err(NameError::Empty));
        assert_eq!(check_name(&"a".repeat(64)), Err(NameError::Long(64)));
    }

    #[test]
    fn usual_names_are_taken() {
        for name in [
            "a",
            "0",
            "debian-12",
            "a.b_c",
            "win2k3..old",
            &"a".repeat(63),
        ] {
            assert_eq!(check_name(name), Ok(()));
            assert_eq!(name_from(name), name);
        }
    }

    #[test]
    fn made_names_keep_what_they_can() {
        assert_eq!(name_from("..my disk (1)"), "my-disk--1-");
        assert_eq!(name_from("\u{1f4be}"), "vm");
    }

    proptest! {
        #[test]
        fn made_names_are_valid(text: String) {
            prop_assert_eq!(check_name(&name_from(&text)), Ok(()));
        }
    }
}
