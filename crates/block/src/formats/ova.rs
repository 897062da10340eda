//! OVA archives: a tar of an OVF description and the disks of a machine, one of which is chosen.
//!
//! By DMTF's OVF specification (DSP0243), 5.1 and 5.2, and POSIX's ustar and pax formats, with
//! GNU's long names and sizes. The description is not read: which member is a disk is told by its
//! content. Left out: compressed (.gz) members, and disks split into several members.

use std::io;

use tar::{EntryType, Header, PaxExtensions};

use super::probe::{self, HEAD_LEN};
use super::range::FileRange;
use super::refusal::{invalid, unsupported};
use crate::ImageFormat;

const BLOCK: usize = 512;
/// Most members looked at.
const MEMBERS_MAX: usize = 4096;
/// Most bytes of a member that only says more of the next one.
const EXTENSION_MAX: u64 = 64 << 10;
/// Most names told in a message.
const NAMES_TOLD: usize = 8;

/// A file in an archive.
#[derive(Debug)]
struct Member {
    name: String,
    range: FileRange,
}

/// Whether a tar archive is an OVA: whether its first file is an OVF description.
///
/// # Errors
/// The archive is damaged or can't be read.
pub fn is_ova(range: FileRange) -> io::Result<bool> {
    let first = Members::new(range).next().transpose()?;
    Ok(first.is_some_and(|member| has_ending(&member.name, ".ovf")))
}

/// The disk `name` of the archive in `range`, or the only one if there is no name; and its format.
///
/// # Errors
/// The archive is damaged or can't be read, or it is not clear which disk is wanted.
pub fn find_disk(range: FileRange, name: Option<&str>) -> io::Result<(FileRange, ImageFormat)> {
    let (mut disks, mut others) = (Vec::new(), Vec::new());
    for member in Members::new(range) {
        let member = member?;
        let wanted = name.is_none_or(|name| {
            let plain = member.name.rsplit('/').next();
            name == member.name || Some(name) == plain
        });
        match disk_format(&member.range)? {
            Some(format) if wanted => disks.push((member, format)),
            _ => others.push(member.name),
        }
    }
    if disks.len() > 1 {
        let names = list(disks.iter().map(|(member, _)| member.name.as_str()));
        return Err(unsupported(format!(
            "it holds several disks: {names}; choose one by member=NAME"
        )));
    }
    let Some((member, format)) = disks.pop() else {
        let names = list(others.iter().map(String::as_str));
        let what = name.map_or_else(|| "no disk".into(), |name| format!("no disk {name:?}"));
        return Err(unsupported(format!(
            "it holds {what} that can be read, but {names}; unpack it (`tar xf`) if its disks are \
             compressed or split"
        )));
    };
    Ok((member.range, format))
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut told: Vec<_> = names
        .map(|name| format!("{:?}", name.chars().take(100).collect::<String>()))
        .collect();
    if told.is_empty() {
        return "nothing".into();
    }
    if told.len() > NAMES_TOLD {
        told.truncate(NAMES_TOLD);
        told.push("others".into());
    }
    told.join(", ")
}

/// The format of a member that is a disk in one file.
fn disk_format(range: &FileRange) -> io::Result<Option<ImageFormat>> {
    let mut head = [0; HEAD_LEN];
    let present = usize::try_from(range.len())
        .unwrap_or(HEAD_LEN)
        .min(HEAD_LEN);
    range.read(&mut head[..present], 0)?;
    Ok(match probe::probe_head(&head) {
        Ok(
            format @ (ImageFormat::Vmdk | ImageFormat::Vhd | ImageFormat::Vhdx | ImageFormat::Vdi),
        ) => Some(format),
        _ => None,
    })
}

fn has_ending(name: &str, ending: &str) -> bool {
    let start = name.len().checked_sub(ending.len());
    start
        .and_then(|start| name.get(start..))
        .is_some_and(|end| end.eq_ignore_ascii_case(ending))
}

/// The files of an archive, in order; ends after the first error.
struct Members {
    range: FileRange,
    at: u64,
    seen: usize,
    ended: bool,
}

/// What an extension says of the file that follows.
#[derive(Default)]
struct Extension {
    name: Option<String>,
    size: Option<u64>,
}

