//! The two hierarchies of an image: one with names for old readers, one with the real names.

use std::collections::BTreeSet;

use super::image::{Extent, Image, SECTOR, byte, record_bytes, sectors};
use super::{Directory, Iso, Node, ROOT};

/// Names of the primary hierarchy: at most 30 characters, the dot not counted.
const MAX_STEM: usize = 21;
const MAX_EXTENSION: usize = 8;

/// How a hierarchy writes names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// Upper-case letters, digits and underscores.
    Primary,
    /// UCS-2, as given.
    Joliet,
}

/// An entry of a directory under its identifier in this hierarchy.
#[derive(Debug)]
struct Listed {
    identifier: Vec<u8>,
    node: Node,
}

/// A directory in the path table.
#[derive(Debug)]
struct Row {
    directory: usize,
    /// Number of the parent's row, from 1.
    parent: u16,
    identifier: Vec<u8>,
}

/// One hierarchy of directories over the files of an image.
#[derive(Debug)]
pub(super) struct Tree {
    names: Names,
    /// The entries of each directory in the order of their identifiers.
    listings: Vec<Vec<Listed>>,
    /// The path table: directories by level, parent and identifier.
    rows: Vec<Row>,
    /// Place of each directory.
    extents: Vec<Extent>,
    /// First sectors of the little-endian and the big-endian path table.
    tables: [u64; 2],
}

impl Tree {
    pub(super) fn new(iso: &Iso, names: Names) -> Self {
        let listings: Vec<Vec<Listed>> = iso
            .directories
            .iter()
            .map(|directory| names.list(directory))
            .collect();
        let mut rows = vec![Row {
            directory: ROOT,
            parent: 1,
            identifier: vec![0],
        }];
        let mut number = 0_u16;
        while let Some(row) = rows.get(usize::from(number)) {
            let listing = listings.get(row.directory).map_or(&[][..], Vec::as_slice);
            number += 1;
            for listed in listing {
                if let Node::Directory(directory) = listed.node {
                    let identifier = listed.identifier.clone();
                    rows.push(Row {
                        directory,
                        parent: number,
                        identifier,
                    });
                }
            }
        }
        let extents = listings
            .iter()
            .map(|listing| Extent {
                start: 0,
                bytes: directory_bytes(listing),
            })
            .collect();
        Self {
            names,
            listings,
            rows,
            extents,
            tables: [0; 2],
        }
    }

    /// Gives path tables and directories their sectors from `at` on; returns the sector after them.
    pub(super) fn place(&mut self, mut at: u64) -> u64 {
        let table_sectors = sectors(self.table_bytes());
        for start in &mut self.tables {
            *start = at;
            at += table_sectors;
        }
        for row in &self.rows {
            if let Some(extent) = self.extents.get_mut(row.directory) {
                extent.start = at;
                at += sectors(extent.bytes);
            }
        }
        at
    }

    pub(super) fn names(&self) -> Names {
        self.names
    }

    pub(super) fn tables(&self) -> [u64; 2] {
        self.tables
    }

    /// Bytes of one path table.
    pub(super) fn table_bytes(&self) -> u64 {
        self.rows
            .iter()
            .map(|row| (8 + row.identifier.len()).next_multiple_of(2) as u64)
            .sum()
    }

    pub(super) fn extent(&self, directory: usize) -> Extent {
        self.extents.get(directory).copied().unwrap_or_default()
    }

    /// Writes path tables and directories where [`Tree::place`] put them.
    pub(super) fn write(&self, image: &mut Image, iso: &Iso, files: &[Extent]) {
        self.write_table(image, Image::little32, u16::to_le_bytes);
        self.write_table(image, Image::big32, u16::to_be_bytes);
        for row in &self.rows {
            self.write_directory(image, iso, row.directory, files);
        }
    }

