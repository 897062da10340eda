//! Images in few bytes, since most of an image is zeroes and a fuzzer is best with little.
//!
//! A byte of flags and the number of files, the length of each file, then pieces: the number of a
//! file, where in it, how many bytes, and those. Pieces of no file are requests for the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Most bytes of an input.
pub const INPUT_MAX: usize = 64 << 10;

/// Bits of a file's length that count: with 256 MiB a check of all of it is quick.
const LEN: u32 = (1 << 28) - 1;
const FILES: u8 = 3;
const SEAL: u8 = 0x80;
const REQUESTS: u8 = 0xc0;

/// The files of an image, and requests.
#[derive(Debug)]
pub struct Unpacked {
    /// At least one.
    pub files: Vec<File>,
    /// Whether checksums shall be put right, without which little of an image is looked at.
    pub seal: bool,
    /// To be understood by the target.
    pub requests: Vec<u8>,
}

/// Unpacks an input; nothing if it is too short or too long.
pub fn unpack(input: &[u8]) -> Option<Unpacked> {
    if input.len() > INPUT_MAX {
        return None;
    }
    let (&flags, mut rest) = input.split_first()?;
    let count = (flags & FILES) + 1;
    let mut files = Vec::new();
    for _ in 0..count {
        let (len, after) = rest.split_first_chunk()?;
        rest = after;
        let file = File::from(memfd_create(c"image", MFdFlags::MFD_CLOEXEC).ok()?);
        let len = u32::from_le_bytes(*len) & LEN;
        file.set_len(len.into()).ok()?;
        files.push(file);
    }
    let mut requests = Vec::new();
    while let Some((&to, after)) = rest.split_first() {
        if to >= REQUESTS {
            let (&len, after) = after.split_first()?;
            let (bytes, after) = after.split_at_checked(len.into())?;
            requests.extend_from_slice(bytes);
            rest = after;
            continue;
        }
        let (at, after) = after.split_first_chunk()?;
        let (&len, after) = after.split_first()?;
        let (bytes, after) = after.split_at_checked(len.into())?;
        let at = u32::from_le_bytes(*at);
        files[usize::from(to % count)]
            .write_all_at(bytes, at.into())
            .ok()?;
        rest = after;
    }
    Some(Unpacked {
        files,
        seal: flags & SEAL != 0,
        requests,
    })
}

/// Packs files of less than 256 MiB, to make a seed.
#[allow(dead_code, reason = "only what makes seeds packs")]
pub fn pack(files: &[Vec<u8>], seal: bool, requests: &[u8]) -> Vec<u8> {
    /// Zeroes that are cheaper left out.
    const GAP: usize = 6;
    let mut packed = vec![u8::try_from(files.len() - 1).unwrap() | if seal { SEAL } else { 0 }];
    for file in files {
        packed.extend(u32::try_from(file.len()).unwrap().to_le_bytes());
    }
    for (number, file) in files.iter().enumerate() {
        let mut at = 0;
        while let Some(start) = file[at..].iter().position(|&byte| byte != 0) {
            let start = at + start;
            let rest = &file[start..file.len().min(start + 255)];
            let gap = rest.windows(GAP).position(|it| it == [0; GAP]);
            let piece = &rest[..gap.unwrap_or(rest.len())];
            packed.push(u8::try_from(number).unwrap());
            packed.extend(u32::try_from(start).unwrap().to_le_bytes());
            packed.push(u8::try_from(piece.len()).unwrap());
            packed.extend(piece);
            at = start + piece.len();
        }
    }
    for part in requests.chunks(255) {
        packed.extend([REQUESTS, u8::try_from(part.len()).unwrap()]);
        packed.extend(part);
    }
    packed
}
