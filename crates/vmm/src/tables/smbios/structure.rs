//! The common form of SMBIOS structures: a header, fields, and strings that fields refer to.

/// Longest string; readers before SMBIOS 2.7 know no longer ones.
const STRING_MAX: usize = 64;
const LEN_AT: usize = 1;

/// Structures behind each other.
#[derive(Debug, Default)]
pub(super) struct Structures {
    bytes: Vec<u8>,
    count: usize,
    longest: usize,
}

impl Structures {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Length of the longest structure with its strings.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Begins a structure; it is part of the tables once it is ended.
    pub(super) fn start(&mut self, kind: u8, handle: u16) -> Structure<'_> {
        let [low, high] = handle.to_le_bytes();
        Structure {
            all: self,
            fields: vec![kind, 0, low, high],
            strings: Vec::new(),
            referred: 0,
        }
    }
}

/// A structure in the making.
pub(super) struct Structure<'a> {
    all: &'a mut Structures,
    fields: Vec<u8>,
    strings: Vec<u8>,
    /// Number of the last string.
    referred: u8,
}

impl Structure<'_> {
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.fields.extend(bytes);
        self
    }

    pub(super) fn byte(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(super) fn word(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn dword(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn qword(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A field that refers to `text`, or to none when there is none or it is blank.
    pub(super) fn string(mut self, text: Option<&str>) -> Self {
        let text = text.unwrap_or_default().trim();
        if text.is_empty() {
            return self.byte(0);
        }
        let printable = text.chars().take(STRING_MAX).map(|c| {
            let byte = u8::try_from(c).ok();
            byte.filter(|byte| matches!(byte, b' '..=b'~'))
                .unwrap_or(b'?')
        });
        self.strings.extend(printable);
        self.strings.push(0);
        self.referred += 1;
        let number = self.referred;
        self.byte(number)
    }

    pub(super) fn end(mut self) {
        self.fields[LEN_AT] = u8::try_from(self.fields.len()).unwrap_or(u8::MAX);
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.strings.push(0);
        self.all.count += 1;
        self.all.longest = self.all.longest.max(self.fields.len() + self.strings.len());
        self.all.bytes.append(&mut self.fields);
        self.all.bytes.append(&mut self.strings);
    }
}
