//! Blobs that point at each other, and two ways to place them.
//!
//! Before it is placed, a pointer holds an offset into the blob it points at; placing adds that
//! blob's address, then checksums are made right. Firmware does so by a script (the linker-loader
//! of QEMU's firmware configuration device: ALLOCATE, ADD_POINTER and ADD_CHECKSUM commands of 128
//! bytes); for a kernel that is started directly [`Linker::place`] does the same.

use std::ops::Range;

use super::{FirmwareFile, PlacedBytes};

/// Name of the script among the `fw_cfg` files.
pub const FILE: &str = "etc/table-loader";

const COMMAND_LEN: usize = 128;
const FILE_NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;

/// Where firmware puts a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Zone {
    /// Anywhere below 4 GiB.
    High = 1,
    /// In the segment at 0xf0000, where operating systems search for anchors.
    FSegment = 2,
}

/// Width of a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Width {
    /// 32 bits.
    Dword = 4,
    /// 64 bits.
    Qword = 8,
}

/// A blob of a [`Linker`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobId(usize);

#[derive(Debug)]
struct Blob {
    name: &'static str,
    bytes: Vec<u8>,
    align: u32,
    zone: Zone,
}

#[derive(Debug)]
enum Link {
    Pointer {
        blob: BlobId,
        at: usize,
        width: Width,
        target: BlobId,
    },
    Checksum {
        blob: BlobId,
        at: usize,
        range: Range<usize>,
    },
}

/// Blobs and the links between them. Offsets in links are the caller's to get right.
#[derive(Debug, Default)]
pub struct Linker {
    blobs: Vec<Blob>,
    links: Vec<Link>,
}

impl Linker {
    /// Adds a blob that is a `fw_cfg` file of at most 55 bytes of `name`; `align` is a power of 2.
    pub fn add_blob(
        &mut self,
        name: &'static str,
        bytes: Vec<u8>,
        align: u32,
        zone: Zone,
    ) -> BlobId {
        self.blobs.push(Blob {
            name,
            bytes,
            align,
            zone,
        });
        BlobId(self.blobs.len() - 1)
    }

    /// Says that `blob` holds at offset `at` an offset into `target` that becomes an address.
    pub fn add_pointer(&mut self, blob: BlobId, at: usize, width: Width, target: BlobId) {
        self.links.push(Link::Pointer {
            blob,
            at,
            width,
            target,
        });
    }

    /// Says that the bytes `range` of `blob` add up to zero by the byte at offset `at` in them.
    pub fn add_checksum(&mut self, blob: BlobId, at: usize, range: Range<usize>) {
        // SeaBIOS corrects what is there, OVMF sets what the sum of all lacks.
        self.blobs[blob.0].bytes[at] = 0;
        self.links.push(Link::Checksum { blob, at, range });
    }

    /// Length in bytes of a blob.
    pub fn len_of(&self, blob: BlobId) -> usize {
        self.blobs[blob.0].bytes.len()
    }

    /// Places the blobs at `addresses`, in the order in which they were added.
    pub fn place(&self, addresses: &[u64]) -> Vec<PlacedBytes> {
        let blobs = addresses.iter().zip(&self.blobs);
        let mut placed: Vec<PlacedBytes> = blobs
            .map(|(address, blob)| (*address, blob.bytes.clone()))
            .collect();
        for link in &self.links {
            match link {
                Link::Pointer {
                    blob,
                    at,
                    width,
                    target,
                } => {
                    let base = placed[target.0].0;
                    let field = &mut placed[blob.0].1[*at..*at + *width as usize];
                    let mut value = [0; 8];
                    value[..field.len()].copy_from_slice(field);
                    let value = u64::from_le_bytes(value).wrapping_add(base).to_le_bytes();
                    field.copy_from_slice(&value[..field.len()]);
                }
                Link::Checksum { blob, at, range } => {
                    let bytes = &mut placed[blob.0].1;
                    let sum = bytes[range.clone()]
                        .iter()
                        .fold(0_u8, |sum, b| sum.wrapping_add(*b));
                    bytes[*at] = bytes[*at].wrapping_sub(sum);
                }
            }
        }
        placed
    }

    /// The files for firmware: the blobs, and the script that places them.
    pub fn into_files(self) -> Vec<FirmwareFile> {
        let script = self.script();
        let mut files: Vec<_> = self
            .blobs
            .into_iter()
            .map(|blob| (blob.name, blob.bytes))
            .collect();
        files.push((FILE, script));
        files
    }

