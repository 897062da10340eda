//! Targets of `edgevmm-fast`: what a hostile disk may have for the boot firmware.

use std::collections::BTreeMap;

use edgevmm_fast::Decline;
use edgevmm_fast::bls;
use edgevmm_fast::choice::Volumes;
use edgevmm_fast::disk::{Disk, SECTOR, SECTOR_LEN, Sectors};
use edgevmm_fast::grub::{self, By, Devices, Kind};
use edgevmm_fast::linux::{HEAD_LEN, Header};
use edgevmm_fast::start_info::{MapEntry, MemoryMap};

/// Length of the disk that [`disk`] makes.
const DISK_LEN: usize = 8 << 20;

/// Runs a script of GRUB's. What a zero byte divides are its environment block and another file.
pub fn grub(input: &[u8]) {
    let mut parts = input.splitn(3, |byte| *byte == 0);
    let paths = [
        "/grub/grub.cfg",
        "/grub/grubenv",
        "/loader/entries/one.conf",
    ];
    let files = paths.map(|path| (path, parts.next().unwrap_or_default().to_vec()));
    let files = Files(files.into_iter().collect());
    if let Ok(linux) = grub::run(&files, "hd0,gpt1", "/grub/grub.cfg") {
        assert!(linux.kernel.path.starts_with('/'));
        assert!(
            linux
                .initrds
                .iter()
                .all(|initrd| initrd.path.starts_with('/'))
        );
    }
}

/// The files of the only device.
struct Files(BTreeMap<&'static str, Vec<u8>>);

impl Devices for Files {
    fn read(&self, _: &str, path: &str) -> Result<Option<Vec<u8>>, Decline> {
        Ok(self.0.get(path).cloned())
    }

    fn kind(&self, _: &str, path: &str) -> Result<Option<Kind>, Decline> {
        let len = self.0.get(path).map(|content| content.len() as u64);
        Ok(len.map(Kind::File))
    }

    fn names(&self, _: &str, path: &str) -> Result<Vec<String>, Decline> {
        let names = self
            .0
            .keys()
            .filter_map(|name| name.strip_prefix(path)?.strip_prefix('/'));
        Ok(names.map(str::to_owned).collect())
    }

    fn search(&self, _: By, value: &str) -> Result<Option<String>, Decline> {
        Ok(value.len().is_multiple_of(2).then(|| "hd0,gpt1".to_owned()))
    }
}

/// Reads entries of the Boot Loader Specification, divided by zero bytes, and puts them in order.
pub fn entries(input: &[u8]) {
    let texts = input.split(|byte| *byte == 0).take(16);
    let texts: Vec<_> = texts.map(String::from_utf8_lossy).collect();
    let names = texts
        .iter()
        .map(|text| text.lines().next().unwrap_or_default());
    let parsed = names
        .zip(&texts)
        .filter_map(|(name, text)| bls::Entry::parse(name, text).ok());
    let mut entries: Vec<_> = parsed.collect();
    entries.sort_by(bls::compare);
    for pair in entries.windows(2) {
        assert!(bls::compare(&pair[0], &pair[1]).is_le());
        let _ = bls::matches(&pair[0].id, &pair[1].id);
    }
}

/// Finds what a disk would boot, and where in memory it would go. The input is pieces of the disk:
/// the sector and the number of bytes, 16 bits each, then the bytes.
pub fn disk(input: &[u8]) {
    let disk = Disk::new(Box::new(Bytes(unpack(input))));
    let Ok(mut choice) = Volumes::find(&[disk]).and_then(|volumes| volumes.choose()) else {
        return;
    };
    let kernel = &mut choice.kernel;
    assert!(kernel.piece.offset + kernel.piece.len <= kernel.file.len());
    let mut head = vec![0; HEAD_LEN];
    if kernel.file.read_at(kernel.piece.offset, &mut head).is_err() {
        return;
    }
    let ram = MapEntry {
        address: 1 << 20,
        len: 1 << 30,
        kind: 1,
        reserved: 0,
    };
    let map = MemoryMap::new(vec![ram]);
    let Ok(header) = Header::new(&head, kernel.piece.len) else {
        return;
    };
    let initrds = choice.initrds.iter().map(|initrd| initrd.piece.len).sum();
    if let Ok(plan) = header.plan(&map, initrds, choice.command_line.len()) {
        assert!(map.is_ram(plan.kernel, plan.kernel + plan.len));
        let _ = header.zero_page(&plan, &map, 0, 0);
    }
}

/// The disk that an input of [`disk`] describes.
pub fn unpack(mut input: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; DISK_LEN];
    while let Some(([a, b, c, d], rest)) = input.split_first_chunk() {
        let start = usize::from(u16::from_le_bytes([*a, *b])) * SECTOR_LEN;
        let len = usize::from(u16::from_le_bytes([*c, *d])).min(rest.len());
        let (bytes, rest) = rest.split_at(len);
        if let Some(place) = disk.get_mut(start..start + len) {
            place.copy_from_slice(bytes);
        }
        input = rest;
    }
    disk
}

struct Bytes(Vec<u8>);

impl Sectors for Bytes {
    fn count(&self) -> u64 {
        self.0.len() as u64 / SECTOR
    }

    fn read(&mut self, first: u64, into: &mut [u8]) -> bool {
        let start = usize::try_from(first * SECTOR).unwrap_or(usize::MAX);
        let there = start
            .checked_add(into.len())
            .and_then(|end| self.0.get(start..end));
        there.map(|there| into.copy_from_slice(there)).is_some()
    }
}
