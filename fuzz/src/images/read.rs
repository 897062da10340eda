//! Images that are only read.

use std::fs::File;

use edgevmm_block::{
    BlockBackend, BlockError, DataFile, DiskOptions, ImageFormat, VolatileSlice, open,
};

use super::packed::unpack;
use super::seal;

/// Most bytes of one request.
const LEN_MAX: u64 = 200_000;

/// Reads a VMDK, whose further files are given whatever it calls them.
pub fn vmdk(input: &[u8]) {
    read(ImageFormat::Vmdk, input, |_| ());
}

/// Reads a disk in an OVA archive.
pub fn ova(input: &[u8]) {
    read(ImageFormat::Ova, input, seal::tar);
}

/// Reads a VHD.
pub fn vhd(input: &[u8]) {
    read(ImageFormat::Vhd, input, seal::vhd);
}

/// Reads a VHDX.
pub fn vhdx(input: &[u8]) {
    read(ImageFormat::Vhdx, input, seal::vhdx);
}

/// Reads a VDI.
pub fn vdi(input: &[u8]) {
    read(ImageFormat::Vdi, input, |_| ());
}

/// Tells the format of an image.
pub fn probe(input: &[u8]) {
    if let Some(image) = unpack(input) {
        let _ = edgevmm_block::probe(&image.files[0]);
    }
}

/// Reads an image of `format` here and there.
pub fn read(format: ImageFormat, input: &[u8], seal: impl Fn(&File)) {
    let Some(image) = unpack(input) else { return };
    if image.seal {
        seal(&image.files[0]);
    }
    let mut files = image.files.into_iter();
    let Some(file) = files.next() else { return };
    let options = DiskOptions {
        format: Some(format),
        read_only: true,
        data_files: files
            .map(|file| DataFile {
                file,
                path_hint: "extent".into(),
            })
            .collect(),
        ..DiskOptions::new(file, "image")
    };
    match open(options) {
        Ok(disk) => explore(&*disk, &image.requests),
        Err(err) => check_message(&err),
    }
}

/// Messages are one line that a terminal can show, however hostile the image.
pub fn check_message(error: &BlockError) {
    let text = error.to_string();
    assert!(text.len() < 5000, "a message of {} bytes", text.len());
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// Maps all of a disk, as far as that is quick, and reads what `requests` say.
pub fn explore(disk: &dyn BlockBackend, requests: &[u8]) {
    let size = disk.size();
    assert!(size.is_multiple_of(512));
    if size == 0 {
        return;
    }
    let mut at = 0;
    for _ in 0..200 {
        if at == size {
            break;
        }
        let Ok(entry) = disk.map(at, size - at) else {
            break;
        };
        assert!((1..=size - at).contains(&entry.len));
        at += entry.len;
    }
    check_read(disk, 0, size.min(LEN_MAX));
    check_read(disk, size - 512, 512);
    for request in requests.chunks_exact(8).take(16) {
        let number = u64::from_le_bytes(request.try_into().unwrap_or_default());
        let (offset, len) = ((number >> 16) % size, 1 + number % (1 << 16));
        check_read(disk, offset, len.min(size - offset));
    }
    let past = disk.read_vectored(&[VolatileSlice::from(&mut [0; 2][..])], size - 1);
    assert!(matches!(past, Err(BlockError::OutOfRange { .. })));
}

/// Reads a range as a whole and in two parts: all of it is filled, with the same bytes.
fn check_read(disk: &dyn BlockBackend, offset: u64, len: u64) {
    let mut whole = vec![0x5a; len as usize];
    let mut parts = vec![0xa5; len as usize];
    let read = |buf: &mut [u8], offset| disk.read_vectored(&[VolatileSlice::from(buf)], offset);
    let all = read(&mut whole, offset);
    let (first, second) = parts.split_at_mut(len as usize / 3);
    let done = read(first, offset).and_then(|()| read(second, offset + len / 3));
    assert_eq!(all.is_ok(), done.is_ok());
    if all.is_ok() {
        assert!(whole == parts, "{offset}+{len} reads differently in parts");
    }
}