    fn script(&self) -> Vec<u8> {
        let name = |blob: &BlobId| self.blobs[blob.0].name;
        let allocate = self.blobs.iter().map(|blob| {
            Command::new(ALLOCATE)
                .name(blob.name)
                .dword(blob.align)
                .byte(blob.zone as u8)
        });
        let links = self.links.iter().map(|link| match link {
            Link::Pointer {
                blob,
                at,
                width,
                target,
            } => Command::new(ADD_POINTER)
                .name(name(blob))
                .name(name(target))
                .offset(*at)
                .byte(*width as u8),
            Link::Checksum { blob, at, range } => Command::new(ADD_CHECKSUM)
                .name(name(blob))
                .offset(*at)
                .offset(range.start)
                .offset(range.len()),
        });
        allocate
            .chain(links)
            .flat_map(Command::into_bytes)
            .collect()
    }
}

/// A command of the script in the making.
struct Command(Vec<u8>);

impl Command {
    fn new(number: u32) -> Self {
        Self(number.to_le_bytes().to_vec())
    }

    fn name(mut self, name: &str) -> Self {
        let end = self.0.len() + FILE_NAME_LEN;
        self.0.extend(name.bytes().take(FILE_NAME_LEN - 1));
        self.0.resize(end, 0);
        self
    }

    fn dword(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn offset(self, value: usize) -> Self {
        self.dword(u32::try_from(value).unwrap_or(u32::MAX))
    }

    fn byte(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn into_bytes(mut self) -> Vec<u8> {
        self.0.resize(COMMAND_LEN, 0);
        self.0
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;

    /// Executes the script among `files` as firmware does, with the allocator `allocate(name,
    /// length, alignment, zone)`. Gives the blobs by name with their addresses.
    pub(in super::super) fn execute(
        files: &[FirmwareFile],
        mut allocate: impl FnMut(&str, usize, u32, u8) -> u64,
    ) -> BTreeMap<String, PlacedBytes> {
        let files: BTreeMap<&str, &Vec<u8>> = files.iter().map(|(n, b)| (*n, b)).collect();
        let mut placed = BTreeMap::<String, PlacedBytes>::new();
        let script = files[FILE];
        assert_eq!(script.len() % COMMAND_LEN, 0);
        for command in script.chunks(COMMAND_LEN) {
            let dword = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap());
            let name = |at: usize| {
                let field = &command[at..at + FILE_NAME_LEN];
                let end = field.iter().position(|b| *b == 0).expect("terminated name");
                String::from_utf8(field[..end].to_vec()).unwrap()
            };
            let offset = |at: usize| usize::try_from(dword(at)).unwrap();
            match dword(0) {
                ALLOCATE => {
                    let (name, align) = (name(4), dword(60));
                    assert!(align.is_power_of_two());
                    let bytes = files[name.as_str()].clone();
                    let address = allocate(&name, bytes.len(), align, command[64]);
                    assert!(placed.insert(name, (address, bytes)).is_none());
                }
                ADD_POINTER => {
                    let base = placed[&name(60)].0;
                    let (at, size) = (offset(116), usize::from(command[120]));
                    let bytes = &mut placed.get_mut(&name(4)).unwrap().1;
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&bytes[at..at + size]);
                    let value = u64::from_le_bytes(value) + base;
                    bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
                    assert!(size == 8 || value >> (8 * size) == 0, "pointer fits");
                }
                ADD_CHECKSUM => {
                    let (at, start, len) = (offset(60), offset(64), offset(68));
                    let bytes = &mut placed.get_mut(&name(4)).unwrap().1;
                    let sum = sum(&bytes[start..start + len]);
                    // As OVMF does; SeaBIOS subtracts the sum from what is there.
                    bytes[at] = sum.wrapping_neg();
                }
                other => panic!("unknown command {other}"),
            }
        }
        placed
    }

    /// Sum of bytes, which a right checksum makes zero.
    pub(in super::super) fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn script_and_placing_agree() {
        let mut linker = Linker::default();
        let table = linker.add_blob("table", vec![1, 2, 3, 4, 0, 0, 9, 9], 64, Zone::High);
        let root = linker.add_blob(
            "root",
            vec![4, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0],
            16,
            Zone::FSegment,
        );
        linker.add_pointer(root, 0, Width::Dword, table);
        linker.add_pointer(root, 4, Width::Qword, table);
        linker.add_checksum(table, 5, 2..8);
        let placed = linker.place(&[0xbfff_0000, 0xf_5000]);
        assert_eq!(placed[0], (0xbfff_0000, vec![1, 2, 3, 4, 0, 0xe7, 9, 9]));
        assert_eq!(
            placed[1].1,
            [4, 0, 0xff, 0xbf, 6, 0, 0xff, 0xbf, 0, 0, 0, 0]
        );
        let executed = execute(&linker.into_files(), |name, len, align, zone| match name {
            "table" => {
                assert_eq!((len, align, zone), (8, 64, 1));
                0xbfff_0000
            }
            _ => {
                assert_eq!((len, align, zone), (12, 16, 2));
                0xf_5000
            }
        });
        assert_eq!(executed["table"], placed[0]);
        assert_eq!(executed["root"], placed[1]);
    }
}
