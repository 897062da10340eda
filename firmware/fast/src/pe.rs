//! Sections of unified kernel images (UAPI.5), which are PE files (Microsoft PE format).
//!
//! Left out: several profiles in one image, and device trees.

use alloc::string::{String, ToString};
use alloc::vec;

use crate::bls;
use crate::decline::{Decline, Reason};
use crate::volume::File;

const HEADER_LEN: usize = 24;
const SECTION_LEN: usize = 40;
const SECTIONS_MAX: u16 = 96;
const MACHINE_X86_64: u16 = 0x8664;
/// Longer texts are none.
const TEXT_MAX: u64 = 64 << 10;

/// A piece of a file: offset and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A unified kernel image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uki {
    /// The kernel.
    pub linux: Option<Piece>,
    /// Early microcode, before the initial RAM disk.
    pub microcode: Option<Piece>,
    /// The initial RAM disk.
    pub initrd: Option<Piece>,
    command_line: Option<Piece>,
    release: Option<Piece>,
    unsupported: bool,
}

fn damaged() -> Decline {
    Decline::new(Reason::Kernel, "the kernel image is no EFI program")
}

fn word(bytes: &[u8], at: usize) -> Result<u16, Decline> {
    let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    bytes.map(u16::from_le_bytes).ok_or_else(damaged)
}

fn dword(bytes: &[u8], at: usize) -> Result<u32, Decline> {
    Ok(u32::from(word(bytes, at)?) | u32::from(word(bytes, at + 2)?) << 16)
}

impl Uki {
    /// Reads the table of sections.
    ///
    /// # Errors
    /// It is no EFI program for x86-64, or can't be read.
    pub fn read(file: &mut File) -> Result<Self, Decline> {
        let mut dos = [0; 64];
        file.read_at(0, &mut dos).map_err(|_| damaged())?;
        let at = u64::from(dword(&dos, 60)?);
        let mut header = [0; HEADER_LEN];
        file.read_at(at, &mut header).map_err(|_| damaged())?;
        let count = word(&header, 6)?;
        let sane = dos.starts_with(b"MZ")
            && header.starts_with(b"PE\0\0")
            && word(&header, 4)? == MACHINE_X86_64
            && count <= SECTIONS_MAX;
        if !sane {
            return Err(damaged());
        }
        let table = at + HEADER_LEN as u64 + u64::from(word(&header, 20)?);
        let mut sections = vec![0; usize::from(count) * SECTION_LEN];
        file.read_at(table, &mut sections).map_err(|_| damaged())?;
        let mut uki = Self::default();
        for section in sections.chunks_exact(SECTION_LEN) {
            let (virtual_len, len) = (dword(section, 8)?, dword(section, 16)?);
            let piece = Piece {
                offset: u64::from(dword(section, 20)?),
                len: u64::from(virtual_len.min(len)),
            };
            if piece.offset + piece.len > file.len() {
                return Err(damaged());
            }
            let name = section.split(|byte| *byte == 0).next().unwrap_or_default();
            match name.get(..8).unwrap_or(name) {
                b".linux" => uki.linux = Some(piece),
                b".ucode" => uki.microcode = Some(piece),
                b".initrd" => uki.initrd = Some(piece),
                b".cmdline" => uki.command_line = Some(piece),
                b".osrel" => uki.release = Some(piece),
                b".profile" | b".dtb" | b".dtbauto" => uki.unsupported = true,
                _ => {}
            }
        }
        Ok(uki)
    }

    /// The menu's entry for the image at `path`, with id `id`.
    ///
    /// # Errors
    /// Its texts can't be read.
    pub fn entry(&self, file: &mut File, name: &str, path: &str) -> Result<bls::Entry, Decline> {
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        let (id, tries) = bls::split_tries(stem);
        let mut entry = bls::Entry {
            id: id.into(),
            tries,
            options: text(file, self.command_line)?,
            efi: Some(path.into()),
            unsupported: self.unsupported,
            ..bls::Entry::default()
        };
        let release = text(file, self.release)?;
        let value = |names: &[&str]| {
            let found = names.iter().find_map(|name| release_value(&release, name));
            found.unwrap_or_default()
        };
        entry.title = value(&["PRETTY_NAME", "NAME"]);
        entry.sort_key = value(&["IMAGE_ID", "ID"]);
        entry.version = value(&["IMAGE_VERSION", "VERSION_ID", "BUILD_ID"]);
        Ok(entry)
    }
}

fn text(file: &mut File, piece: Option<Piece>) -> Result<String, Decline> {
    let Some(piece) = piece else {
        return Ok(String::new());
    };
    let len = usize::try_from(piece.len.min(TEXT_MAX)).map_err(|_| damaged())?;
    if piece.len > TEXT_MAX {
        return Err(damaged());
    }
    let mut bytes = vec![0; len];
    file.read_at(piece.offset, &mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.trim_end_matches(['\0', '\n', ' ']).into())
}

/// A value of os-release, without quotes.
fn release_value(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| {
        let value = line.trim().strip_prefix(name)?.strip_prefix('=')?;
        Some(value.trim_matches(['"', '\'']))
    });
    value.map(ToString::to_string)
}
