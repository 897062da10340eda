//! Messages about keys and values that nobody knows.

/// Says that `found` is not one of `known`, and which one was meant or what there is.
pub(crate) fn unknown(what: &str, found: &str, known: &[&str]) -> String {
    let found = shorten(found);
    // One slip of the fingers, or one in each three letters.
    let slips = (found.chars().count() / 3).max(1);
    let best = known
        .iter()
        .map(|word| (strsim::damerau_levenshtein(&found, word), word))
        .min()
        .filter(|(distance, _)| *distance <= slips);
    match best {
        Some((_, word)) => format!("unknown {what} `{found}`: did you mean `{word}`?"),
        None if known.is_empty() => format!("unknown {what} `{found}`: leave it out"),
        None => format!(
            "unknown {what} `{found}`: choose one of {}",
            known.join(", ")
        ),
    }
}

/// Makes a text of a user fit for one line of a message.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut short: String = text
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_get_the_word_and_others_get_the_list() {
        let known = ["count", "cores", "sockets"];
        assert_eq!(
            unknown("key", "cuont", &known),
            "unknown key `cuont`: did you mean `count`?"
        );
        assert_eq!(
            unknown("key", "xyz", &known),
            "unknown key `xyz`: choose one of count, cores, sockets"
        );
        assert_eq!(
            unknown("key", "a\n\u{1b}[2J", &[]),
            "unknown key `a\\n\\u{1b}[2J`: leave it out"
        );
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(shorten(&"é".repeat(1000)).chars().count(), 81);
    }
}
