//! Boot Loader Specification entries (UAPI.1) and the order of their versions (UAPI.10).
//!
//! Left out: device trees, boot counting (the firmware does not rename files) and UEFI variables
//! that say what boots once.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cmp::Ordering;

use crate::decline::{Decline, config};

/// Longer entries are none.
pub const FILE_MAX: usize = 64 << 10;
const INITRDS_MAX: usize = 16;

/// An entry: a file of type 1, or a unified kernel image as one of type 2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without its end and without counted tries.
    pub id: String,
    /// What a menu shows.
    pub title: String,
    /// What entries are sorted by first.
    pub sort_key: String,
    /// The system that it belongs to.
    pub machine_id: String,
    /// Its version.
    pub version: String,
    /// Path of the kernel.
    pub linux: Option<String>,
    /// Paths of the initial RAM disks.
    pub initrds: Vec<String>,
    /// The kernel's command line.
    pub options: String,
    /// Path of an EFI program.
    pub efi: Option<String>,
    /// It has something that is left out.
    pub unsupported: bool,
    /// Tries left, where they are counted.
    pub tries: Option<u32>,
}

impl Entry {
    /// Reads the entry `name` (without `.conf`).
    ///
    /// # Errors
    /// It has more RAM disks than anybody needs.
    pub fn parse(name: &str, text: &str) -> Result<Self, Decline> {
        let (id, tries) = split_tries(name);
        let mut entry = Self {
            id: id.to_string(),
            tries,
            ..Self::default()
        };
        for (key, value) in lines(text) {
            let own = || value.to_string();
            match key {
                "title" => entry.title = own(),
                "version" => entry.version = own(),
                "machine-id" => entry.machine_id = own(),
                "sort-key" => entry.sort_key = own(),
                "linux" => entry.linux = Some(own()),
                "initrd" => entry
                    .initrds
                    .extend(value.split_ascii_whitespace().map(Into::into)),
                "efi" | "uki" => entry.efi = Some(own()),
                "options" if entry.options.is_empty() => entry.options = own(),
                "options" => entry.options = format!("{} {value}", entry.options),
                "architecture" if !value.eq_ignore_ascii_case("x64") => entry.unsupported = true,
                "devicetree" | "devicetree-overlay" | "uki-url" | "profile" => {
                    entry.unsupported = true;
                }
                _ => {}
            }
        }
        if entry.initrds.len() > INITRDS_MAX {
            return Err(config("a boot loader entry has too many RAM disks"));
        }
        Ok(entry)
    }
}

/// Keys and values of the lines of a file.
pub fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| {
        let (key, value) = line.split_once([' ', '\t'])?;
        Some((key, value.trim()))
    })
}

/// A name without `+LEFT-DONE` or `+LEFT`, and how many tries are left.
#[must_use]
pub fn split_tries(name: &str) -> (&str, Option<u32>) {
    if let Some((id, counts)) = name.rsplit_once('+') {
        let (left, done) = counts.split_once('-').unwrap_or((counts, "0"));
        if let (Ok(left), Ok(_)) = (left.parse(), done.parse::<u32>()) {
            return (id, Some(left));
        }
    }
    (name, None)
}

/// The order of a menu: what comes first is the better default.
#[must_use]
pub fn compare(a: &Entry, b: &Entry) -> Ordering {
    let bad = |entry: &Entry| entry.tries == Some(0);
    let keyless = |entry: &Entry| entry.sort_key.is_empty();
    let by_key = || {
        if keyless(a) {
            return Ordering::Equal;
        }
        let keys = a.sort_key.cmp(&b.sort_key);
        let keys = keys.then_with(|| a.machine_id.cmp(&b.machine_id));
        keys.then_with(|| compare_versions(&b.version, &a.version))
    };
    let order = bad(a).cmp(&bad(b));
    let order = order
        .then_with(|| keyless(a).cmp(&keyless(b)))
        .then_with(by_key);
    order.then_with(|| compare_versions(&b.id, &a.id))
}

/// Whether `name` fits a pattern with `*` and `?`. `None` when the pattern has more than that.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> Option<bool> {
    if pattern.contains(['[', '\\']) {
        return None;
    }
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == name.get(n) => {
                p += 1;
                n += 1;
            }
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, n) = (*at + 1, *taken);
                }
                None => return Some(false),
            },
        }
    }
    let rest = pattern.get(p..).unwrap_or_default();
    Some(rest.iter().all(|c| *c == '*'))
}

