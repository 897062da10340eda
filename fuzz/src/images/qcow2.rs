//! qcow2 images, read and written.

use std::fs::File;

use edgevmm_block::qcow2::{Repair, check, describe};
use edgevmm_block::{BlockBackend, DataFile, DiskOptions, ImageFormat, VolatileSlice, open};

use super::packed::unpack;
use super::read::{check_message, explore, read};

/// Most requests of one input: each may copy a cluster of 2 MiB.
const REQUESTS_MAX: usize = 24;
/// Most bytes of one write.
const LEN_MAX: u64 = 150_000;

/// Reads a qcow2 image.
pub fn qcow2(input: &[u8]) {
    read(ImageFormat::Qcow2, input, |_| ());
}

/// Writes to a qcow2 image, opens it again and reads it.
pub fn qcow2_write(input: &[u8]) {
    let Some(image) = unpack(input) else { return };
    let mut requests = image.requests.chunks_exact(8).take(REQUESTS_MAX);
    for _ in 0..2 {
        let Some((first, others)) = again(&image.files) else {
            return;
        };
        let options = DiskOptions {
            format: Some(ImageFormat::Qcow2),
            data_files: others
                .into_iter()
                .map(|file| DataFile {
                    file,
                    path_hint: "data".into(),
                })
                .collect(),
            ..DiskOptions::new(first, "image")
        };
        let disk = match open(options) {
            Ok(disk) => disk,
            Err(err) => return check_message(&err),
        };
        for request in requests.by_ref() {
            let number = u64::from_le_bytes(request.try_into().unwrap_or_default());
            if !change(&*disk, number) {
                break;
            }
        }
        explore(&*disk, &[]);
        let _ = disk.flush();
    }
}

/// Checks and repairs a qcow2 image; what is said to be clean then is clean.
pub fn qcow2_check(input: &[u8]) {
    let Some(image) = unpack(input) else { return };
    let run = |repair| {
        let (file, _) = again(&image.files)?;
        match check(file, "image", repair, &mut |_, _| ()) {
            Ok(report) => Some(report),
            Err(err) => {
                check_message(&err);
                None
            }
        }
    };
    if let Some((file, _)) = again(&image.files) {
        let _ = describe(file, "image");
    }
    let Some(found) = run(Repair::No) else { return };
    for message in &found.messages {
        assert!(!message.contains(char::is_control), "{message:?}");
    }
    assert_eq!(
        Some(&found),
        run(Repair::No).as_ref(),
        "a check changes something"
    );
    if let Some(mended) = run(Repair::All)
        && let Some(left) = run(Repair::No)
    {
        assert_eq!(mended.is_clean(), left.is_clean(), "{mended:?} {left:?}");
    }
}

/// The files once more: the first, and the others.
fn again(files: &[File]) -> Option<(File, Vec<File>)> {
    let mut files = files.iter().map(|file| file.try_clone().ok());
    Some((files.next()??, files.collect::<Option<_>>()?))
}

/// Does one request; returns whether more shall be done before the image is opened anew.
fn change(disk: &dyn BlockBackend, number: u64) -> bool {
    let size = disk.size();
    // In whole sectors, as guests have it, but for some.
    let mask = if number & 8 == 0 { 511 } else { 0 };
    let offset = ((number >> 24) % size.max(1)) & !mask;
    let len = ((number >> 8) & 0xffff) * 3;
    let len = (len.min(LEN_MAX) & !mask).max(512).min(size - offset);
    match number % 8 {
        0 => {
            let _ = disk.flush();
        }
        1 => {
            let _ = disk.discard(offset, len);
        }
        2 => {
            let _ = disk.write_zeroes(offset, len, number & 16 == 0);
        }
        3 => {
            let larger = size.saturating_add(len.next_multiple_of(512));
            if larger < 1 << 40 {
                let _ = disk.resize(larger);
            }
        }
        4 => return false,
        _ => write(disk, offset, len, number as u8),
    }
    true
}

/// Writes, and makes sure that it can be read: an image that took a write has to give it back.
fn write(disk: &dyn BlockBackend, offset: u64, len: u64, byte: u8) {
    let mut data = vec![byte | 1; len as usize];
    let written = disk.write_vectored(&[VolatileSlice::from(&mut data[..])], offset);
    let mut seen = vec![0; len as usize];
    let read = disk.read_vectored(&[VolatileSlice::from(&mut seen[..])], offset);
    if written.is_ok() && read.is_ok() {
        assert!(
            seen == data,
            "{offset}+{len} reads otherwise than just written"
        );
    }
}
