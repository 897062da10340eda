//! The text that tells what a VMDK disk is made of.

use std::io;

use crate::formats::refusal::{invalid, unsupported};

/// Most bytes of text taken; VMware writes about one kilobyte.
pub const TEXT_MAX: u64 = 1 << 20;
/// Most extents of one disk: 8 TiB in pieces of 2 GiB, VMware's largest.
const EXTENTS_MAX: usize = 4096;
/// What the text begins with.
pub const MAGIC: &[u8] = b"# Disk DescriptorFile";
/// The parent of a disk that has none.
const NO_PARENT: &str = "ffffffff";

/// What the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// The disk's bytes, from this byte of the file on.
    Flat(u64),
    /// A sparse extent with tables.
    Sparse,
    /// No file: zeroes.
    Zero,
}

/// A line that tells of an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What it is.
    pub kind: ExtentKind,
    /// Its part of the disk, in sectors.
    pub sectors: u64,
    /// The file it is in, as written by whoever wrote the text; empty for zeroes.
    pub file: String,
}

/// A descriptor of a disk that stands by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// In the order of the disk.
    pub extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// The files that the disk is in, each once, in the order in which they are named first.
    pub fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = Vec::new();
        for line in &self.extents {
            if line.kind != ExtentKind::Zero && !files.contains(&line.file.as_str()) {
                files.push(&line.file);
            }
        }
        files
    }

    /// Reads the text, which ends with the first zero byte if there is one.
    ///
    /// # Errors
    /// It breaks the rules, or tells of something that is not supported.
    pub fn parse(text: &[u8]) -> io::Result<Self> {
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        // Names in another encoding become names that no file has.
        let text = String::from_utf8_lossy(text);
        let mut descriptor = Self::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(extent) = parse_extent(line)? {
                if descriptor.extents.len() == EXTENTS_MAX {
                    return Err(invalid(format!("it has more than {EXTENTS_MAX} extents")));
                }
                descriptor.extents.push(extent);
            } else if let Some((key, value)) = line.split_once('=')
                && key.trim().eq_ignore_ascii_case("parentCID")
                && !value.trim().eq_ignore_ascii_case(NO_PARENT)
            {
                return Err(unsupported(
                    "it holds only what changed since a snapshot, and needs the disk below it; \
                     merge the snapshots where it was made, or convert the newest one with \
                     `qemu-img convert -O qcow2`",
                ));
            }
        }
        Ok(descriptor)
    }

    /// Whether `text` has none at all, only padding.
    pub fn is_blank(text: &[u8]) -> bool {
        text.first().is_none_or(|&byte| byte == 0)
    }
}

/// Reads `ACCESS SECTORS TYPE "FILE" OFFSET`; other lines are none.
fn parse_extent(line: &str) -> io::Result<Option<ExtentLine>> {
    let mut words = line.splitn(4, char::is_whitespace);
    let access = words.next().unwrap_or_default();
    if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
        return Ok(None);
    }
    let broken = || {
        invalid(format!(
            "the extent line {:?} makes no sense",
            shorten(line)
        ))
    };
    let sectors = words
        .next()
        .and_then(|word| word.parse().ok())
        .filter(|&sectors| sectors > 0)
        .ok_or_else(broken)?;
    let kind = words.next().ok_or_else(broken)?;
    let rest = words.next().unwrap_or_default().trim();
    if access == "NOACCESS" {
        return Err(unsupported(
            "a part of it is locked away (a NOACCESS extent)",
        ));
    }
    let (file, rest) = rest
        .strip_prefix('"')
        .and_then(|rest| rest.split_once('"'))
        .unwrap_or_default();
    let offset = match rest.split_whitespace().next() {
        None => 0,
        Some(word) => word.parse::<u64>().ok().ok_or_else(broken)?,
    };
    let offset = offset.checked_mul(crate::SECTOR_SIZE).ok_or_else(broken)?;
    let kind = match kind {
        "FLAT" | "VMFS" => ExtentKind::Flat(offset),
        "SPARSE" => ExtentKind::Sparse,
        "ZERO" => ExtentKind::Zero,
        "VMFSRDM" | "VMFSRAW" => {
            return Err(unsupported(
                "it stands for a whole device of the host it comes from (raw device mapping), and \
                 has no data of its own; convert it there",
            ));
        }
        "VMFSSPARSE" | "SESPARSE" => {
            return Err(unsupported(
                "it is a snapshot of an ESXi host (vmfsSparse or seSparse); merge the snapshots \
                 there, or convert it with `qemu-img convert -O qcow2`",
            ));
        }
        _ => return Err(broken()),
    };
    if file.is_empty() && kind != ExtentKind::Zero {
        return Err(broken());
    }
    Ok(Some(ExtentLine {
        kind,
        sectors,
        file: file.to_owned(),
    }))
}

fn shorten(line: &str) -> String {
    line.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(text: &str) -> Result<Vec<ExtentLine>, String> {
        Descriptor::parse(text.as_bytes())
            .map(|it| it.extents)
            .map_err(|err| err.to_string())
    }

    #[test]
    fn reads_extents() {
        let text = "# Disk DescriptorFile\r\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
                    createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\n\
                    RW 4192256 FLAT \"a b-f001.vmdk\" 0\nRDONLY 10 SPARSE \"c-s002.vmdk\"\n\
                    RW 7 ZERO\nRW 1 FLAT \"d\" 63 partitionUUID x\n\
                    ddb.adapterType = \"ide\"\n\0RW junk";
        let line = |kind, sectors, file: &str| ExtentLine {
            kind,
            sectors,
            file: file.into(),
        };
        assert_eq!(
            parse(text).unwrap(),
            [
                line(ExtentKind::Flat(0), 4_192_256, "a b-f001.vmdk"),
                line(ExtentKind::Sparse, 10, "c-s002.vmdk"),
                line(ExtentKind::Zero, 7, ""),
                line(ExtentKind::Flat(63 * 512), 1, "d"),
            ]
        );
    }

    #[test]
    fn refuses_in_clear_words() {
        for (text, word) in [
            ("parentCID=0badcafe", "snapshot"),
            ("ParentCID = 1", "snapshot"),
            ("RW 1 VMFSRDM \"a-rdm.vmdk\"", "raw device mapping"),
            ("RW 1 SESPARSE \"a-sesparse.vmdk\"", "seSparse"),
            ("RW 1 VMFSSPARSE \"a-delta.vmdk\"", "vmfsSparse"),
            ("NOACCESS 1 FLAT \"a\" 0", "NOACCESS"),
            ("RW 0 FLAT \"a\" 0", "no sense"),
            ("RW -1 FLAT \"a\" 0", "no sense"),
            ("RW 18446744073709551616 ZERO", "no sense"),
            ("RW 1 FLAT \"a\" 18446744073709551615", "no sense"),
            ("RW 1 FLAT \"a", "no sense"),
            ("RW 1 FLAT", "no sense"),
            ("RW 1 ROUND \"a\"", "no sense"),
            ("RW", "no sense"),
        ] {
            let told = parse(text).unwrap_err();
            assert!(told.contains(word), "{text:?} is refused with {told:?}");
        }
        assert!(
            parse(&"RW 1 ZERO\n".repeat(5000))
                .unwrap_err()
                .contains("4096")
        );
    }
}