/// Which of two versions is newer.
#[must_use]
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        (a, b) = (skip_others(a), skip_others(b));
        // A pre-release is older than what it is one of, also than nothing more.
        if starts(a, b'~') || starts(b, b'~') {
            if !(starts(a, b'~') && starts(b, b'~')) {
                return starts(b, b'~').cmp(&starts(a, b'~'));
            }
            (a, b) = (rest(a), rest(b));
            continue;
        }
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        for mark in *b"-^." {
            match (starts(a, mark), starts(b, mark)) {
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                _ => {}
            }
        }
        if is_mark(a) {
            (a, b) = (rest(a), rest(b));
            continue;
        }
        let digits =
            a.first().is_some_and(u8::is_ascii_digit) || b.first().is_some_and(u8::is_ascii_digit);
        let class = if digits {
            u8::is_ascii_digit
        } else {
            u8::is_ascii_alphabetic
        };
        let (x, y);
        (x, a) = split(a, class);
        (y, b) = split(b, class);
        let order = if digits {
            compare_numbers(x, y)
        } else {
            x.cmp(y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn starts(text: &[u8], mark: u8) -> bool {
    text.first() == Some(&mark)
}

fn is_mark(text: &[u8]) -> bool {
    text.first().is_some_and(|byte| b"~-^.".contains(byte))
}

fn rest(text: &[u8]) -> &[u8] {
    text.get(1..).unwrap_or_default()
}

fn skip_others(text: &[u8]) -> &[u8] {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    let start = text.iter().position(known).unwrap_or(text.len());
    text.get(start..).unwrap_or_default()
}

fn split(text: &[u8], class: fn(&u8) -> bool) -> (&[u8], &[u8]) {
    let end = text
        .iter()
        .position(|byte| !class(byte))
        .unwrap_or(text.len());
    text.split_at(end)
}

fn compare_numbers(a: &[u8], b: &[u8]) -> Ordering {
    let significant = |digits: &[u8]| {
        let start = digits.iter().position(|byte| *byte != b'0');
        digits
            .get(start.unwrap_or(digits.len())..)
            .unwrap_or_default()
            .to_vec()
    };
    let (a, b) = (significant(a), significant(b));
    a.len().cmp(&b.len()).then_with(|| a.cmp(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// The examples of the specification, from old to new.
    #[test]
    fn versions_are_ordered_as_specified() {
        for pair in [
            ("122.1", "123~rc1-1"),
            ("123~rc1-1", "123"),
            ("123", "123-a"),
            ("123-a", "123-a.1"),
            ("123-a.1", "123-1"),
            ("123-1", "123-1.1"),
            ("123-1.1", "123^post1"),
            ("123^post1", "123.a-1"),
            ("123.a-1", "123.1-1"),
            ("123.1-1", "123a-1"),
            ("123a-1", "124-1"),
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("5.10", "6.1"),
            ("0", "1"),
        ] {
            assert_eq!(compare_versions(pair.0, pair.1), Ordering::Less, "{pair:?}");
            assert_eq!(
                compare_versions(pair.1, pair.0),
                Ordering::Greater,
                "{pair:?}"
            );
        }
        for pair in [("1.0", "1.0"), ("01", "1"), ("a_b", "a+b"), ("", "")] {
            assert_eq!(
                compare_versions(pair.0, pair.1),
                Ordering::Equal,
                "{pair:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_versions_compare(a in "[ -~]{0,12}", b in "[ -~]{0,12}") {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        }

        #[test]
        fn any_text_is_an_entry_or_none(name in ".{0,20}", text in "(?s).{0,300}") {
            let _ = Entry::parse(&name, &text);
        }
    }

    #[test]
    fn an_entry_has_what_its_lines_say() {
        let text = "# made by a tool\ntitle  Fedora Linux\nversion 6.9.1\nsort-key fedora\n\
            machine-id abc\nlinux /vmlinuz\ninitrd /a\ninitrd /b /c\noptions root=/dev/vda2 ro\n\
            options quiet\ngrub_users $grub_users\n";
        let entry = Entry::parse("fedora+3-1", text).unwrap();
        assert_eq!((entry.id.as_str(), entry.tries), ("fedora", Some(3)));
        assert_eq!(entry.title, "Fedora Linux");
        assert_eq!(entry.linux.as_deref(), Some("/vmlinuz"));
        assert_eq!(entry.initrds, ["/a", "/b", "/c"]);
        assert_eq!(entry.options, "root=/dev/vda2 ro quiet");
        assert!(!entry.unsupported);
    }

    #[test]
    fn menus_begin_with_the_best() {
        let entry = |id: &str, sort_key: &str, version: &str| Entry {
            id: id.into(),
            sort_key: sort_key.into(),
            version: version.into(),
            ..Entry::default()
        };
        let mut entries = [
            entry("plain-1", "", ""),
            entry("plain-2", "", ""),
            entry("d", "debian", "6.1"),
            entry("e", "debian", "6.10"),
            entry("c", "arch", "1"),
            Entry {
                tries: Some(0),
                ..entry("bad", "aaa", "9")
            },
        ];
        entries.sort_by(compare);
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["c", "e", "d", "plain-2", "plain-1", "bad"]);
    }

    #[test]
    fn patterns_match() {
        for (pattern, name, fits) in [
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a?c", "abc", true),
            ("a*b*c", "aXbYbZc", true),
            ("abc", "ab", false),
            ("", "a", false),
            ("a?", "a", false),
        ] {
            assert_eq!(matches(pattern, name), Some(fits), "{pattern} {name}");
        }
        assert_eq!(matches("[a]", "a"), None);
    }
}
