//! Checksums put right, so that damage behind them is found too.

use std::fs::File;
use std::os::unix::fs::FileExt;

fn bytes_at(file: &File, at: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

/// Sums up the bytes and puts the inverse at `field`, as VHD has it.
fn seal_sum(file: &File, at: u64, len: usize, field: usize) -> Option<()> {
    let mut bytes = bytes_at(file, at, len)?;
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    file.write_all_at(&(!sum).to_be_bytes(), at + field as u64)
        .ok()
}

/// The footer, its copy, and the header of a VHD.
pub fn vhd(file: &File) {
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    for at in [0, len.saturating_sub(512)] {
        seal_sum(file, at, 512, 64);
        if let Some(field) = bytes_at(file, at + 16, 8)
            && let Ok(field) = field.try_into()
        {
            seal_sum(file, u64::from_be_bytes(field), 1024, 36);
        }
    }
}

/// Puts the CRC-32C of `len` bytes where VHDX has it.
fn seal_crc(file: &File, at: u64, len: usize) -> Option<()> {
    let mut bytes = bytes_at(file, at, len)?;
    bytes[4..8].fill(0);
    let sum = crc32c::crc32c(&bytes);
    file.write_all_at(&sum.to_le_bytes(), at + 4).ok()
}

/// Headers, region tables, and what looks like entries in the first MiB of the log of a VHDX.
pub fn vhdx(file: &File) {
    for at in [64 << 10, 128 << 10] {
        seal_crc(file, at, 4 << 10);
        let log = bytes_at(file, at + 72, 8).and_then(|field| field.try_into().ok());
        let Some(log) = log.map(u64::from_le_bytes) else {
            continue;
        };
        for sector in 0..256 {
            let Some(at) = log.checked_add(sector * 4096) else {
                break;
            };
            let Some(start) = bytes_at(file, at, 12).filter(|it| it.starts_with(b"loge")) else {
                continue;
            };
            let len = u32::from_le_bytes([start[8], start[9], start[10], start[11]]);
            if (12..=1 << 20).contains(&len) {
                seal_crc(file, at, len as usize);
            }
        }
    }
    for at in [192 << 10, 256 << 10] {
        seal_crc(file, at, 64 << 10);
    }
}

/// The headers of a tar archive, found as a reader of sizes in octal digits finds them.
pub fn tar(file: &File) {
    let mut at = 0;
    for _ in 0..64 {
        let Some(mut header) = bytes_at(file, at, 512) else {
            return;
        };
        if header.iter().all(|&byte| byte == 0) {
            return;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        let _ = file.write_all_at(format!("{sum:06o}\0 ").as_bytes(), at + 148);
        let digits = String::from_utf8_lossy(&header[124..136]);
        let digits = digits.trim_matches([' ', '\0']);
        let size = u64::from_str_radix(digits, 8).unwrap_or(0) & 0xffff_ffff;
        at += 512 + size.next_multiple_of(512);
    }
}