    /// Writes a path table (ECMA-119 9.4) in one byte order.
    fn write_table(
        &self,
        image: &mut Image,
        put32: fn(&mut Image, u64),
        put16: fn(u16) -> [u8; 2],
    ) {
        for row in &self.rows {
            image.bytes(&[byte(row.identifier.len()), 0]);
            put32(image, self.extent(row.directory).start);
            image.bytes(&put16(row.parent));
            image.bytes(&row.identifier);
            if row.identifier.len() % 2 == 1 {
                image.bytes(&[0]);
            }
        }
        image.fill_sector();
    }

    fn write_directory(&self, image: &mut Image, iso: &Iso, index: usize, files: &[Extent]) {
        let parent = iso
            .directories
            .get(index)
            .map_or(ROOT, |directory| directory.parent);
        image.record(&[0], self.extent(index), true, iso.date);
        image.record(&[1], self.extent(parent), true, iso.date);
        for listed in self.listings.get(index).into_iter().flatten() {
            if record_bytes(listed.identifier.len()) > image.room() {
                image.fill_sector();
            }
            let (extent, directory) = match listed.node {
                Node::Directory(child) => (self.extent(child), true),
                Node::File(file) => (files.get(file).copied().unwrap_or_default(), false),
            };
            image.record(&listed.identifier, extent, directory, iso.date);
        }
        image.fill_sector();
    }
}

impl Names {
    /// The entries of `directory` in the order that directories and path tables want.
    fn list(self, directory: &Directory) -> Vec<Listed> {
        let mut taken = BTreeSet::new();
        let mut listing = Vec::with_capacity(directory.entries.len());
        for (index, entry) in directory.entries.iter().enumerate() {
            let is_file = matches!(entry.node, Node::File(_));
            let identifier = match self {
                Self::Primary => primary_identifier(&entry.name, is_file, index, &mut taken),
                Self::Joliet => joliet_identifier(&entry.name, is_file),
            };
            listing.push(Listed {
                identifier,
                node: entry.node,
            });
        }
        listing.sort_by(|a, b| self.stem(&a.identifier).cmp(self.stem(&b.identifier)));
        listing
    }

    /// An identifier without its version number, which does not count for the order.
    fn stem(self, identifier: &[u8]) -> &[u8] {
        let version: &[u8] = match self {
            Self::Primary => b";1",
            Self::Joliet => b"\0;\x001",
        };
        identifier.strip_suffix(version).unwrap_or(identifier)
    }
}

fn joliet_identifier(name: &str, is_file: bool) -> Vec<u8> {
    let version = if is_file { ";1" } else { "" };
    name.encode_utf16()
        .chain(version.encode_utf16())
        .flat_map(u16::to_be_bytes)
        .collect()
}

/// The nearest name that ECMA-119 allows (7.5 and 7.6) and that is free among `taken`.
fn primary_identifier(
    name: &str,
    is_file: bool,
    index: usize,
    taken: &mut BTreeSet<Vec<u8>>,
) -> Vec<u8> {
    let allowed = |text: &str, length: usize| -> String {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_uppercase()
            } else {
                '_'
            }
        };
        text.chars().take(length).map(plain).collect()
    };
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, extension)) if is_file => (stem, extension),
        _ => (name, ""),
    };
    let tail = if is_file {
        format!(".{};1", allowed(extension, MAX_EXTENSION))
    } else {
        String::new()
    };
    let mut identifier = allowed(stem, MAX_STEM) + &tail;
    let mut number = index;
    while !taken.insert(identifier.clone().into_bytes()) {
        let suffix = format!("_{number}");
        identifier = allowed(stem, MAX_STEM.saturating_sub(suffix.len())) + &suffix + &tail;
        number += 1;
    }
    identifier.into_bytes()
}

/// Bytes of a directory: whole sectors, in which no record crosses a boundary.
fn directory_bytes(listing: &[Listed]) -> u64 {
    let mut bytes = 2 * record_bytes(1);
    for listed in listing {
        let record = record_bytes(listed.identifier.len());
        if bytes % SECTOR + record > SECTOR {
            bytes = bytes.next_multiple_of(SECTOR);
        }
        bytes += record;
    }
    bytes.next_multiple_of(SECTOR) as u64
}
