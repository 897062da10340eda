//! What a path asks for.

use super::{GROUP, VERSION};

/// The objects that have parts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// VirtualMachine.
    Machine,
    /// VirtualMachineInstance.
    Instance,
}

impl Kind {
    /// As in paths.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Machine => "virtualmachines",
            Self::Instance => "virtualmachineinstances",
        }
    }
}

/// What a path asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// A document that is the same for everyone, or a webhook, by the path without a slash at its end.
    Fixed(String),
    /// A part of an object.
    Part(Part),
    /// `expand-vm-spec`, of objects that need not be there.
    Expand {
        /// The namespace.
        namespace: String,
    },
}

/// A part of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The object's namespace.
    pub namespace: String,
    /// The object's kind.
    pub kind: Kind,
    /// The object's name.
    pub name: String,
    /// The part, like `start`.
    pub part: String,
    /// What follows in the path, like a port.
    pub rest: Vec<String>,
}

impl Path {
    /// Reads a path. Nothing that could leave its place in another path gets through.
    pub fn of(path: &str) -> Option<Self> {
        let trimmed = path.trim_end_matches('/');
        let prefix = format!("/apis/{GROUP}/{VERSION}/namespaces/");
        let Some(rest) = trimmed.strip_prefix(&prefix) else {
            return Some(Self::Fixed(trimmed.to_owned()));
        };
        let words: Vec<String> = rest.split('/').map(unescape).collect::<Option<_>>()?;
        if !words.iter().all(|word| is_name(word)) {
            return None;
        }
        match words.as_slice() {
            [namespace, word] if word == "expand-vm-spec" => Some(Self::Expand {
                namespace: namespace.clone(),
            }),
            [namespace, plural, name, part, rest @ ..] if rest.len() <= 2 => {
                let kind = [Kind::Machine, Kind::Instance]
                    .into_iter()
                    .find(|kind| kind.plural() == plural)?;
                Some(Self::Part(Part {
                    namespace: namespace.clone(),
                    kind,
                    name: name.clone(),
                    part: part.clone(),
                    rest: rest.to_vec(),
                }))
            }
            _ => None,
        }
    }
}

/// Whether it is what objects are called: a DNS name.
fn is_name(word: &str) -> bool {
    let known = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    !word.is_empty() && word.len() <= 253 && word.bytes().all(known) && !word.starts_with('.')
}

/// Undoes a URL's escapes.
pub fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BASE: &str = "/apis/subresources.kubevirt.io/v1/namespaces/default";

    #[test]
    fn parts_are_found() {
        let path = format!("{BASE}/virtualmachineinstances/web.1/portforward/22/tcp");
        let Some(Path::Part(part)) = Path::of(&path) else {
            panic!("no part");
        };
        assert_eq!(part.kind, Kind::Instance);
        assert_eq!((&*part.name, &*part.part), ("web.1", "portforward"));
        assert_eq!(part.rest, ["22", "tcp"]);
        let expand = Path::of(&format!("{BASE}/expand-vm-spec"));
        assert!(matches!(expand, Some(Path::Expand { namespace }) if namespace == "default"));
        let fixed = Path::of("/apis/subresources.kubevirt.io/v1/");
        assert_eq!(
            fixed,
            Some(Path::Fixed("/apis/subresources.kubevirt.io/v1".into()))
        );
    }

    #[test]
    fn nothing_leaves_its_place() {
        for path in [
            "virtualmachines/../start",
            "virtualmachines/%2e%2e/start",
            "virtualmachines/a%2fb/start",
            "virtualmachines/a%00/start",
            "virtualmachines/a%/start",
            "virtualmachines//start",
            "virtualmachines/A/start",
            "virtualmachines/a/start/1/2/3",
            "pods/a/start",
            "virtualmachines/a",
        ] {
            assert_eq!(Path::of(&format!("{BASE}/{path}")), None, "{path}");
        }
    }
}