impl Iterator for Members {
    type Item = io::Result<Member>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.find();
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

impl Members {
    fn new(range: FileRange) -> Self {
        Self {
            range,
            at: 0,
            seen: 0,
            ended: false,
        }
    }

    fn find(&mut self) -> io::Result<Option<Member>> {
        let mut extension = Extension::default();
        while self.at < self.range.len() {
            let mut block = [0; BLOCK];
            self.range.read(&mut block, self.at)?;
            if block == [0; BLOCK] {
                break;
            }
            let header = Header::from_byte_slice(&block);
            check(header)?;
            self.seen += 1;
            if self.seen > MEMBERS_MAX {
                return Err(unsupported(format!(
                    "it holds more than {MEMBERS_MAX} files"
                )));
            }
            let kind = header.entry_type();
            let size = match (kind, extension.size) {
                (EntryType::Directory, _) => 0,
                (EntryType::Regular | EntryType::Continuous, Some(size)) => size,
                _ => header.entry_size().map_err(|_| odd_size())?,
            };
            let start = self.at.saturating_add(BLOCK as u64);
            let content = self.range.part(start, size)?;
            self.at = size
                .checked_next_multiple_of(BLOCK as u64)
                .and_then(|size| start.checked_add(size))
                .ok_or_else(odd_size)?;
            match kind {
                EntryType::Regular | EntryType::Continuous => {
                    let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
                    return Ok(Some(Member {
                        name: extension.name.unwrap_or(name),
                        range: content,
                    }));
                }
                EntryType::Directory => extension = Extension::default(),
                EntryType::GNULongLink => {}
                EntryType::GNULongName => extension.name = Some(read_long_name(&content)?),
                EntryType::XHeader => extension.add(&read_extension(&content)?)?,
                EntryType::XGlobalHeader => {
                    let mut global = Extension::default();
                    global.add(&read_extension(&content)?)?;
                    if global.name.is_some() || global.size.is_some() {
                        return Err(unsupported("it gives all its files one name or size"));
                    }
                }
                EntryType::GNUSparse => return Err(sparse()),
                _ => {
                    return Err(unsupported(
                        "it holds links or other things that are no files",
                    ));
                }
            }
        }
        Ok(None)
    }
}

/// Checks the sum of a header's bytes, its own field counted as spaces.
fn check(header: &Header) -> io::Result<()> {
    let (before, field, after) = (
        &header.as_bytes()[..148],
        &header.as_bytes()[148..156],
        &header.as_bytes()[156..],
    );
    let sum = |bytes: &[u8]| -> u32 { bytes.iter().map(|&byte| u32::from(byte)).sum() };
    let spaces = u32::from(b' ') * u32::try_from(field.len()).unwrap_or_default();
    if header.cksum().ok() == Some(sum(before) + spaces + sum(after)) {
        Ok(())
    } else {
        Err(invalid("it is damaged (a tar header has a wrong checksum)"))
    }
}

fn sparse() -> io::Error {
    unsupported("a file in it is sparse; unpack it (`tar xf`)")
}

fn odd_size() -> io::Error {
    invalid("a size in it makes no sense")
}

fn read_extension(content: &FileRange) -> io::Result<Vec<u8>> {
    if content.len() > EXTENSION_MAX {
        return Err(unsupported("a tar header in it is too large"));
    }
    let mut bytes = vec![0; usize::try_from(content.len()).unwrap_or_default()];
    content.read(&mut bytes, 0)?;
    Ok(bytes)
}

fn read_long_name(content: &FileRange) -> io::Result<String> {
    let bytes = read_extension(content)?;
    let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

impl Extension {
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        for record in PaxExtensions::new(bytes) {
            let record = record.map_err(|_| invalid("a tar header in it is damaged"))?;
            let value = String::from_utf8_lossy(record.value_bytes());
            match record.key_bytes() {
                b"path" => self.name = Some(value.into_owned()),
                b"size" => {
                    self.size = Some(value.parse().map_err(|_| odd_size())?);
                }
                // GNU's sparse files in pax form.
                key if key.starts_with(b"GNU.sparse.") => return Err(sparse()),
                _ => {}
            }
        }
        Ok(())
    }
}
